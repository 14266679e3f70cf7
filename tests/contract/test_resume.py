"""A trial that is killed and run again goes on where it last saved, with the very losses of one that ran in one go."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.errors import CheckpointError
from bench.launch.parent import ForkParent
from bench.launch.rank import read_process
from bench.launch.supervise import run_trial
from bench.matrix import impossible
from bench.record import Part, Record
from bench.report import registry as metrics
from bench.report.inventory import Row
from bench.saves import drop_saves, saves_folder
from bench.strategies.base import Engine, all_strategies
from bench.trial import Trial, make_trial
from bench.weights_file import tensor_digest
from tests.contract.rank_harness import run_ranks
from tests.contract.strategy_work import VARIANTS, comparable, kind_of, make_cell, make_engine, one_step, token_loss, variants
from tests.trials import only, run_forked, start_ranks, tiny_cell, tiny_trial

STAGES: dict[str, dict[str, Any]] = {
    "sft": {"steps": 6, "sequence_length": 48, "learning_rate": 1e-2},
    "rm": {"steps": 6, "sequence_length": 32, "learning_rate": 2e-3},
    "ppo": {
        "iterations": 2, "prompts_per_iteration": 16, "global_batch": 8, "micro_batch": 4, "prompt_length": 12, "response_length": 6,
        "learning_rate": 1e-3, "ptx": "synthetic-instruct", "ptx_coef": 0.1, "sequence_length": 48, "reward_model": "fresh-head",
    },
}  # fmt: skip


def resumable_cell(stage: str, variant: str, ranks: int, **changes: Any) -> Any:
    settings = {
        "processes_per_node": ranks,
        "lap_steps": 1,
        "save_every": 1 if stage == "ppo" else 2,
        **STAGES[stage],
        **variants()[variant],
    }
    return tiny_cell(stage, **{**settings, "global_batch": settings.get("global_batch", 16), **changes})


def kill_after_the_first_save(trial: Trial) -> int:
    """Start the ranks of `trial`, end them with SIGKILL once a save is there; return the step of that save."""
    pids = start_ranks(trial)
    try:
        deadline = time.monotonic() + 60
        while not complete_saves(trial):
            assert time.monotonic() < deadline, "no save within a minute"
            time.sleep(0.002)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
    assert not any(trial.part_path(rank).exists() for rank in range(len(pids))), "the ranks were done before they were killed"
    return max(complete_saves(trial))


def complete_saves(trial: Trial) -> list[int]:
    return [int(path.name.removeprefix("step")) for path in saves_folder(trial).glob("step*[0-9]")]


def losses(part: Part) -> dict[str, Any]:
    """All that must not depend on whether the trial was stopped."""
    laps = [(lap.first_step, lap.steps, lap.counts) for lap in part.laps]
    return {"series": part.series, "held_out": part.held_out, "laps": laps, "non_finite": part.facts.get("non_finite")}


TRIALS = [
    ("sft", "naive", 0), ("rm", "naive", 0), ("ppo", "naive", 0), ("sft", "ddp", 0), ("sft", "zero1", 0), ("ppo", "zero2", 0),
    ("sft", "zero2_cpu", 4), ("rm", "gemini", 0), ("sft", "fsdp", 0), ("rm", "fsdp", 4), ("rm", "hybrid-tensor2", 0),
    ("sft", "hybrid-pipeline2", 0), ("ppo", "deepspeed_zero3", 0), ("sft", "deepspeed_zero2", 0), ("rm", "fabric", 0),
]  # fmt: skip
"""Stage, variant and LoRA rank: every stage, and every way of laying out a model; the test of engines below holds for all variants."""


@pytest.mark.parametrize(("stage", "variant", "lora_rank"), TRIALS)
def test_a_killed_trial_goes_on_with_an_identical_loss_curve(stage: str, variant: str, lora_rank: int, tmp_path: Path) -> None:
    cell = resumable_cell(stage, variant, 1 if variant == "naive" else 2, precision=comparable(variant), lora_rank=lora_rank)
    if reason := impossible(cell):
        pytest.skip(reason)
    wanted = run_forked(tiny_trial(cell, tmp_path / "whole"))
    stopped = tiny_trial(cell, tmp_path / "stopped")
    step = kill_after_the_first_save(stopped)
    parts = run_forked(stopped)
    for part, other in zip(parts, wanted, strict=True):
        assert part.outcome == other.outcome == "ok", part.reason or other.reason
        assert part.resumed_step == step > 0
        assert other.resumed_step is None
        assert losses(part) == losses(other)


def test_a_save_of_another_trial_or_half_of_one_is_not_taken_up(tmp_path: Path) -> None:
    cell = resumable_cell("sft", "naive", 1)
    other = tiny_trial(cell, tmp_path / "trial", trial=1)
    kill_after_the_first_save(other)
    mine = tiny_trial(cell, tmp_path / "trial")
    (saves_folder(mine) / "step4.draft").mkdir()
    part = only(run_forked(mine))
    assert part.resumed_step is None
    assert mine.log_path(0).read_text().count("not a complete save of this trial; removed") == 2
    assert [path.name for path in saves_folder(mine).iterdir()] == ["step4"]


def test_a_save_that_cannot_be_read_is_told_with_what_to_do(tmp_path: Path) -> None:
    trial = tiny_trial(resumable_cell("sft", "naive", 1), tmp_path / "trial")
    step = kill_after_the_first_save(trial)
    (saves_folder(trial) / f"step{step}" / "rank0.pt").write_bytes(b"torn")
    (part,) = run_forked(trial)
    assert part.outcome == "error"
    assert "rank0.pt: no training state" in str(part.reason)
    assert "to begin at the first step, would be right" in str(part.reason)


# -- engines ---------------------------------------------------------------------------------------------------------


def engine_cells() -> list[Any]:
    """Every variant in its best precision mode; and with a loss scale and adapters beside frozen weights."""
    wanted: list[tuple[str, dict[str, Any]]] = [(variant, {"precision": comparable(variant)}) for variant in VARIANTS]
    wanted += [(variant, {"precision": "fp16-master", "lora_rank": 4}) for variant in VARIANTS]
    cells = [(variant, make_cell(variant, 1 if variant == "naive" else 2, **changes)) for variant, changes in wanted]
    return [
        pytest.param(cell, id=f"{variant}-{cell.settings.precision}-lora{cell.lora_rank}")
        for variant, cell in cells
        if kind_of(variant).resumable and impossible(cell) is None
    ]


@pytest.mark.parametrize("cell", engine_cells())
def test_a_fresh_engine_goes_on_exactly_where_a_saved_one_was(cell: Any) -> None:
    for goes_on, again in run_ranks(stop_and_go_on, cell.world_size, cell):
        assert again == goes_on
        assert goes_on[-1] != goes_on[0]


def stop_and_go_on(cell: Any) -> tuple[list[Any], list[Any]]:
    """Losses, norms and final weights after a save: those of the engine that was saved, and of a fresh one that took it up."""
    _, engine, _ = make_engine(cell)
    for _ in range(3):
        one_step(engine, cell)
    file = io.BytesIO()
    torch.save(engine.training_state(), file)
    goes_on = [one_step(engine, cell) for _ in range(3)]
    _, fresh, _ = make_engine(cell)
    fresh.load_training_state(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    again = [one_step(fresh, cell) for _ in range(3)]
    return [*goes_on, weights(engine)], [*again, weights(fresh)]


@pytest.mark.parametrize("strategy", ["naive", "ddp", "fsdp", "fsdp_grad_op", "zero2", "hybrid"])
def test_a_loss_scale_that_overflows_have_lowered_goes_on(strategy: str) -> None:
    cell = make_cell(strategy, 1 if strategy == "naive" else 2, precision="fp16-master")
    if reason := impossible(cell):
        pytest.skip(reason)
    for goes_on, again in run_ranks(overflow_and_go_on, cell.world_size, cell):
        assert again == goes_on


def overflow_and_go_on(cell: Any) -> tuple[list[Any], list[Any]]:
    """As `stop_and_go_on`, after overflows that halved the scale more than once, of gradients that only the halved one keeps finite."""
    _, engine, _ = make_engine(cell)
    for times in (1e6, 1e6, 1e6, 1e6, 1.0):
        one_step(engine, cell, lambda module, ids_BT, times=times: token_loss(module, ids_BT) * times)
    file = io.BytesIO()
    torch.save(engine.training_state(), file)
    _, fresh, _ = make_engine(cell)
    fresh.load_training_state(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    goes_on, again = ([one_step(one, cell, steep) for _ in range(2)] for one in (engine, fresh))
    return [*goes_on, weights(engine)], [*again, weights(fresh)]


def steep(module: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    return token_loss(module, ids_BT) * 8


def weights(engine: Engine) -> str | None:
    state = engine.full_state()
    return None if state is None else tensor_digest(state.items())


def test_a_strategy_that_cannot_save_is_skipped_at_planning_where_saves_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = all_strategies()["ddp"]
    monkeypatch.setattr(type(strategy), "resumable", False)
    assert strategy.unsupported(make_cell("ddp", 2)) is None
    assert "ddp cannot save its training state" in str(strategy.unsupported(make_cell("ddp", 2, save_every=5)))


def test_a_state_of_another_model_is_refused() -> None:
    assert run_ranks(take_up_another, 1, make_cell("naive", 1)) == [True]


def take_up_another(cell: Any) -> bool:
    _, engine, _ = make_engine(cell)
    _, other, _ = make_engine(make_cell("naive", 1, model="llama-tiny"))
    with pytest.raises(CheckpointError, match=r"of another model or strategy; seen: .* would be right"):
        engine.load_training_state(other.training_state())
    return True


@pytest.mark.parametrize(
    ("outcome", "kept"), [("ok", False), ("diverged", False), ("invalid", False), ("cancelled", True), ("error", True)]
)
def test_saves_are_dropped_when_nobody_goes_on_with_them(outcome: Any, kept: bool, tmp_path: Path) -> None:
    trial = make_trial(make_cell("naive", 1), 0, work=str(tmp_path / "work"))
    (saves_folder(trial) / "step3").mkdir(parents=True)
    drop_saves(trial, outcome)
    assert saves_folder(trial).exists() is kept


# -- records ---------------------------------------------------------------------------------------------------------


def test_the_record_of_a_trial_that_went_on_says_so_and_claims_no_time(tmp_path: Path) -> None:
    """Supervised, as a suite runs it: the rank is killed, the trial is repeated, and its saves are gone at the end."""
    trial = tiny_trial(resumable_cell("sft", "naive", 1, steps=40), tmp_path / "trial")
    with ForkParent(tmp_path / "parent.log") as parent:
        killer = threading.Thread(target=kill_rank_after_the_first_save, args=(trial,))
        killer.start()
        killed = run_trial(trial, tmp_path / "killed.json", parent=parent)
        killer.join()
        assert killed.outcome == "error"
        assert "SIGKILL" in str(killed.reason)
        record = run_trial(trial, tmp_path / "record.json", parent=parent)
    whole = only(run_forked(tiny_trial(resumable_cell("sft", "naive", 1, steps=40), tmp_path / "whole")))
    assert (record.outcome, killed.resumed_step) == ("ok", None)
    assert record.resumed_step is not None
    assert f"resumed: step {record.resumed_step}" in record.flags
    assert losses(record.parts[0]) == losses(whole)
    assert not saves_folder(trial).exists()
    assert metrics.Trial(Row(measured(record), trial.parsed_cell, "record.json")).clock_problem == "the trial was stopped and went on later"


def kill_rank_after_the_first_save(trial: Trial) -> None:
    deadline = time.monotonic() + 60
    while not complete_saves(trial) and time.monotonic() < deadline:
        time.sleep(0.002)
    note = read_process(Path(trial.work), 0)
    assert note is not None
    os.kill(note.pid, signal.SIGKILL)


def measured(record: Record) -> Record:
    """The same record, had torchrun started it: nothing else speaks against its clock."""
    return dataclasses.replace(record, launcher="torchrun")
