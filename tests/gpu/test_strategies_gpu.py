"""Strategies on a real GPU, one rank, NCCL: the losses, norms and generation of naive, with no stand-in installed."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bench.strategies.base import all_strategies
from tests.contract.strategy_work import generate, make_cell, overflow, round_trip, train, two_engines

pytestmark = pytest.mark.gpu
STRATEGIES = sorted(all_strategies())
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


def cell(strategy: str, **changes: Any) -> Any:
    made = make_cell(strategy, 1, **{"precision": "bf16-master", "device": "cuda", **changes})
    reason = all_strategies()[strategy].unsupported(made)
    if reason:
        pytest.skip(reason)
    return made


@every_strategy
@pytest.mark.parametrize("model", ["bloom-tiny", "llama-tiny"])
@pytest.mark.parametrize("lora_rank", [0, 8])
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
@pytest.mark.parametrize("optimizer", ["adamw", "fused", "hybrid"])
@pytest.mark.parametrize("precision", ["fp32", "bf16-pure", "bf16-master"])
def test_every_optimizer_has_the_same_losses(strategy: str, optimizer: str, precision: str) -> None:
    losses = train(cell(strategy, optimizer=optimizer, precision=precision), 4)["losses"]
    assert losses == pytest.approx(train(cell("naive", optimizer="adamw", precision=precision), 4)["losses"], rel=2e-3)


@every_strategy
@pytest.mark.parametrize("model", ["bloom-tiny", "llama-tiny", "gpt2-tiny"])
def test_generation_with_a_cache_is_that_without(strategy: str, model: str) -> None:
    seen = generate(cell(strategy, model=model, lora_rank=8))
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
    seen = round_trip(cell(strategy, lora_rank=8), scorer, str(tmp_path / "weights"))
    assert seen["difference"] < 0.1 < seen["learned"]


@every_strategy
def test_activation_checkpointing_changes_no_loss(strategy: str) -> None:
    seen = train(cell(strategy, activation_checkpointing=True, lora_rank=8), 3)["losses"]
    assert seen == pytest.approx(train(cell(strategy, lora_rank=8), 3)["losses"], rel=1e-3)


@every_strategy
def test_a_step_that_overflows_fp16_is_skipped_and_says_so(strategy: str) -> None:
    seen = overflow(cell(strategy, precision="fp16-master"))
    assert seen["norm"] == math.inf
    assert seen["moved"] == 0.0
    assert math.isfinite(seen["next"][1])
