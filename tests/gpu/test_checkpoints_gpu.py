"""On a real GPU: training states taken up again, and where frozen models lie, in which type, and what they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.models.build import build_policy, build_scorer
from bench.strategies.base import all_strategies
from bench.strategies.precision import frozen_copy, storage_dtype
from bench.strategies.visiting import visiting_copy
from tests.contract.strategy_work import make_cell, trial_of
from tests.contract.test_resume import stop_and_go_on
from tests.gpu.device_memory import allocated

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("group")]
every_strategy = pytest.mark.parametrize("strategy", sorted(all_strategies()))
PRECISIONS = ["fp32", "bf16-pure", "bf16-master", "bf16-autocast", "fp16-master"]


def device() -> torch.device:
    return torch.device("cuda", 0)


@every_strategy
@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("precision", ["bf16-master", "fp16-master"])
def test_a_fresh_engine_goes_on_where_a_saved_one_was(strategy: str, lora_rank: int, precision: str) -> None:
    """Not bit by bit: the embedding's backward pass adds in any order."""
    cell = make_cell(strategy, 1, precision=precision, lora_rank=lora_rank, device="cuda")
    if (reason := all_strategies()[strategy].unsupported(cell)) or not all_strategies()[strategy].resumable:
        pytest.skip(reason or "it says that it cannot")
    goes_on, again = stop_and_go_on(cell)
    for (loss, norm), (loss_again, norm_again) in zip(goes_on[:-1], again[:-1], strict=True):
        assert loss_again == pytest.approx(loss, rel=1e-3)
        assert norm_again == pytest.approx(norm, rel=2e-2)


def build(scorer: bool, model: str = "bloom-tiny") -> Any:
    trial = trial_of(make_cell("naive", 1, model=model))
    return build_scorer(trial, fresh_head=True, source="policy") if scorer else build_policy(trial)


def outputs(module: Any) -> torch.Tensor:
    ids_BT = (torch.arange(20).reshape(2, 10) + 5).to(device())
    with torch.no_grad():
        output = module(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("scorer", [False, True])
@pytest.mark.parametrize("model", ["bloom-tiny", "llama-tiny", "gpt2-tiny", "opt-tiny"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_frozen_model_computes_the_same_on_the_device_and_visiting_it(model: str, scorer: bool, precision: str) -> None:
    module = build(scorer, model)
    whole, visiting = frozen_copy(module, precision, device()), visiting_copy(module, precision, device())
    assert {one.device.type for one in whole.parameters()} == {"cuda"}
    assert {one.device.type for one in visiting.parameters()} == {"cpu"}
    assert all(one.is_pinned() for one in visiting.parameters())
    assert {one.dtype for one in [*whole.parameters(), *visiting.parameters()]} == {storage_dtype(precision)}
    assert torch.allclose(outputs(visiting).float(), outputs(whole).float(), atol=1e-5, rtol=1e-3)
    assert {one.device.type for one in visiting.parameters()} == {"cpu"}


def test_a_visiting_model_takes_the_room_of_its_largest_part() -> None:
    """LLaMA-1B's layers are 18 equal parts, so a model several times as large as the memory that it takes."""
    module = build(False, "llama-1b")
    size = sum(one.numel() for one in module.parameters()) * 2
    layer = sum(one.numel() for one in module.model.layers[0].parameters()) * 2
    before = allocated()
    visiting = visiting_copy(module, "bf16-master", device())
    assert torch.cuda.memory_allocated() - before < 2**20
    torch.cuda.reset_peak_memory_stats()
    outputs(visiting)
    peak = torch.cuda.max_memory_allocated() - before
    assert layer < peak < size / 4
    assert torch.cuda.memory_allocated() - before < 2**20


def test_placing_a_frozen_model_takes_no_second_copy_in_fp32() -> None:
    module = build(False, "llama-1b")
    size = sum(one.numel() for one in module.parameters()) * 2
    before = allocated()
    torch.cuda.reset_peak_memory_stats()
    whole = frozen_copy(module, "bf16-master", device())
    assert torch.cuda.max_memory_allocated() - before < 1.1 * size
    assert next(whole.parameters()).dtype == torch.bfloat16
