"""The contract of bench/strategies/base.py, for every strategy that is found: checkpoints, generation, several models at once."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from bench.strategies.base import all_strategies
from tests.contract.rank_harness import run_ranks
from tests.contract.strategy_work import (
    at_its_widest,
    comparable,
    generate,
    make_cell,
    round_trip,
    supported,
    tolerance,
    trained,
    two_engines,
    windowed,
    without_colossalai,
)
from tests.contract.test_resume import stop_and_go_on


@at_its_widest
@pytest.mark.parametrize("lora_rank", [0, 8])
@pytest.mark.parametrize("scorer", [False, True])
def test_the_full_state_survives_a_checkpoint(variant: str, ranks: int, lora_rank: int, scorer: bool, tmp_path: Any) -> None:
    precision = comparable(variant)
    cell = supported(variant, ranks, precision=precision, lora_rank=lora_rank)
    seen = run_ranks(round_trip, ranks, cell, scorer, str(tmp_path / "weights"))[0]
    assert seen["difference"] < (1e-5 if precision == "fp32" else 0.05)
    assert seen["learned"] > 0.1


@at_its_widest
@pytest.mark.parametrize("model", ["bloom-tiny", "llama-tiny", "gpt2-tiny"])
@pytest.mark.parametrize("lora_rank", [0, 8])
def test_generation_with_a_cache_is_that_without(variant: str, ranks: int, model: str, lora_rank: int) -> None:
    precision = comparable(variant)
    cell = supported(variant, ranks, precision=precision, model=model, lora_rank=lora_rank)
    if cell.settings.pipeline_parallel > 1:
        pytest.skip("pipelines do not generate")
    if lora_rank == 0 and cell.settings.tensor_parallel == 1:
        pytest.skip("without LoRA where there can be no adapters only")
    for rank in run_ranks(generate, ranks, cell):
        assert rank["difference"] < (1e-4 if precision == "fp32" else 0.05)
        assert rank["same"] or precision != "fp32"
        assert math.isfinite(rank["loss"])


@at_its_widest
def test_the_head_computes_the_positions_that_are_asked_for_only(variant: str, ranks: int) -> None:
    cell = supported(variant, ranks, precision=comparable(variant))
    if cell.settings.pipeline_parallel > 1:
        pytest.skip("a pipeline computes all logits")
    assert run_ranks(windowed, ranks, cell)[0][:2] == [4, 2]


@pytest.mark.parametrize(("variant", "lora_rank"), [("hybrid-tensor2", 0), ("hybrid-pipeline2", 0), ("hybrid-pipeline2", 4)])
def test_a_split_model_goes_on_exactly_where_it_was_saved(variant: str, lora_rank: int) -> None:
    for goes_on, again in run_ranks(stop_and_go_on, 2, supported(variant, 2, lora_rank=lora_rank)):
        assert again == goes_on


@at_its_widest
@pytest.mark.parametrize("lora_rank", [0, 8])
def test_a_policy_and_a_critic_train_side_by_side(variant: str, ranks: int, lora_rank: int) -> None:
    precision = comparable(variant)
    cell = supported(variant, ranks, precision=precision, lora_rank=lora_rank)
    if cell.settings.pipeline_parallel > 1:
        pytest.skip("pipelines are not for PPO")
    seen = run_ranks(two_engines, ranks, cell, 4)[0]
    naive = run_ranks(two_engines, 1, make_cell("naive", 1, precision=precision, lora_rank=lora_rank), 4)[0]
    assert seen["policy"] == pytest.approx(naive["policy"], rel=tolerance(variant))
    assert seen["critic"] == pytest.approx(naive["critic"], rel=20 * tolerance(variant))
    assert seen["critic"][-1] < seen["critic"][0]
    assert len(set(seen["reference"])) == 1


@pytest.mark.parametrize("strategy", sorted(name for name, kind in all_strategies().items() if kind.missing() is None))
def test_strategies_of_plain_torch_need_no_colossalai(strategy: str) -> None:
    kind = all_strategies()[strategy]
    cell = make_cell(strategy, 1, precision=comparable(strategy))
    assert kind.emulated(cell) == kind.uses_colossalai
    assert not kind.emulated(dataclasses.replace(cell, settings=dataclasses.replace(cell.settings, device="cuda")))
    if kind.uses_colossalai:
        with pytest.raises(AssertionError, match=r"ImportError|ModuleNotFoundError"):
            run_ranks(without_colossalai, 1, cell)
    else:
        assert run_ranks(without_colossalai, 1, cell)[0] == pytest.approx(trained(strategy, 1)["losses"][0])
