"""Frozen models in host memory, whose layers visit the device, say what those on the device say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.models.build import build_policy, build_scorer
from bench.strategies.base import all_strategies
from bench.strategies.precision import frozen_copy
from bench.strategies.visiting import visiting_copy, visiting_parts
from tests.contract.strategy_work import make_cell, trial_of
from tests.trials import only, run_forked, tiny_cell, tiny_trial

CPU = torch.device("cpu")
MODELS = ["bloom-tiny", "gpt2-tiny", "opt-tiny", "llama-tiny", "qwen2-tiny", "mistral-tiny"]


def build(model: str, scorer: bool) -> Any:
    trial = trial_of(make_cell("naive", 1, model=model))
    return build_scorer(trial, fresh_head=True, source="policy") if scorer else build_policy(trial)


def outputs(module: Any) -> torch.Tensor:
    ids_BT = torch.arange(20).reshape(2, 10) + 5
    with torch.no_grad():
        output = module(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("scorer", [False, True])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16-master", "bf16-autocast"])
def test_it_computes_what_a_copy_on_the_device_computes(model: str, scorer: bool, precision: str) -> None:
    module = build(model, scorer)
    visiting, whole = visiting_copy(module, precision, CPU), frozen_copy(module, precision, CPU)
    assert torch.equal(outputs(visiting), outputs(whole))
    assert [(name, one.dtype) for name, one in visiting.named_parameters()] == [(name, one.dtype) for name, one in whole.named_parameters()]


@pytest.mark.parametrize("scorer", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_every_weight_belongs_to_a_part_and_parts_are_small(model: str, scorer: bool) -> None:
    module = build(model, scorer)
    held = [{id(one) for one in part.parameters()} for part in visiting_parts(module)]
    assert set.union(*held) == {id(one) for one in module.parameters()}
    assert len(held) >= 4


def test_weights_are_on_the_device_only_while_their_part_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no other device here, so what is watched is which part holds copies at the time a layer computes."""
    module = visiting_copy(build("bloom-tiny", scorer=False), "fp32", CPU)
    home = {name: one.data_ptr() for name, one in module.named_parameters()}
    original = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **named: original(self, *args, **named).clone())
    away: list[set[str]] = []

    def look(*_: Any) -> None:
        away.append({name for name, one in module.named_parameters() if one.data_ptr() != home[name]})

    for layer in module.transformer.h:
        layer.mlp.register_forward_hook(look)
    outputs(module)
    assert [{name.split(".h.")[1][0] for name in names} for names in away] == [{"0"}, {"1"}]
    assert {name: one.data_ptr() for name, one in module.named_parameters()} == home


def test_weights_go_home_after_a_forward_pass_that_fails() -> None:
    module = visiting_copy(build("bloom-tiny", scorer=False), "fp32", CPU)
    home = {name: one.data_ptr() for name, one in module.named_parameters()}
    with pytest.raises(IndexError):
        module(input_ids=torch.tensor([[9_999_999]]))
    assert {name: one.data_ptr() for name, one in module.named_parameters()} == home


def test_ppo_is_the_same_wherever_its_frozen_models_lie(tmp_path: Path) -> None:
    sizes = {"iterations": 2, "prompts_per_iteration": 8, "global_batch": 8, "prompt_length": 12, "response_length": 6,
             "reward_model": "fresh-head", "held_out_rows": 8}  # fmt: skip
    host, device = (
        only(run_forked(tiny_trial(tiny_cell("ppo", frozen_placement=place, **sizes), tmp_path / place))) for place in ("host", "device")
    )
    assert host.series == device.series
    assert host.held_out == device.held_out


def test_strategies_that_shard_frozen_models_say_why_they_cannot() -> None:
    sharding = [strategy for strategy in all_strategies().values() if "frozen" in strategy.sharded]
    assert sharding
    for strategy in sharding:
        cell = tiny_cell("ppo", strategy=strategy.name, processes_per_node=2, frozen_placement="host")
        assert strategy.missing() or "keeps frozen models in shards" in str(strategy.unsupported(cell))
