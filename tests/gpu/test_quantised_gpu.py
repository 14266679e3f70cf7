"""8- and 4-bit weights on a GPU: types, placement, memory, and losses near those of stored weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.measure.evidence.walk import local
from bench.models.build import build_policy
from bench.needs import needs
from bench.strategies.base import all_strategies
from tests.contract.strategy_work import make_cell, make_engine, one_step, train, trial_of
from tests.trials import tiny_cell

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("group")]
GPU = torch.device("cuda", 0)


def cell(strategy: str, **changes: Any) -> Any:
    return make_cell(strategy, 1, **{"precision": "bf16-master", "device": "cuda", "lora_rank": 8, **changes})


def ppo_cell(strategy: str, weights: str) -> Any:
    return tiny_cell("ppo", strategy=strategy, device="cuda", launcher="torchrun", precision="bf16-master", frozen_weights=weights)


@pytest.mark.parametrize("strategy", ["naive", "ddp"])
@pytest.mark.parametrize(("kind", "dtype", "share"), [("int8", torch.int8, 0.55), ("nf4", torch.uint8, 0.3)])
def test_the_base_is_small_on_the_device_and_adapters_train(strategy: str, kind: str, dtype: Any, share: float) -> None:
    wanted = cell(strategy, base_weights=kind)
    _, engine, module = make_engine(wanted)
    one_step(engine, wanted)
    base = {name: one for name, one in module.named_parameters() if name.endswith("base_layer.weight")}
    assert base
    assert {one.dtype for one in base.values()} == {dtype}
    assert all(one.device == GPU for one in module.parameters())
    whole = dict(build_policy(trial_of(wanted)).named_parameters())
    stored = sum(2 * whole[name.replace(".base_layer", "")].numel() for name in base)
    assert sum(one.nbytes for one in base.values()) < share * stored
    seen, plain = train(wanted, 5)["losses"], train(cell(strategy), 5)["losses"]
    assert seen[0] == pytest.approx(plain[0], rel=0.03)
    assert seen[-1] < seen[0]


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_grad_op"])
@pytest.mark.parametrize("precision", ["bf16-master", "fp16-master", "bf16-autocast"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_small_base_in_shards_trains_as_one_that_is_whole(strategy: str, precision: str, kind: str) -> None:
    """One rank, so a shard is all; gathering, the views that bitsandbytes keeps and the casts of FSDP are those of many."""
    wanted = cell(strategy, base_weights=kind, precision=precision)
    _, _, module = make_engine(wanted)
    packed = {name: local(one) for name, one in module.named_parameters() if name.endswith(".packed")}
    assert len(packed) == 8
    assert {one.device for one in packed.values()} == {GPU}
    assert all(one.device == GPU for one in (*map(local, module.parameters()), *module.buffers()))
    theory = needs(wanted)
    assert theory is not None
    assert sum(local(one).nbytes for one in module.parameters() if not one.requires_grad) == pytest.approx(
        theory.weight_bytes - theory.trainable * (4 if precision == "bf16-autocast" else 2), rel=0.02
    )
    seen, whole = train(wanted, 5), train(cell("naive", base_weights=kind, precision=precision), 5)
    assert seen["losses"] == pytest.approx(whole["losses"], rel=2e-3)
    assert seen["losses"][-1] < seen["losses"][0]
    assert seen["dtypes"] == whole["dtypes"]


def test_frozen_models_in_int8_lie_in_shards_and_score_as_whole_ones() -> None:
    module = build_policy(trial_of(cell("fsdp", lora_rank=0)))
    ids_BT = torch.randint(3, 4000, (2, 12), generator=torch.Generator().manual_seed(3)).to(GPU)
    scores = []
    for strategy in ("naive", "fsdp"):
        small = all_strategies()[strategy].place_frozen(module, ppo_cell(strategy, "int8"), GPU)
        with torch.no_grad():
            scores.append(small(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits.float())
    assert (scores[0] - scores[1]).abs().max() < 0.01 * scores[0].abs().max()


@pytest.mark.parametrize("strategy", ["naive", "ddp"])
def test_frozen_models_in_int8_lie_on_the_device_and_score_as_stored_ones(strategy: str) -> None:
    stored_cell, small_cell = (ppo_cell(strategy, weights) for weights in ("stored", "int8"))
    kind, module = all_strategies()[strategy], build_policy(trial_of(cell(strategy, lora_rank=0)))
    stored, small = (kind.place_frozen(module, one, GPU) for one in (stored_cell, small_cell))
    layers = [sum(one.nbytes for one in model.transformer.h.parameters()) for model in (stored, small)]
    assert layers[1] < 0.6 * layers[0]
    assert all(one.device == GPU for one in small.parameters())
    ids_BT = torch.randint(3, 4000, (2, 12), generator=torch.Generator().manual_seed(3)).to(GPU)
    with torch.no_grad():
        outputs = [model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits.float() for model in (stored, small)]
    assert (outputs[0] - outputs[1]).abs().max() < 0.05 * outputs[0].abs().max()
