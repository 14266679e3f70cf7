"""What strategies with parameters in shards say of weights that stay gathered, against the bytes that lie on two real ranks."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from bench.cell import Cell
from bench.measure.evidence.trace import NAMESPACES
from bench.measure.evidence.walk import storages, walk
from bench.measure.flops import WEIGHT_BYTES
from bench.strategies import deepspeed_zero
from bench.strategies.base import Strategy, all_strategies
from tests.contract.rank_harness import run_ranks
from tests.contract.strategy_work import batch_BT, comparable, device_of, make_cell, make_engine, one_step, token_loss

SHARDING = [name for name, kind in all_strategies().items() if "parameters" in kind.sharded]
UNIT = 0.25
"""Largest share of the model that one unit of gathering may take: a layer and the embedding, or one of Gemini's three chunks."""
NEVER_WHOLE = 0.75
"""Of the model beside its shards, while weights are saved by a rank that does not write: one tensor at a time, or a chunk and a copy."""


def deep_model() -> nn.Module:
    """Eight tenths of its parameters lie in 24 layers."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", vocab_size=4096, hidden_size=64, n_layer=24, n_head=4))


def reachable(thing: Any) -> int:
    """Bytes of all floating tensors that hang on an engine or module, activations not among them."""
    found = [tensor for slot in walk(thing).slots if (tensor := slot.read()) is not None and tensor.is_floating_point()]
    return sum(tensor.untyped_storage().nbytes() for tensor in storages(found).values())


class LiveBytes(TorchDispatchMode):
    """The most bytes of all tensors of this process, looked at after each collective."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then look."""
        if any(hasattr(kind, "_local_tensor") for kind in types):
            return NotImplemented
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if func.namespace in NAMESPACES:
                self.most = max(self.most, live_bytes())
        return result


def live_bytes() -> int:
    """Of all floating tensors that Python knows; wrappers around others, which have no memory of their own, left out."""
    tensors = [getattr(item, "_local_tensor", item) for item in gc.get_objects() if issubclass(type(item), Tensor)]
    plain = [tensor for tensor in tensors if type(tensor) is not AsyncCollectiveTensor and tensor.is_floating_point()]
    return sum(tensor.untyped_storage().nbytes() for tensor in storages(plain).values())


def shares(cell: Cell) -> dict[str, float]:
    """Of the model's bytes, how many more lie here than between steps: at the end of forward passes and after them, and while saving."""
    module = deep_model()
    whole = sum(parameter.numel() for parameter in module.parameters()) * WEIGHT_BYTES[cell.settings.precision]
    _, engine, _ = make_engine(cell, module)
    last: list[int] = []
    module.transformer.ln_f.register_forward_pre_hook(lambda *_: last.append(reachable(engine)))
    found: dict[str, float] = {}
    with torch.no_grad():
        for _ in range(2):  # as an evaluation before training
            token_loss(engine.module, batch_BT(cell, 0))
    for _ in range(2):
        one_step(engine, cell)
    before, last[:] = reachable(engine), []
    one_step(engine, cell)
    found["in training"] = (last[0] - before) / whole
    before, last[:] = reachable(engine), []
    with torch.no_grad():
        token_loss(engine.module, batch_BT(cell, 0))
    found["without gradients"] = (last[0] - before) / whole
    found["afterwards"] = (reachable(engine) - before) / whole
    one_step(engine, cell)
    before = live_bytes()
    with LiveBytes() as live:
        engine.full_state()
    found["saving"] = (live.most - before) / whole
    return found


def precise(name: str) -> Cell:
    cell = make_cell(name, 2, precision=comparable(name), micro_batch=2)
    if reason := all_strategies()[name].unsupported(cell):
        pytest.skip(reason)
    return cell


def elements() -> int:
    return sum(parameter.numel() for parameter in deep_model().parameters())


@pytest.mark.parametrize("name", SHARDING)
def test_as_much_of_a_model_stays_gathered_as_its_strategy_says(name: str) -> None:
    kind = all_strategies()[name]
    said = kind.gathered_share(elements(), 2)
    first, second = run_ranks(shares, 2, precise(name))
    for seen in (first, second):
        assert seen["in training"] == pytest.approx(said, abs=UNIT)
        assert seen["without gradients"] == pytest.approx(said, abs=UNIT)
        assert seen["afterwards"] == pytest.approx(said if kind.stays_gathered else 0.0, abs=0.05)
    assert 0 < second["saving"] < NEVER_WHOLE


def test_as_much_of_a_large_model_is_whole_as_deepspeed_zero3_allows() -> None:
    for seen in run_ranks(shares_of_a_large_model, 2, precise("deepspeed_zero3")):
        assert seen["in training"] == pytest.approx(0.5, abs=UNIT / 2)


def shares_of_a_large_model(cell: Cell) -> dict[str, float]:
    """With limits that make a small model a large one."""
    half, given = elements() // 2, deepspeed_zero.configuration

    def configuration(*arguments: Any, **more: Any) -> dict[str, Any]:
        found = given(*arguments, **more)
        limits = {"stage3_max_live_parameters": half, "stage3_max_reuse_distance": half, "stage3_prefetch_bucket_size": half // 20}
        return {**found, "zero_optimization": {**found["zero_optimization"], **limits}}

    deepspeed_zero.configuration = configuration
    return shares(cell)


@pytest.mark.parametrize("name", [name for name in SHARDING if "frozen" in all_strategies()[name].sharded])
def test_nothing_of_a_frozen_model_in_shards_is_whole_at_the_end_of_its_forward_pass_or_after_it(name: str) -> None:
    for most, afterwards in run_ranks(frozen_shares, 2, precise(name)):
        assert most == pytest.approx(0.0, abs=UNIT)
        assert afterwards == pytest.approx(0.0, abs=0.05)


def frozen_shares(cell: Cell) -> tuple[float, float]:
    """The same of a model that is only read: at the end of a forward pass, and after it."""
    strategy: Strategy = all_strategies()[cell.strategy]
    strategy.start(cell, device_of(cell))
    module = deep_model()
    whole = sum(parameter.numel() for parameter in module.parameters()) * WEIGHT_BYTES[cell.settings.precision]
    placed: Any = strategy.place_frozen(module, cell, device_of(cell))
    last: list[int] = []
    placed.transformer.ln_f.register_forward_pre_hook(lambda *_: last.append(reachable(placed)))
    before = reachable(placed)
    with torch.no_grad():
        for _ in range(2):
            token_loss(placed, batch_BT(cell, 0))
    return (last[-1] - before) / whole, (reachable(placed) - before) / whole
