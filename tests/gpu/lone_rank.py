"""One rank in a process of its own on a GPU: CUDA does not survive a fork."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.cell import Cell
from bench.record import Part, load_part
from bench.trial import save_trial
from tests.trials import OF_A_GROUP, only, tiny_cell, tiny_trial

SIZES: dict[str, dict[str, Any]] = {
    "sft": {"steps": 4, "global_batch": 8, "micro_batch": 4, "sequence_length": 64, "learning_rate": 1e-2},
    "rm": {"steps": 4, "global_batch": 8, "micro_batch": 4, "sequence_length": 64, "learning_rate": 5e-3},
    "ppo": {
        "iterations": 2, "prompts_per_iteration": 16, "global_batch": 16, "micro_batch": 8, "prompt_length": 16, "response_length": 8,
        "sequence_length": 64, "learning_rate": 1e-3, "ptx": "synthetic-instruct", "ptx_coef": 0.2, "lap_steps": 1,
    },
}  # fmt: skip


def run_stage(root: Path, stage: str, **changes: Any) -> Part:
    """The part of a whole stage that went well."""
    sizes = {**SIZES[stage], "held_out_rows": 12, "device": "cuda", "launcher": "torchrun"}
    return only([run_cell(root, tiny_cell(stage, **{**sizes, **changes}))])


def run_cell(root: Path, cell: Cell) -> Part:
    """The part of a cell's only rank, whose files lie in `root`."""
    trial, file = tiny_trial(cell, root / cell.cell_id), root / cell.cell_id / "trial.json"
    save_trial(trial, file)
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_GROUP} | {"PYTHONWARNINGS": "default"}
    line = [sys.executable, "-m", "bench.worker", str(file)]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_part(trial.part_path(0))
