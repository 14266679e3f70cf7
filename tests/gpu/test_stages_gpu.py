"""The stages on a GPU: the losses of the CPU, phases that account for the iteration, memory that was read."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.lone_rank import SIZES, run_stage

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("stages-gpu")


@pytest.mark.parametrize("stage", SIZES)
def test_a_gpu_gives_the_losses_of_the_cpu(root, stage):
    cpu, gpu = run_stage(root, stage, device="cpu"), run_stage(root, stage)
    steps = 1 if stage == "ppo" else 4  # later ones learn from sampled tokens, of which rounding may flip one
    assert gpu.series["loss"][:steps] == pytest.approx(cpu.series["loss"][:steps], rel=1e-3, abs=1e-3)
    assert gpu.memory.peak_allocated_bytes > 1 << 20
    assert gpu.memory.peak_reserved_bytes >= gpu.memory.peak_allocated_bytes


@pytest.mark.parametrize("stage", SIZES)
def test_every_stage_trains_in_16_bits_with_fp32_masters(root, stage):
    part = run_stage(root, stage, precision="bf16-master")
    assert part.laps
    assert part.held_out


def test_the_ratio_is_1_and_phases_add_up_on_a_gpu(root):
    part = run_stage(root, "ppo", precision="bf16-master", ppo_epochs=2)
    assert max(part.series["first_ratio_error"]) < 0.05
    for lap in part.laps:
        assert sum(lap.phases.values()) <= lap.seconds * 1.01
    assert part.memory.phases_peak_allocated_bytes.keys() >= {"rollout_decode", "policy_learn", "critic_learn"}
    assert max(part.memory.phases_peak_allocated_bytes.values()) <= part.memory.peak_allocated_bytes
