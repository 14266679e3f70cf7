"""fsdp on a real GPU: types and places of shards, masters and states, what stays gathered, a model that is moved layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.models.build import build_policy
from bench.strategies.base import all_strategies
from tests.contract.strategy_work import batch_BT, make_cell, make_engine, one_step, token_loss, trial_of
from tests.gpu.device_memory import allocated

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("group")]
GPU = torch.device("cuda", 0)


def cell(**changes: Any) -> Any:
    return make_cell("fsdp", 1, **{"precision": "bf16-master", "device": "cuda", **changes})


def states_of(engine: Any) -> list[torch.Tensor]:
    return [value for state in engine._optimizer.state.values() for name, value in state.items() if name != "step"]


@pytest.mark.parametrize(
    ("precision", "shards", "frozen"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16-autocast", torch.float32, torch.float32),
        ("bf16-pure", torch.bfloat16, torch.bfloat16),
        ("bf16-master", torch.float32, torch.bfloat16),
        ("fp16-master", torch.float32, torch.float16),
    ],
)
def test_shards_states_and_frozen_weights_lie_on_the_device_in_their_types(precision: str, shards: Any, frozen: Any) -> None:
    wanted = cell(precision=precision, lora_rank=8)
    _, engine, module = make_engine(wanted)
    one_step(engine, wanted)
    trains = {parameter.requires_grad: parameter.dtype for parameter in module.parameters()}
    assert trains == {True: shards, False: frozen}
    assert all(parameter.to_local().device == GPU for parameter in module.parameters())
    states = states_of(engine)
    assert len(states) == 2 * sum(parameter.requires_grad for parameter in module.parameters())
    assert {state.dtype for state in states} == {shards}
    assert {state.to_local().device for state in states} == {GPU}


def test_layers_compute_in_16_bits_and_their_shards_stay_fp32() -> None:
    wanted = cell()
    _, engine, module = make_engine(wanted)
    seen = []
    module.transformer.h[0].mlp.dense_h_to_4h.register_forward_pre_hook(
        lambda layer, inputs: seen.append((layer.weight.dtype, inputs[0].dtype))
    )
    one_step(engine, wanted)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_nothing_stays_gathered_after_a_forward_pass_without_gradients() -> None:
    wanted = cell(precision="fp32")
    _, engine, _ = make_engine(wanted)
    one_step(engine, wanted)
    before = allocated()
    with torch.no_grad():
        for _ in range(2):
            token_loss(engine.module, batch_BT(wanted, 0)).item()
    assert allocated() - before < 256 << 10


def test_preparing_a_model_never_has_it_whole_beside_its_shards() -> None:
    """Layers are moved and cut one by one: on one rank, whose shards are the model, the peak is the model and its largest unit."""
    wanted = cell(precision="fp32", model="llama-tiny")
    module = build_policy(trial_of(wanted))
    size = sum(parameter.nbytes for parameter in module.parameters())
    layers = sum(parameter.nbytes for layer in module.model.layers for parameter in layer.parameters())
    before = allocated()
    torch.cuda.reset_peak_memory_stats()
    strategy = all_strategies()["fsdp"]
    strategy.start(wanted, GPU)
    engine = strategy.prepare(module, wanted, GPU, learning_rate=1e-3)
    assert torch.cuda.memory_allocated() - before == pytest.approx(size, rel=0.2)
    assert torch.cuda.max_memory_allocated() - before < 2 * size - layers / 2 + (64 << 10)
    assert engine.module is module


def test_a_frozen_model_is_in_16_bits_on_the_device_and_has_no_gradients() -> None:
    wanted = cell()
    strategy, _, _ = make_engine(wanted)
    frozen = strategy.place_frozen(build_policy(trial_of(wanted)), wanted, GPU)
    assert {parameter.dtype for parameter in frozen.parameters()} == {torch.bfloat16}
    assert {parameter.to_local().device for parameter in frozen.parameters()} == {GPU}
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not frozen.training
