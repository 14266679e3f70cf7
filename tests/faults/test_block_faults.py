"""Blocks and warm starts that are killed, interrupted, repeated, or that start from what failed; ranks are fake, processes real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bench.checkpoint import checkpoint_sha256
from bench.data.fetch import fetch_for_suite
from bench.errors import UserError
from bench.launch.allotment import Allotment
from bench.launch.block import run_block, run_warm
from bench.launch.single import run_single
from bench.launch.watch import Stop
from bench.layout import Layout
from bench.matrix import load_plan, make_plan, save_plan
from bench.record import SIDE_BY_SIDE, load_record, write_json

HERE = (str(Path(__file__).parent),)
FAKE = {"program": "fake_rank", "search_path": HERE}

SUITE = """
suite: small
axes: {stage: [sft, rm], model: [bloom-tiny], strategy: [naive, ddp]}
settings: {device: cpu, launcher: fork, precision: fp32, warm_start: WARM}
stages: {sft: {steps: 4}, rm: {steps: 4}}
limits: {timeout_seconds: 120, heartbeat_seconds: 60, side_by_side: LANES}
"""


class Results:
    """A planned suite of two blocks, sft and rm, with its data; the tokenizer is a stand-in."""

    def __init__(self, folder: Path, warm_start: str, monkeypatch: pytest.MonkeyPatch, lanes: int = 1) -> None:
        monkeypatch.chdir(folder)
        suite = folder / "small.yaml"
        suite.write_text(SUITE.replace("WARM", warm_start).replace("LANES", str(lanes)))
        self.layout = Layout(folder / "results" / "small")
        save_plan(make_plan(suite), self.layout.plan)
        self.plan = load_plan(self.layout.plan)
        self.cache = folder / "cache"
        manifests = [fetch_for_suite(self.layout.data(name), name, cache=self.cache) for name in self.plan.data]
        self.scripts = [Path(manifest.path).with_name("behaviour.json") for manifest in manifests]
        self.warm = {(warm.cell.stage if warm.cell else "tokenizer"): self.layout.warm(warm.key) / "done.json" for warm in self.plan.warm}
        tokenizer = self.warm["tokenizer"]
        (tokenizer.parent / "weights").mkdir(parents=True)
        (tokenizer.parent / "weights" / "tokenizer.json").write_text("{}")
        write_json({"key": tokenizer.parent.name, "outcome": "ok"}, tokenizer)

    def target(self, stage: str) -> Path:
        return next(self.layout.block(block.block_id) for block in self.plan.blocks if block.stage == stage)

    def run(self, stage: str) -> int:
        return run_block(self.target(stage), preload=(), **FAKE)

    def run_warm(self, stage: str) -> int:
        return run_warm(self.warm[stage], **FAKE)

    def behave(self, content: dict[str, dict[str, str]]) -> None:
        for script in self.scripts:
            script.write_text(json.dumps(content))

    def record_path(self, stage: str, strategy: str) -> Path:
        return self.layout.record(self.cell_id(stage, strategy), 0)

    def cell_id(self, stage: str, strategy: str) -> str:
        return next(cell_id for cell_id, cell in self.plan.cells.items() if (cell.stage, cell.strategy) == (stage, strategy))


@pytest.fixture
def shared(tmp_path, monkeypatch):
    return Results(tmp_path, "shared", monkeypatch)


@pytest.fixture
def chained(tmp_path, monkeypatch):
    return Results(tmp_path, "chain", monkeypatch)


@pytest.fixture
def side_by_side(tmp_path, monkeypatch):
    return Results(tmp_path, "shared", monkeypatch, lanes=2)


def block_program(target: Path) -> str:
    """A program that runs a block, to be killed."""
    call = f"run_block(Path({str(target)!r}), preload=(), **{FAKE!r})"
    return f"import sys\nfrom pathlib import Path\nfrom bench.launch.block import run_block\nsys.exit({call})"


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.json")}


def test_a_block_lists_its_records_in_its_order_and_exits_0_whatever_the_outcomes(shared, capsys):
    shared.behave({"sft ddp": {"0": "exit_three"}})
    assert shared.run("sft") == 0
    content = json.loads(shared.target("sft").read_text())
    block = next(block for block in shared.plan.blocks if block.stage == "sft")
    assert [item["cell_id"] for item in content["records"]] == list(block.cells)
    outcomes = {item["cell_id"]: item["outcome"] for item in content["records"]}
    assert outcomes == {shared.cell_id("sft", "naive"): "ok", shared.cell_id("sft", "ddp"): "error"}
    for item in content["records"]:
        assert load_record(shared.layout.root / item["path"]).outcome == item["outcome"]
    assert "sft bloom-tiny ddp full 1x1 ... error" in capsys.readouterr().out


def test_a_finished_trial_is_not_repeated_and_neither_is_a_failed_one(shared):
    shared.behave({"sft ddp": {"0": "exit_three"}})
    shared.run("sft")
    before = stamps(shared.layout.records)
    shared.behave({})
    assert shared.run("sft") == 0
    assert stamps(shared.layout.records) == before


@pytest.mark.parametrize("damage", ["cut", "other fingerprint"])
def test_a_record_that_is_damaged_or_of_other_inputs_is_moved_into_the_logs_and_its_trial_runs(shared, damage):
    shared.run("sft")
    path = shared.record_path("sft", "naive")
    text = path.read_text()
    old = text[:200] if damage == "cut" else text.replace(load_record(path).fingerprint, "f" * 64)
    path.write_text(old)
    assert shared.run("sft") == 0
    assert load_record(path).outcome == "ok"
    moved = list(shared.layout.logs(shared.cell_id("sft", "naive"), 0).rglob("set-aside*.json"))
    assert [file.read_text() for file in moved] == [old]


def test_a_block_that_was_killed_goes_on_where_it_was(shared, wait_until, gone):
    block = next(block for block in shared.plan.blocks if block.stage == "sft")
    second = shared.plan.cells[block.cells[1]].strategy
    shared.behave({f"sft {second}": {"0": "leave_session_and_hang"}})
    code = block_program(shared.target("sft"))
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    stray = shared.layout.logs(block.cells[1], 0).parent / "stray0.pid"
    assert wait_until(stray.exists, 60)
    process.kill()
    process.wait()
    first = shared.layout.record(block.cells[0], 0)
    before = first.stat().st_mtime_ns
    assert not shared.target("sft").exists()
    shared.behave({})
    assert shared.run("sft") == 0
    assert gone([int(stray.read_text())]), "the lock is free only when the last process of the killed block is gone"
    assert first.stat().st_mtime_ns == before
    assert load_record(shared.layout.record(block.cells[1], 0)).outcome == "ok"


def test_an_interrupted_block_exits_130_and_leaves_neither_block_file_nor_record_of_that_trial(shared, wait_until):
    block = next(block for block in shared.plan.blocks if block.stage == "sft")
    first = shared.plan.cells[block.cells[0]].strategy
    shared.behave({f"sft {first}": {"0": "hang"}})
    code = block_program(shared.target("sft"))
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, stdout=subprocess.PIPE, text=True
    )
    work = shared.layout.logs(block.cells[0], 0)
    assert wait_until((work / "heartbeat0.json").exists, 60)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted by SIGTERM; run it again to go on" in out
    assert not shared.target("sft").exists()
    assert not shared.layout.record(block.cells[0], 0).exists()
    assert load_record(work / "cancelled.json").outcome == "cancelled"


@pytest.mark.parametrize(("hanging", "outcome"), [(0, "timeout"), (1, "cancelled")])
def test_the_end_of_an_allocation_is_the_outcome_of_its_first_trial_and_the_next_one_comes_again(
    shared, wait_until, monkeypatch, hanging, outcome
):
    monkeypatch.setattr(Allotment, "here", classmethod(lambda _: Allotment("7", began=0.0, ends=60.0)))
    block, stop = next(block for block in shared.plan.blocks if block.stage == "sft"), Stop()
    late = block.cells[hanging]
    shared.behave({f"sft {shared.plan.cells[late].strategy}": {"0": "hang"}})
    beat = shared.layout.logs(late, 0) / "heartbeat0.json"
    waiter = threading.Thread(target=lambda: (wait_until(beat.exists, 60), stop.ask("SIGTERM")))
    waiter.start()
    assert run_block(shared.target("sft"), preload=(), stop=stop, **FAKE) == 130
    waiter.join()
    path = shared.layout.record(late, 0)
    record = load_record(path if outcome == "timeout" else shared.layout.logs(late, 0) / "cancelled.json")
    assert (record.outcome, path.exists()) == (outcome, outcome == "timeout")


def test_trials_side_by_side_run_at_once_and_their_records_say_so(side_by_side, capsys):
    side_by_side.behave({"sft naive": {"0": "meet"}, "sft ddp": {"0": "meet"}})
    assert side_by_side.run("sft") == 0
    content = json.loads(side_by_side.target("sft").read_text())
    block = next(block for block in side_by_side.plan.blocks if block.stage == "sft")
    assert [item["cell_id"] for item in content["records"]] == list(block.cells)
    records = [load_record(side_by_side.layout.root / item["path"]) for item in content["records"]]
    assert [(record.outcome, SIDE_BY_SIDE in record.flags) for record in records] == [("ok", True)] * 2
    assert sorted(line.split(" ... ok")[0][6:] for line in capsys.readouterr().out.splitlines()) == [
        "sft bloom-tiny ddp full 1x1", "sft bloom-tiny naive full 1x1"
    ]  # fmt: skip


def test_an_interrupt_ends_all_lanes(side_by_side, wait_until):
    side_by_side.behave({"sft naive": {"0": "hang"}, "sft ddp": {"0": "hang"}})
    stop = Stop()
    waiter = threading.Thread(
        target=lambda: (
            wait_until(lambda: len(list(side_by_side.layout.root.glob("logs/*/*/heartbeat0.json"))) == 2, 60),
            stop.ask("SIGTERM"),
        )
    )
    waiter.start()
    assert run_block(side_by_side.target("sft"), preload=(), stop=stop, **FAKE) == 130
    waiter.join()
    assert not side_by_side.target("sft").exists()
    assert not list(side_by_side.layout.records.glob("*/*.json"))


def test_a_block_whose_warm_start_was_never_made_says_how_to_make_it(shared):
    with pytest.raises(UserError, match=r"the warm start sft-bloom-tiny-.* was not made yet; `coati-bench warm "):
        shared.run("rm")


def test_a_failed_warm_start_is_a_record_with_that_reason_in_every_cell_that_needs_it_until_it_is_repaired(shared):
    shared.behave({"sft naive": {"0": "exit_three"}})
    assert shared.run_warm("sft") == 0
    done = json.loads(shared.warm["sft"].read_text())
    assert (done["outcome"], done["sha256"]) == ("error", None)
    assert "exit code 3" in done["reason"]
    assert shared.run("rm") == 0
    for strategy in ("naive", "ddp"):
        record = load_record(shared.record_path("rm", strategy))
        assert record.outcome == "error"
        assert record.reason.startswith("what it starts from failed: policy: the warm start sft-bloom-tiny-")
    shared.behave({})
    assert shared.run_warm("sft") == 0
    assert shared.run("rm") == 0
    assert load_record(shared.record_path("rm", "ddp")).outcome == "ok"


def test_a_warm_start_that_is_done_is_left_alone(shared):
    shared.run_warm("sft")
    before = stamps(shared.warm["sft"].parent)
    assert shared.run_warm("sft") == 0
    assert stamps(shared.warm["sft"].parent) == before


def test_a_warm_start_killed_before_its_last_word_keeps_its_weights(shared):
    shared.run_warm("sft")
    done, record = json.loads(shared.warm["sft"].read_text()), shared.warm["sft"].with_name("record.json")
    shared.warm["sft"].unlink()
    before = record.stat().st_mtime_ns
    assert shared.run_warm("sft") == 0
    assert json.loads(shared.warm["sft"].read_text()) == done
    assert record.stat().st_mtime_ns == before
    assert done["sha256"] == checkpoint_sha256(shared.warm["sft"].parent / "weights")


def test_a_warm_start_whose_weights_are_lost_is_made_again(shared):
    shared.run_warm("sft")
    weights = shared.warm["sft"].parent / "weights"
    (weights / "tokenizer.json").unlink()
    weights.rmdir()
    assert shared.run_warm("sft") == 0
    assert (weights / "tokenizer.json").exists()


def test_a_tokenizer_is_trained_once_on_the_named_data_and_is_the_same_every_time(shared):
    target = shared.warm["tokenizer"]
    assert run_warm(target) == 0
    first = json.loads(target.read_text())
    before = stamps(target.parent)
    assert run_warm(target) == 0
    assert stamps(target.parent) == before
    target.unlink()
    assert run_warm(target) == 0
    assert json.loads(target.read_text()) == first
    assert first["outcome"] == "ok"
    assert not [path for path in target.parent.iterdir() if path.name.startswith(".weights")]


def test_a_chain_continues_each_cells_own_weights_of_the_same_trial(chained):
    assert chained.run("sft") == 0
    assert chained.run("rm") == 0
    for strategy in ("naive", "ddp"):
        record = load_record(chained.record_path("rm", strategy))
        own = chained.layout.chained(chained.cell_id("sft", strategy), 0)
        assert {item.name: item.sha256 for item in record.inputs}["policy"] == checkpoint_sha256(own)


def test_a_chain_whose_first_stage_failed_is_a_failed_start_and_stale_weights_are_not_continued(chained):
    chained.run("sft")
    chained.record_path("sft", "ddp").unlink()
    chained.behave({"sft ddp": {"0": "diverge"}})
    chained.run("sft")
    assert not chained.layout.chained(chained.cell_id("sft", "ddp"), 0).exists()
    assert chained.run("rm") == 0
    record = load_record(chained.record_path("rm", "ddp"))
    assert (record.outcome, "ended as diverged" in record.reason) == ("error", True)
    assert load_record(chained.record_path("rm", "naive")).outcome == "ok"


def test_a_chained_trial_whose_weights_are_lost_runs_again(chained):
    chained.run("sft")
    weights = chained.layout.chained(chained.cell_id("sft", "naive"), 0)
    (weights / "tokenizer.json").unlink()
    assert chained.run("sft") == 0
    assert (weights / "tokenizer.json").exists()


def test_a_trial_by_hand_leaves_the_results_alone(chained, tmp_path):
    chained.run("sft")
    before = stamps(chained.layout.root)
    trial_file = chained.layout.logs(chained.cell_id("sft", "ddp"), 0) / "trial.json"
    assert run_single(trial_file, tmp_path / "mine" / "again.json", **FAKE) == 0
    assert stamps(chained.layout.root) == before
    again, first = load_record(tmp_path / "mine" / "again.json"), load_record(chained.record_path("sft", "ddp"))
    assert (again.outcome, again.fingerprint) == ("ok", first.fingerprint)
    assert (tmp_path / "mine" / "again-weights" / "tokenizer.json").exists()


def test_a_file_that_is_no_trial_is_the_users_mistake(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="not a trial file"):
        run_single(tmp_path / "x.json", tmp_path / "record.json")
    with pytest.raises(UserError, match="cannot be read"):
        run_single(tmp_path / "y.json", tmp_path / "record.json")
