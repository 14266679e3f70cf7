"""Frozen models in 8 bits: what lies in int8, how near the outputs stay, and PPO with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.models.build import build_policy, build_scorer
from bench.strategies.base import all_strategies
from bench.strategies.precision import frozen_copy
from bench.strategies.quantised import quantised_copy
from tests.contract.strategy_work import make_cell, trial_of
from tests.trials import only, run_forked, tiny_cell, tiny_trial

CPU = torch.device("cpu")
SIZES = {
    "iterations": 2, "prompts_per_iteration": 8, "global_batch": 8, "micro_batch": 4, "prompt_length": 12, "response_length": 6,
    "reward_model": "fresh-head", "held_out_rows": 8, "learning_rate": 1e-3,
}  # fmt: skip


def build(model: str, *, scorer: bool = False) -> nn.Module:
    trial = trial_of(make_cell("naive", 1, model=model))
    return build_scorer(trial, fresh_head=True, source="policy") if scorer else build_policy(trial)


def logits(module: nn.Module) -> torch.Tensor:
    ids_BT = torch.randint(3, 4000, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        output = module(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
    return (output if isinstance(output, torch.Tensor) else output.logits).float()


@pytest.mark.parametrize("scorer", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16-master"])
@pytest.mark.parametrize("model", ["bloom-tiny", "llama-tiny", "gpt2-tiny"])
def test_outputs_are_near_those_of_16_bits_and_not_the_same(model: str, precision: str, scorer: bool) -> None:
    module = build(model, scorer=scorer)
    stored, small = frozen_copy(module, precision, CPU), quantised_copy(module, precision, CPU)
    error = (logits(small) - logits(stored)).abs().max() / logits(stored).abs().max()
    assert 0 < error < 0.05
    assert not small.training
    assert not any(parameter.requires_grad for parameter in small.parameters())


def test_linear_layers_are_int8_and_all_else_is_as_stored() -> None:
    module = build("bloom-tiny")
    small = quantised_copy(module, "bf16-master", CPU)
    types = {name: parameter.dtype for name, parameter in small.named_parameters()}
    assert {name.split(".")[-2] for name, dtype in types.items() if dtype == torch.int8} == {
        "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h",
    }  # fmt: skip
    assert types["transformer.word_embeddings.weight"] == torch.bfloat16
    layers = [
        sum(parameter.nbytes for parameter in one.transformer.h.parameters()) for one in (frozen_copy(module, "bf16-master", CPU), small)
    ]
    assert layers[1] < 0.55 * layers[0]
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


@pytest.mark.parametrize(("strategy", "ranks"), [("naive", 1), ("ddp", 2)])
def test_ppo_with_frozen_models_in_int8_is_near_that_with_stored_ones(strategy: str, ranks: int, tmp_path) -> None:
    parts = {}
    for weights in ("stored", "int8"):
        cell = tiny_cell("ppo", strategy=strategy, processes_per_node=ranks, frozen_weights=weights, **SIZES)
        parts[weights] = only(run_forked(tiny_trial(cell, tmp_path / weights)))
    small, stored = parts["int8"].series, parts["stored"].series
    assert small["reward"] == pytest.approx(stored["reward"], abs=0.05)
    assert small["reward"] != stored["reward"]
    assert small["entropy"][0] == stored["entropy"][0]


def test_what_shards_frozen_models_or_keeps_them_in_host_memory_is_skipped_with_the_reason() -> None:
    cell = tiny_cell("ppo", strategy="fsdp", processes_per_node=2, frozen_weights="int8")
    assert "`frozen_weights: stored`" in str(all_strategies()["fsdp"].unsupported(cell))
    cell = tiny_cell("ppo", strategy="ddp", frozen_weights="int8", frozen_placement="host")
    assert "`frozen_placement: device`" in str(all_strategies()["ddp"].unsupported(cell))
