"""The same trial comes out the same however its batches are cut and over however many ranks they lie."""

from __future__ import annotations

import pytest

from bench.record import Part
from tests.trials import SIZES, only, run_forked, tiny_cell, tiny_trial

EQUAL = 1e-4
"""Largest relative deviation (below 1: absolute) of a series in fp32."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("equivalence")


@pytest.fixture(scope="module")
def whole(root):
    """One rank, one micro-step a step."""
    return {stage: run(root, stage, micro_batch=8) for stage in SIZES}


def run(root, stage, **changes) -> Part:
    cell = tiny_cell(stage, **{**SIZES[stage], "held_out_rows": 12, **changes})
    return only(run_forked(tiny_trial(cell, root / cell.cell_id)))


def deviation(part: Part, other: Part, names: tuple[str, ...]) -> float:
    pairs = [pair for name in names for pair in zip(part.series[name], other.series[name], strict=True)]
    pairs += [(part.held_out[name], other.held_out[name]) for name in other.held_out]
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)


def compared(stage: str) -> tuple[str, ...]:
    return ("loss", "gradient_norm") + (("reward", "kl", "entropy", "value_loss", "policy_loss", "ptx_loss") if stage == "ppo" else ())


@pytest.mark.parametrize("stage", SIZES)
def test_eight_micro_steps_of_one_equal_one_of_eight(root, whole, stage):
    assert deviation(run(root, stage, micro_batch=1), whole[stage], compared(stage)) < EQUAL


@pytest.mark.parametrize("micro_batch", [4, 1])
@pytest.mark.parametrize("stage", SIZES)
def test_two_ranks_equal_one(root, whole, stage, micro_batch):
    two = run(root, stage, strategy="ddp", nodes=2, micro_batch=micro_batch)
    assert deviation(two, whole[stage], compared(stage)) < EQUAL


@pytest.mark.parametrize("stage", SIZES)
def test_two_ranks_with_lora_equal_one(root, stage):
    one = run(root, stage, lora_rank=4, micro_batch=8)
    two = run(root, stage, lora_rank=4, micro_batch=4, strategy="ddp", nodes=1, processes_per_node=2)
    assert deviation(two, one, compared(stage)) < EQUAL
    assert two.facts["initial_weights_sha256"] == one.facts["initial_weights_sha256"]


def test_natural_responses_of_two_ranks_equal_those_of_one(root):
    one = run(root, "ppo", length="natural", micro_batch=8)
    two = run(root, "ppo", length="natural", micro_batch=4, strategy="ddp", nodes=2)
    assert deviation(two, one, (*compared("ppo"), "response_tokens")) < EQUAL


def test_weak_scaling_gives_every_rank_a_whole_global_batch(root):
    cell = tiny_cell("sft", **{**SIZES["sft"], "micro_batch": 8, "strategy": "ddp", "nodes": 2, "scaling": "weak"})
    parts = run_forked(tiny_trial(cell, root / "weak"))
    assert only(parts).series["loss"] == parts[1].series["loss"]
    assert [lap.counts["sequences"] for lap in parts[0].laps] == [8 * 4]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_the_old_mean_per_micro_batch_makes_accumulation_another_loss(root, stage):
    """What `coati-0.2.8` restores: micro-batches weigh alike however many loss tokens they have."""
    one, eight = (run(root, stage, semantics="coati-0.2.8", micro_batch=micro_batch) for micro_batch in (8, 1))
    name = "loss" if stage == "sft" else "ptx_loss"
    assert abs(one.series[name][0] - eight.series[name][0]) > 1e-3


FIRST_IN_16_BITS, PEERS_IN_16_BITS = 2e-2, 1e-3
"""Largest deviation of a first loss in 16 bits: from naive in fp32, and from another strategy in the same mode."""


@pytest.mark.parametrize("stage", SIZES)
def test_gemini_begins_as_naive_in_fp32_and_as_zero2_in_its_own_precision(root, whole, stage):
    """Also PPO, whose losses depend on what was sampled: rounding hardly changes a rollout."""
    gemini, zero2 = (run(root, stage, strategy=name, nodes=2, micro_batch=4, precision="bf16-master") for name in ("gemini", "zero2"))
    losses = [part.series["loss"] for part in (gemini, zero2, whole[stage])]
    scale = max(1.0, abs(losses[2][0]))
    assert abs(losses[0][0] - losses[2][0]) / scale < FIRST_IN_16_BITS
    assert abs(losses[0][0] - losses[1][0]) / scale < PEERS_IN_16_BITS
