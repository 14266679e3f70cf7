"""What theory says that a rank holds of a split model, against real ranks: bytes of all states, and of what a forward pass keeps."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.cell import Cell
from bench.matrix import impossible
from bench.measure.activations import kept_bytes
from bench.measure.evidence.holdings import Holdings
from bench.measure.flops import Sequences
from bench.measure.shape import Network, shape_of
from bench.models.build import add_lora, build_policy, build_scorer
from bench.models.presets import PRESETS
from bench.needs import needs
from bench.strategies.base import PipelinedEngine, all_strategies
from tests.contract.rank_harness import run_ranks
from tests.contract.strategy_work import LENGTH, device_of, make_cell, make_engine, one_step, token_loss, train, trial_of, value_loss

DEGREES = {"tensor2": (2, 1), "pipeline2": (1, 2), "both": (2, 2), "none": (1, 1)}


def held(cell: Cell) -> dict[str, int]:
    """Elements and bytes of one model on this rank, gradients just before the update, moments after it."""
    scorer, strategy = cell.stage == "rm", all_strategies()[cell.strategy]
    module = build_scorer(trial_of(cell), fresh_head=True, source="policy") if scorer else build_policy(trial_of(cell))
    add_lora(module, cell, seed=7)
    strategy.start(cell, device_of(cell))
    engine = strategy.prepare(module, cell, device_of(cell), learning_rate=1e-3)
    holdings, gradients, step = Holdings(engine, cell.settings.precision, device_of(cell)), [], engine.step

    def watched() -> Any:
        gradients.append(sum(one.grad.nbytes for one in engine.module.parameters() if one.grad is not None))
        return step()

    engine.step = watched  # type: ignore[method-assign]
    one_step(engine, cell, value_loss if scorer else token_loss)
    frozen = holdings.frozen()
    return {
        "trainable": holdings.count_trainable(), "frozen": frozen.elements, "weights": holdings.parameters().bytes + frozen.bytes,
        "gradients": gradients[0], "optimizer": holdings.optimizer().bytes,
    }  # fmt: skip


CASES = [
    ("bloom-tiny", "sft", "tensor2", 0), ("bloom-tiny", "sft", "pipeline2", 0), ("bloom-tiny", "rm", "both", 0),
    ("bloom-tiny", "sft", "pipeline2", 4), ("llama-tiny", "sft", "both", 0), ("llama-tiny", "rm", "pipeline2", 4),
    ("gpt2-tiny", "sft", "tensor2", 0), ("gpt2-tiny", "rm", "tensor2", 0), ("qwen2-tiny", "sft", "both", 0),
    ("mistral-tiny", "sft", "tensor2", 0), ("mistral-tiny", "rm", "tensor2", 0), ("gpt2-tiny", "sft", "none", 4),
]  # fmt: skip
"""Every architecture that can be split; tied and untied heads, scalar ones; adapters where they go with it."""


@pytest.mark.parametrize(("model", "stage", "degrees", "lora_rank"), CASES)
def test_a_rank_holds_what_theory_says(model: str, stage: str, degrees: str, lora_rank: int) -> None:
    tensor, pipeline = DEGREES[degrees]
    cell = make_cell(
        "hybrid", tensor * pipeline, stage=stage, model=model, tensor_parallel=tensor, pipeline_parallel=pipeline, micro_batch=2,
        precision="bf16-master", lora_rank=lora_rank,
    )  # fmt: skip
    assert impossible(cell) is None
    theory = [needs(cell, stage=rank // tensor) for rank in range(cell.world_size)]
    for seen, expected in zip(run_ranks(held, cell.world_size, cell), theory, strict=True):
        assert seen["weights"] == expected.weight_bytes
        assert seen["gradients"] == expected.gradient_bytes
        assert seen["optimizer"] == pytest.approx(expected.optimizer_bytes, rel=2e-3)  # beside moments and masters the step counters
    assert needs(cell).state_bytes == max(one.state_bytes for one in theory)


def test_a_pipeline_with_adapters_and_masters_has_the_losses_and_norms_of_naive() -> None:
    """The embedding that its ends share is frozen, so it has no master that the norm could ask for."""
    shared = {"lora_rank": 4, "precision": "bf16-master", "micro_batch": 2}
    split = run_ranks(train, 2, make_cell("hybrid", 2, pipeline_parallel=2, **shared), 4)[0]
    whole = run_ranks(train, 1, make_cell("naive", 1, **shared), 4)[0]
    assert split["losses"] == pytest.approx(whole["losses"], rel=1e-3)
    assert split["norms"] == pytest.approx(whole["norms"], rel=1e-2)


# -- what a forward pass keeps ---------------------------------------------------------------------------------------


class Saved:
    """Live bytes of what autograd saves, each storage once, parameters left out; and their peak."""

    def __init__(self, parameters: Any) -> None:
        self._own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._holders: dict[int, int] = {}
        self._live = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self._own:
            self._holders[address] = self._holders.get(address, 0) + 1
            self._live += size if self._holders[address] == 1 else 0
            self.peak = max(self.peak, self._live)
            holder = Holder(tensor)
            weakref.finalize(holder, self._release, address, size)
            return holder
        return Holder(tensor)

    def _release(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        self._live -= size if self._holders[address] == 0 else 0


class Holder:
    """A saved tensor, kept until its graph is gone."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def peak_of_saved(cell: Cell, layers: int) -> int:
    """Largest bytes that autograd holds in one step of a model of so many layers."""
    preset = PRESETS[cell.model]
    depth = "n_layer" if preset.model_type in ("bloom", "gpt2") else "num_hidden_layers"
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(preset.model_type, **{**preset.config, depth: layers}))
    _, engine, _ = make_engine(cell, module)
    saved = Saved(engine.module.parameters())
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda holder: holder.tensor):
        one_step(engine, cell)
    assert isinstance(engine, PipelinedEngine) == (cell.settings.pipeline_parallel > 1)
    return saved.peak


def two_layers(cell: Cell) -> float:
    """What two layers of the cell's model keep of one micro-batch, by theory."""
    shape = shape_of(cell.model)
    assert shape is not None
    work = Sequences(count=cell.settings.micro_batch, length=LENGTH)
    return kept_bytes(Network(shape=shape), work, cell.settings.precision, layers=2, ways=cell.settings.tensor_parallel)


@pytest.mark.parametrize("model", ["bloom-tiny", "llama-tiny", "gpt2-tiny"])
def test_layers_in_slices_keep_slices_of_what_is_cut_and_all_of_the_rest(model: str) -> None:
    cell = make_cell("hybrid", 2, model=model, tensor_parallel=2, micro_batch=8)
    few, many = (run_ranks(peak_of_saved, 2, cell, layers) for layers in (2, 4))
    assert [two - one for one, two in zip(few, many, strict=True)] == pytest.approx([two_layers(cell)] * 2, rel=0.05)


def test_the_first_stage_of_a_pipeline_keeps_as_many_micro_batches_as_there_are_stages() -> None:
    cell = make_cell("hybrid", 2, model="bloom-tiny", pipeline_parallel=2, micro_batch=2)
    assert cell.accumulation == 4
    few, many = (run_ranks(peak_of_saved, 2, cell, layers) for layers in (4, 8))
    grown = [two - one for one, two in zip(few, many, strict=True)]
    assert grown == pytest.approx([2 * two_layers(cell), two_layers(cell)], rel=0.05)
