"""Strategies that send the first rank's weights: the others build models without any, and hold the first rank's afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bench.cell import Cell
from bench.models.build import add_lora, build_policy, build_scorer, initial_sha256
from bench.strategies.base import all_strategies
from tests.contract.rank_harness import run_ranks
from tests.contract.strategy_work import LEARNING_RATE, device_of, make_cell, shapes_here, trial_of

SENDING = [name for name, kind in all_strategies().items() if kind.shapes_suffice(make_cell(name, 2), 1)]
MODELS = ["bloom-tiny", "llama-tiny", "gpt2-tiny", "opt-tiny"]


def build(cell: Cell, *, scorer: bool, shapes: bool) -> nn.Module:
    trial = trial_of(cell)
    return build_scorer(trial, fresh_head=True, source="policy", shapes=shapes) if scorer else build_policy(trial, shapes=shapes)


def laid_out(cell: Cell, scorer: bool) -> tuple[bool, Any, Any]:
    """Whether this rank's model had no weights before it was laid out; the trained one's state after; the frozen one's output."""
    strategy = all_strategies()[cell.strategy]
    strategy.start(cell, device_of(cell))
    module, frozen = (build(cell, scorer=scorer, shapes=shapes_here(cell)) for _ in range(2))
    add_lora(module, cell, seed=7)
    bare = all(tensor.is_meta for name, tensor in module.named_parameters() if "lora_" not in name) and initial_sha256(module) is None
    engine = strategy.prepare(module, cell, device_of(cell), learning_rate=LEARNING_RATE)
    bare = bare and not any(tensor.is_meta for tensor in anywhere(engine.module))
    state = engine.full_state()
    return (
        bare,
        state and {name: tensor.tolist() for name, tensor in state.items()},
        _output(strategy.place_frozen(frozen, cell, device_of(cell))),
    )


def anywhere(module: nn.Module) -> list[torch.Tensor]:
    """Every tensor of a model, those included that are plain attributes (LLaMA's `original_inv_freq`)."""
    plain = [value for part in module.modules() for value in vars(part).values() if torch.is_tensor(value)]
    return [*module.parameters(), *module.buffers(), *plain]


def _output(module: Any) -> list[float]:
    ids_BT = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        output = module(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
    return (output if torch.is_tensor(output) else output.logits[:, :, :16]).flatten().tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("scorer", [False, True])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", SENDING)
def test_ranks_without_weights_have_those_of_the_first_once_the_model_is_laid_out(name: str, model: str, scorer: bool) -> None:
    cell = make_cell(name, 2, model=model, lora_rank=8 if scorer else 0)
    whole = build(cell, scorer=scorer, shapes=False)
    wanted = _output(whole.eval())
    add_lora(whole, cell, seed=7)
    (first_bare, state, seen), (second_bare, nothing, also) = run_ranks(laid_out, 2, cell, scorer)
    assert (first_bare, second_bare, nothing) == (False, True, None)
    expected = whole.state_dict()
    assert state.keys() == expected.keys()
    for key, values in state.items():
        assert torch.equal(torch.tensor(values), expected[key].float().reshape(torch.tensor(values).shape)), key
    assert seen == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert also == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_what_is_packed_in_few_bits_is_read_on_every_rank() -> None:
    kind = all_strategies()["fsdp"]
    assert not kind.shapes_suffice(make_cell("fsdp", 2, lora_rank=8, base_weights="int8"), 1)
