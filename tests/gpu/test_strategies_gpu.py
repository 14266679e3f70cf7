"""Strategies on a real GPU, one rank, NCCL: the losses, norms and generation of naive, with no stand-in installed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bench.strategies.base import all_strategies
from bench.strategies.training_state import innermost
from tests.contract.strategy_work import generate, make_cell, make_engine, one_step, overflow, round_trip, train, two_engines
from tests.gpu.lone_rank import run_stage

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("group")]
STRATEGIES = sorted(name for name, kind in all_strategies().items() if kind.missing() is None)
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def cell(strategy: str, **changes: Any) -> Any:
    made = make_cell(strategy, 1, **{"precision": "bf16-master", "device": "cuda", **changes})
    reason = all_strategies()[strategy].unsupported(made)
    if reason:
        pytest.skip(reason)
    return made


@every_strategy
@pytest.mark.parametrize("model", ["bloom-tiny", "llama-tiny"])
@pytest.mark.parametrize("lora_rank", [0, 16])
@pytest.mark.parametrize("micro_batch", [2, 8])
def test_losses_and_norms_are_those_of_naive(strategy: str, model: str, lora_rank: int, micro_batch: int) -> None:
    changes = {"model": model, "lora_rank": lora_rank, "micro_batch": micro_batch}
    seen, naive = train(cell(strategy, **changes), 6), train(cell("naive", **changes), 6)
    assert seen["losses"] == pytest.approx(naive["losses"], rel=1e-3)
    assert seen["norms"] == pytest.approx(naive["norms"], rel=1e-2)
    assert seen["losses"][-1] < seen["losses"][0]


@every_strategy
@pytest.mark.parametrize("precision", ["fp32", "bf16-pure", "bf16-autocast", "fp16-master"])
def test_a_precision_mode_trains(strategy: str, precision: str) -> None:
    losses = train(cell(strategy, precision=precision), 4)["losses"]
    assert losses == pytest.approx(train(cell("naive", precision="fp32"), 4)["losses"], rel=1e-2)


@every_strategy
@pytest.mark.parametrize("optimizer", ["adamw", "foreach", "fused", "hybrid"])
@pytest.mark.parametrize("precision", ["fp32", "bf16-pure", "bf16-master"])
def test_every_optimizer_has_the_same_losses(strategy: str, optimizer: str, precision: str) -> None:
    losses = train(cell(strategy, optimizer=optimizer, precision=precision), 4)["losses"]
    assert losses == pytest.approx(train(cell("naive", optimizer="adamw", precision=precision), 4)["losses"], rel=2e-3)


@every_strategy
@pytest.mark.parametrize("model", ["bloom-tiny", "llama-tiny", "gpt2-tiny"])
def test_generation_with_a_cache_is_that_without(strategy: str, model: str) -> None:
    seen = generate(cell(strategy, model=model, lora_rank=16))
    assert seen["difference"] < 0.1
    assert math.isfinite(seen["loss"])


@every_strategy
def test_a_policy_and_a_critic_train_side_by_side(strategy: str) -> None:
    seen, naive = two_engines(cell(strategy), 4), two_engines(cell("naive"), 4)
    assert seen["policy"] == pytest.approx(naive["policy"], rel=1e-3)
    assert seen["critic"] == pytest.approx(naive["critic"], rel=2e-2)


@every_strategy
@pytest.mark.parametrize("scorer", [False, True])
def test_the_full_state_survives_a_checkpoint(strategy: str, scorer: bool, tmp_path: Any) -> None:
    seen = round_trip(cell(strategy, lora_rank=16), scorer, str(tmp_path / "weights"))
    assert seen["difference"] < 0.1 < seen["learned"]


@every_strategy
def test_activation_checkpointing_changes_no_loss(strategy: str) -> None:
    seen = train(cell(strategy, activation_checkpointing=True, lora_rank=16), 3)["losses"]
    assert seen == pytest.approx(train(cell(strategy, lora_rank=16), 3)["losses"], rel=1e-3)


@every_strategy
def test_a_step_that_overflows_fp16_is_skipped_and_says_so(strategy: str) -> None:
    seen = overflow(cell(strategy, precision="fp16-master"))
    assert seen["norm"] == math.inf
    assert max(seen["moved"].values()) == 0.0
    assert math.isfinite(seen["next"][1])


@every_strategy
def test_optimizer_states_lie_where_the_strategy_says(strategy: str) -> None:
    made = cell(strategy)
    _, engine, _ = make_engine(made)
    one_step(engine, made)
    states = innermost(engine._optimizer).state.values()
    found = {tensor.device.type for state in states for tensor in state.values() if torch.is_tensor(tensor) and tensor.numel() > 1}
    assert found == {"cpu" if "optimizer" in all_strategies()[strategy].offloaded else "cuda"}


@every_strategy
@pytest.mark.parametrize("lora_rank", [0, 16])
def test_a_whole_stage_is_that_of_naive_and_evidence_agrees(strategy: str, lora_rank: int, tmp_path: Any) -> None:
    cell(strategy, lora_rank=lora_rank)
    seen, naive = (run_stage(tmp_path, "sft", strategy=kind, lora_rank=lora_rank, precision="bf16-master") for kind in (strategy, "naive"))
    assert seen.outcome == "ok", seen.reason
    assert seen.series["loss"] == pytest.approx(naive.series["loss"], rel=5e-3)
    assert seen.held_out["loss_after"] == pytest.approx(naive.held_out["loss_after"], rel=5e-3)


@every_strategy
def test_rollouts_and_two_trained_models_work_in_a_whole_stage(strategy: str, tmp_path: Any) -> None:
    """PPO generates before anything has learned, which automatic placement of chunks does not expect."""
    cell(strategy, stage="sft")
    part = run_stage(tmp_path, "ppo", strategy=strategy, precision="bf16-master")
    assert part.outcome == "ok", part.reason
    assert all(math.isfinite(value) for value in part.series["loss"])
