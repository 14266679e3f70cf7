"""The parts of the run verb: readiness, the run lock, what people see, and the headline."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from bench.errors import MachineError, UserError
from bench.launch import readiness, workflow
from bench.launch.follow import Follower
from bench.launch.progress import titles
from bench.launch.readiness import check_readiness, forget_unfinished
from bench.launch.runlock import hold
from bench.layout import Layout
from bench.matrix import Plan, expand
from bench.measure.host import look
from bench.record import write_json
from bench.suite import Known, check_suite

KNOWN = Known(strategies=("naive", "ddp", "zero2"), model_problem=lambda _: None, data_problem=lambda *_: None)


def plan_of(folder: Path, **settings: Any) -> Plan:
    content = {
        "suite": "tiny",
        "axes": {"stage": ["sft", "rm"], "model": ["bloom-tiny"], "strategy": ["naive", "ddp"], "nodes": [1, 2]},
        "settings": {"device": "cpu", **settings},
        "stages": {"sft": {"steps": 3}, "rm": {"steps": 3}},
    }
    return expand(check_suite(content, "tiny.yaml", KNOWN, folder), "tiny.yaml")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Set what this machine has."""
    seen = look(tmp_path)

    def has(**changes: Any) -> None:
        monkeypatch.setattr(readiness, "look", lambda _: dataclasses.replace(seen, **{"devices": [], "no_devices": "no driver", **changes}))

    return has


def test_a_cpu_suite_needs_no_device(machine: Any, tmp_path: Path) -> None:
    machine()
    check_readiness(plan_of(tmp_path), tmp_path)


def test_everything_that_is_missing_is_said_at_once(machine: Any, tmp_path: Path) -> None:
    machine(disk_free_bytes=1000, versions={"torch": "2.13.0+cpu", "cuda": None})
    with pytest.raises(MachineError) as error:
        check_readiness(plan_of(tmp_path, device="cuda"), tmp_path)
    text = str(error.value)
    assert "seen: none (no driver); needed: 2 NVIDIA devices" in text
    assert "torch must be a CUDA build; seen: 2.13.0+cpu" in text
    assert "weights and records need 1.0 GiB of disk; seen: 0.0 GiB free" in text
    assert "`coati-bench doctor`" in text


def test_too_few_devices_are_counted(machine: Any, tmp_path: Path) -> None:
    machine(devices=[{"name": "x"}], no_devices=None, versions={"torch": "2.11.0", "cuda": "13.0"})
    with pytest.raises(MachineError, match=r"seen: 1; needed: 2 NVIDIA devices"):
        check_readiness(plan_of(tmp_path, device="cuda"), tmp_path)


@pytest.mark.parametrize(
    ("image", "driver", "capability", "said"),
    [
        ("current", "550.54.15", "9.0", "the image current needs driver 580 or newer; seen: 550.54.15; `--container upstream` fits this"),
        ("current", "580.1", "7.0", "the image current has no code for Card; seen: compute capability 7.0; it has 7.5"),
        ("upstream", "470.1", "8.0", "the image upstream needs driver 525 or newer; seen: 470.1; no image fits this machine"),
        ("cpu", "580.1", "9.0", "the image cpu has torch's CPU build; its cells compute on CUDA devices"),
        ("current", "580.1", "9.0", None),
        ("upstream", "530.1", "9.0", None),
    ],
)
def test_an_image_that_cannot_use_the_devices_is_refused_before_it_is_built(
    machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str, driver: str, capability: str, said: str | None
) -> None:
    device = {"name": "Card", "driver": driver, "compute_capability": capability, "memory_bytes": 80 << 30}
    machine(devices=[device] * 2, no_devices=None, versions={"torch": "2.13.0+cpu", "cuda": None})
    monkeypatch.setattr(readiness, "_lacks_runtime", lambda _: [])
    plan = plan_of(tmp_path, device="cuda", container=image)
    if said is None:
        check_readiness(plan, tmp_path)
    else:
        with pytest.raises(MachineError) as error:
            check_readiness(plan, tmp_path)
        assert said in str(error.value)


def test_a_model_larger_than_the_memory_is_refused(machine: Any, tmp_path: Path) -> None:
    machine(memory_bytes=1 << 20)
    with pytest.raises(MachineError, match=r"the states of its largest CPU cell need"):
        check_readiness(plan_of(tmp_path), tmp_path)


def finish(plan: Plan, layout: Layout, *, without: str = "") -> None:
    """Make the files of a finished run, all but the block `without`."""
    for name in plan.data:
        (layout.root / name).write_bytes(b"rows")
        write_json(
            {"name": name, "path": str(layout.root / name), "sha256": "0" * 64, "sha256_status": "generated", "bytes": 4,
             "kind": "instruct", "rows": 1, "licence": "none", "source": "synthetic:", "fetched": "2026-01-01T00:00:00Z"},
            layout.data(name),
        )  # fmt: skip
    for warm in plan.warm:
        (layout.warm(warm.key) / "weights").mkdir(parents=True)
        write_json({"key": warm.key, "outcome": "ok", "reason": None}, layout.warm(warm.key) / "done.json")
    for block in plan.blocks:
        records = [{"cell_id": cell_id, "outcome": "ok"} for cell_id in block.cells]
        for cell_id in block.cells:
            write_json({}, layout.record(cell_id, block.trial))
        if block.block_id != without:
            write_json({"records": records}, layout.block(block.block_id))


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Plan, Layout]:
    return plan_of(tmp_path), Layout(tmp_path)


def test_a_finished_run_is_left_alone(tiny: tuple[Plan, Layout]) -> None:
    finish(*tiny)
    assert forget_unfinished(*tiny) == []


def test_a_block_whose_record_is_gone_runs_again(tiny: tuple[Plan, Layout]) -> None:
    plan, layout = tiny
    finish(plan, layout)
    block = plan.blocks[0]
    layout.record(block.cells[0], block.trial).unlink()
    assert forget_unfinished(plan, layout) == [f"records of block {block.block_id} are gone; it runs again"]
    assert [found.block_id for found in plan.blocks if not layout.block(found.block_id).exists()] == [block.block_id]


def test_a_failed_warm_start_is_made_again_only_when_a_block_still_needs_it(tiny: tuple[Plan, Layout]) -> None:
    plan, layout = tiny
    key = next(warm.key for warm in plan.warm if warm.cell)
    rm_block = next(block.block_id for block in plan.blocks if block.stage == "rm")
    finish(plan, layout)
    write_json({"key": key, "outcome": "oom", "reason": "too large"}, layout.warm(key) / "done.json")
    assert forget_unfinished(plan, layout) == []
    layout.block(rm_block).unlink()
    assert forget_unfinished(plan, layout) == [f"warm start {key} ended as oom; it is made again"]


def test_a_lost_tokenizer_is_made_again_for_what_begins_from_what_begins_from_it(tiny: tuple[Plan, Layout]) -> None:
    plan, layout = tiny
    tokenizer = next(warm.key for warm in plan.warm if warm.tokenizer)
    finish(plan, layout, without=next(block.block_id for block in plan.blocks if block.stage == "rm"))
    (layout.warm(tokenizer) / "weights").rmdir()
    assert forget_unfinished(plan, layout) == [f"warm start {tokenizer} lost its weights; it is made again"]


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(b"other rows")])
def test_data_that_is_no_longer_there_is_fetched_again_for_a_block_that_needs_it(tiny: tuple[Plan, Layout], change: Any) -> None:
    plan, layout = tiny
    finish(plan, layout, without=next(block.block_id for block in plan.blocks if block.stage == "sft"))
    change(layout.root / "synthetic-instruct")
    change(layout.root / "synthetic-pairs")  # only the finished blocks read it
    assert forget_unfinished(plan, layout) == ["data synthetic-instruct is no longer where it was; it is fetched again"]


def hold_and_die(root: Path, ready: Any) -> None:
    with hold(root):
        ready.set()
        os._exit(9)


def test_a_lock_whose_owner_was_killed_is_taken_and_known_to_be_stale(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold_and_die, args=(tmp_path, ready))
    process.start()
    assert ready.wait(30)
    process.join()
    with hold(tmp_path) as held:
        assert held.was_killed
    with hold(tmp_path) as held:
        assert not held.was_killed


def test_a_lock_of_a_living_process_is_respected_and_its_owner_named(tmp_path: Path) -> None:
    with hold(tmp_path), pytest.raises(MachineError, match=rf"is being run already; seen: process {os.getpid()} on"), hold(tmp_path):
        pass


def test_a_dead_owners_guard_is_waited_for(tmp_path: Path) -> None:
    with hold(tmp_path) as held:
        os.ftruncate(held.descriptor, 0)
        owner = {"pid": 2**22 + 1, "started": 0.0, "host": __import__("socket").gethostname(), "since": "yesterday"}
        os.pwrite(held.descriptor, json.dumps(owner).encode(), 0)
        with pytest.raises(MachineError, match="seen: process 4194305 on"), hold(tmp_path, patience=0.5):
            pass


def test_a_follower_says_each_thing_once_and_what_runs_after_a_silence(tiny: tuple[Plan, Layout]) -> None:
    plan, layout = tiny
    said: list[str] = []
    follower = Follower(plan, layout, said.append, quiet=0.0)
    assert follower.recorded_text() == "no trial has a record yet"
    cell_id = plan.blocks[0].cells[0]
    write_json({"phase": "train", "step": 2}, layout.logs(cell_id, 0) / "heartbeat0.json")
    follower.look()
    assert said.pop().startswith(f"... 0 of {follower.planned} after 0.0 min; running: sft bloom-tiny")
    follower = Follower(plan, layout, said.append)
    write_json({"name": "x"}, layout.data("synthetic-instruct"))
    write_json({"key": plan.warm[0].key, "outcome": "error", "reason": "no rows\nat all"}, layout.warm(plan.warm[0].key) / "done.json")
    follower.look()
    os.utime(layout.data("synthetic-instruct"))
    follower.look()
    assert said == ["data synthetic-instruct: ready", f"warm start {plan.warm[0].key}: error: no rows"]


def test_lines_of_cells_that_are_named_alike_say_in_what_they_differ(tmp_path: Path) -> None:
    one = {"stage": "sft", "model": "bloom-tiny", "strategy": "naive"}
    content = {
        "suite": "alike",
        "axes": {"stage": ["sft"], "model": ["bloom-tiny"], "strategy": ["ddp"], "nodes": [2]},
        "include": [one | {"settings": {"optimizer": name}} for name in ("adamw", "foreach")],
        "settings": {"device": "cpu"},
        "stages": {"sft": {"steps": 3}},
    }
    plan = expand(check_suite(content, "alike.yaml", KNOWN, tmp_path), "alike.yaml")
    naive = "sft bloom-tiny naive full 1x1"
    assert sorted(titles(plan).values()) == ["sft bloom-tiny ddp full 2x1", f"{naive}, optimizer adamw", f"{naive}, optimizer foreach"]


def test_an_unreadable_record_is_said_and_counted(tiny: tuple[Plan, Layout]) -> None:
    plan, layout = tiny
    said: list[str] = []
    follower = Follower(plan, layout, said.append)
    write_json({"schema": "other"}, layout.record(plan.blocks[0].cells[0], 0))
    follower.look()
    assert said[0].startswith(f"[1/{follower.planned}] sft bloom-tiny")
    assert "not a record" in said[0]
    assert follower.outcomes() == {"unreadable": 1}


def test_the_headline_is_the_plain_text_above_the_first_table(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("# tiny\n\nAll 2 trials \\*really\\* ended ok\\.\n\nNo claim.\n\n| a |\n", encoding="utf-8")
    assert workflow.headline(tmp_path / "report.md") == ["All 2 trials *really* ended ok.", "No claim."]


def test_an_unknown_profile_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--profile cray: there is no such profile; choose among local"):
        workflow._check_installation("cray", tmp_path)


def test_results_in_a_folder_that_snakemake_takes_for_wildcards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="braces"):
        workflow._check_installation("local", tmp_path / "{x}" / "tiny")


def test_results_in_a_folder_whose_name_is_no_text_are_refused() -> None:
    with pytest.raises(UserError, match=r"--results '\\udcff/res': a name that is no UTF-8"):
        workflow._check_installation("local", Path("\udcff/res/tiny"))


def test_a_file_in_the_place_of_the_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file", encoding="utf-8")
    with pytest.raises(UserError, match=r"--results .*results: a file is there; name a folder"):
        workflow._check_installation("local", tmp_path / "results" / "tiny")
