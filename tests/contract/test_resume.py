"""A trial that is killed and run again goes on where it last saved, with the very losses of one that ran in one go."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from bench.record import Part
from bench.saves import saves_folder
from bench.strategies.base import all_strategies
from bench.strategies.colossal import import_colossalai
from bench.trial import Trial
from tests.trials import run_forked, start_ranks, tiny_cell, tiny_trial

import_colossalai()

STAGES: dict[str, dict[str, Any]] = {
    "sft": {"steps": 12, "sequence_length": 48, "learning_rate": 1e-2},
    "rm": {"steps": 12, "sequence_length": 32, "learning_rate": 2e-3},
    "ppo": {
        "iterations": 6, "prompts_per_iteration": 16, "global_batch": 8, "micro_batch": 4, "prompt_length": 12, "response_length": 6,
        "learning_rate": 1e-3, "ptx": "synthetic-instruct", "ptx_coef": 0.1, "sequence_length": 48, "reward_model": "fresh-head",
    },
}  # fmt: skip
EVERY = {"sft": 4, "rm": 4, "ppo": 2}


def resumable_cell(stage: str, strategy: str, ranks: int, **changes: Any) -> Any:
    settings = {"strategy": strategy, "processes_per_node": ranks, "lap_steps": 2, "save_every": EVERY[stage], **STAGES[stage]}
    return tiny_cell(stage, **{**settings, "global_batch": settings.get("global_batch", 16), **changes})


def kill_after_the_first_save(trial: Trial) -> int:
    """Start the ranks of `trial`, end them with SIGKILL once a save is there; return the step of that save."""
    pids = start_ranks(trial)
    try:
        found: list[Path] = []
        deadline = time.monotonic() + 60
        while not found:
            assert time.monotonic() < deadline, "no save within a minute"
            time.sleep(0.002)
            found = [path for path in saves_folder(trial).glob("step*") if path.suffix != ".draft"]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
    assert not any(trial.part_path(rank).exists() for rank in range(len(pids))), "the ranks were done before they were killed"
    return max(int(path.name.removeprefix("step")) for path in saves_folder(trial).glob("step*[0-9]"))


def losses(part: Part) -> dict[str, Any]:
    """All that must not depend on whether the trial was stopped."""
    laps = [(lap.first_step, lap.steps, lap.counts) for lap in part.laps]
    return {"series": part.series, "held_out": part.held_out, "laps": laps, "non_finite": part.facts.get("non_finite")}


def combinations() -> list[Any]:
    found = []
    for name, strategy in all_strategies().items():
        for stage in STAGES:
            for ranks in (1, 2):
                cell = resumable_cell(stage, name, ranks, precision="fp32" if "fp32" in strategy.precisions else "bf16-master")
                if strategy.unsupported(cell) is None and (ranks == 2 or name == "naive"):
                    found.append(pytest.param(cell, id=f"{stage}-{name}-{ranks}"))
    return found


@pytest.mark.parametrize("cell", combinations())
def test_a_killed_trial_goes_on_with_an_identical_loss_curve(cell: Any, tmp_path: Path) -> None:
    whole = tiny_trial(cell, tmp_path / "whole")
    wanted = run_forked(whole)
    stopped = tiny_trial(cell, tmp_path / "stopped")
    step = kill_after_the_first_save(stopped)
    parts = run_forked(stopped)
    for part, other in zip(parts, wanted, strict=True):
        assert part.outcome == other.outcome == "ok", part.reason or other.reason
        assert part.resumed_step == step > 0
        assert other.resumed_step is None
        assert losses(part) == losses(other)
