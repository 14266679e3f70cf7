"""The stages on a GPU: the losses of the CPU, phases that account for the iteration, memory that was read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.record import Part, load_part
from bench.trial import save_trial
from tests.trials import only, tiny_cell, tiny_trial

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SIZES = {
    "sft": {"steps": 4, "global_batch": 8, "micro_batch": 4, "sequence_length": 64, "learning_rate": 1e-2},
    "rm": {"steps": 4, "global_batch": 8, "micro_batch": 4, "sequence_length": 64, "learning_rate": 5e-3},
    "ppo": {
        "iterations": 2, "prompts_per_iteration": 16, "global_batch": 16, "micro_batch": 8, "prompt_length": 16, "response_length": 8,
        "sequence_length": 64, "learning_rate": 1e-3, "ptx": "synthetic-instruct", "ptx_coef": 0.2, "lap_steps": 1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("stages-gpu")


def run(root: Path, stage: str, **changes) -> Part:
    """One rank in a process of its own: CUDA does not survive a fork."""
    cell = tiny_cell(stage, **{**SIZES[stage], "held_out_rows": 12, "device": "cuda", "launcher": "torchrun", **changes})
    trial = tiny_trial(cell, root / cell.cell_id)
    save_trial(trial, root / cell.cell_id / "trial.json")
    of_this_process = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in of_this_process} | {"PYTHONWARNINGS": "default"}
    line = [sys.executable, "-m", "bench.worker", str(root / cell.cell_id / "trial.json")]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return only([load_part(trial.part_path(0))])


@pytest.mark.parametrize("stage", SIZES)
def test_a_gpu_gives_the_losses_of_the_cpu(root, stage):
    cpu, gpu = run(root, stage, device="cpu"), run(root, stage)
    steps = 1 if stage == "ppo" else 4  # later ones learn from sampled tokens, of which rounding may flip one
    assert gpu.series["loss"][:steps] == pytest.approx(cpu.series["loss"][:steps], rel=1e-3, abs=1e-3)
    assert gpu.memory.peak_allocated_bytes > 1 << 20
    assert gpu.memory.peak_reserved_bytes >= gpu.memory.peak_allocated_bytes


@pytest.mark.parametrize("stage", SIZES)
def test_every_stage_trains_in_16_bits_with_fp32_masters(root, stage):
    part = run(root, stage, precision="bf16-master")
    assert part.laps
    assert part.held_out


def test_the_ratio_is_1_and_phases_add_up_on_a_gpu(root):
    part = run(root, "ppo", precision="bf16-master", ppo_epochs=2)
    assert max(part.series["first_ratio_error"]) < 0.05
    for lap in part.laps:
        assert sum(lap.phases.values()) <= lap.seconds * 1.01
    assert part.memory.phases_peak_allocated_bytes.keys() >= {"rollout_decode", "policy_learn", "critic_learn"}
    assert max(part.memory.phases_peak_allocated_bytes.values()) <= part.memory.peak_allocated_bytes
