"""Weights that one layout saved any other loads exactly, at any number of ranks; adapters as peft saves them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bench.cell import Cell
from bench.checkpoint import WEIGHTS, checkpoint_sha256, save_checkpoint
from bench.matrix import impossible
from bench.models.build import add_lora, build_policy
from bench.record import Input
from bench.strategies.base import PipelinedEngine, all_strategies
from bench.strategies.precision import storage_dtype
from bench.trial import make_trial
from tests.contract.rank_harness import run_ranks
from tests.contract.strategy_work import (
    VARIANTS,
    _outputs,
    _pipelined_outputs,
    comparable,
    device_of,
    make_cell,
    make_engine,
    one_step,
    policy_here,
    tolerance,
    trained,
    trial_of,
)

Layout = tuple[str, int]
"""A variant and its number of ranks."""


def cell_of(variant: str, ranks: int, **changes: Any) -> Cell:
    """A cell in the variant's best precision, of which four ranks can share a step."""
    return make_cell(variant, ranks, precision=comparable(variant), micro_batch=2, **changes)


def possible(**changes: Any) -> list[Layout]:
    """Every variant at two ranks, naive at one."""
    layouts = [(variant, 1 if variant == "naive" else 2) for variant in VARIANTS]
    return [(variant, ranks) for variant, ranks in layouts if impossible(cell_of(variant, ranks, **changes)) is None]


ALONE = [(variant, 1) for variant in ("ddp", "zero2", "gemini", "fsdp")]
AT_FOUR = [(variant, 4) for variant in ("zero2", "gemini", "fsdp", "hybrid-tensor2")]
LAYOUTS = [*possible(), *ALONE, *AT_FOUR]
LOADED_BY_ALL = [("zero2", 1), ("gemini", 2), ("hybrid-tensor2", 2), ("fsdp", 4)]
"""Whose weights every layout loads; naive loads those of all."""


def train_and_save(cell: Cell, folder: str) -> None:
    _, engine, module = make_engine(cell)
    config = module.config
    for _ in range(2):
        one_step(engine, cell)
    if (state := engine.full_state()) is not None:
        save_checkpoint(Path(folder), state=state, config=config, stage="sft", tokenizer=None, started_from={}, lora={})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, str]:
    """Where the weights lie that each layout trained and saved."""
    folders = {layout: str(tmp_path_factory.mktemp("saved") / "weights") for layout in LAYOUTS}
    for layout, folder in folders.items():
        run_ranks(train_and_save, layout[1], cell_of(*layout), folder)
    return folders


@pytest.fixture(scope="module")
def loaded(saved: dict[Layout, str]) -> Callable[[Layout], dict[Layout, dict[str, Any]]]:
    """What a layout finds in the files of those that it loads from; every layout is asked once."""

    @cache
    def load(layout: Layout) -> dict[Layout, dict[str, Any]]:
        savers = LAYOUTS if layout == ("naive", 1) else LOADED_BY_ALL
        found = run_ranks(load_each, layout[1], cell_of(*layout), [saved[saver] for saver in savers])[0]
        return dict(zip(savers, found, strict=True))

    return load


def load_each(cell: Cell, folders: list[str]) -> list[dict[str, Any]]:
    """For each folder: which weights that the engine holds are not those in the file, and the loss of a step from there."""
    return [load_one(cell, Path(folder)) for folder in folders]


def load_one(cell: Cell, folder: Path) -> dict[str, Any]:
    start = Input(name="policy", path=str(folder), sha256=checkpoint_sha256(folder))
    _, engine, _ = make_engine(cell, policy_here(make_trial(cell, 0, starts=[start], work="unused")))
    state = engine.full_state()
    loss, _ = one_step(engine, cell)
    if state is None:
        return {}
    stored, dtype = load_file(folder / WEIGHTS), storage_dtype(cell.settings.precision)
    assert {name for name in state if name != "lm_head.weight"} == stored.keys()
    differ = [name for name, tensor in stored.items() if not torch.equal(state[name].to(dtype), tensor.to(dtype))]
    return {"differ": differ, "tied": torch.equal(state["lm_head.weight"], state["transformer.word_embeddings.weight"]), "loss": loss}


@pytest.mark.parametrize(("variant", "ranks"), LAYOUTS)
def test_what_one_layout_saved_another_loads_exactly_and_trains(variant: str, ranks: int, loaded: Any) -> None:
    naive = loaded(("naive", 1))
    for saver, found in loaded((variant, ranks)).items():
        assert (found["differ"], found["tied"]) == ([], True), saver
        assert found["loss"] == pytest.approx(naive[saver]["loss"], abs=tolerance(variant)), saver


@pytest.mark.parametrize(("variant", "ranks"), LAYOUTS)
def test_what_a_layout_saved_is_what_naive_would_have_learned(variant: str, ranks: int, loaded: Any) -> None:
    losses = trained("naive", 1, precision=comparable(variant))["losses"]
    assert loaded(("naive", 1))[variant, ranks]["loss"] == pytest.approx(losses[2], abs=tolerance(variant))
    assert losses[0] - losses[2] > 10 * tolerance(variant)


# -- adapters --------------------------------------------------------------------------------------------------------

AGREEMENT = {"fp32": 1e-5, "bf16-master": 0.04}
"""Largest distance of two logits, by the precision that trained the adapters; both files are read in fp32."""


def train_adapters(cell: Cell, folder: str) -> dict[str, float]:
    """Train adapters, save, and say how far the merged weights and the reloaded adapters are from the live model."""
    from peft import PeftModel

    strategy = all_strategies()[cell.strategy]
    strategy.start(cell, device_of(cell))
    module = policy_here(trial_of(cell))
    facts, config = add_lora(module, cell, seed=7), module.config
    engine = strategy.prepare(module, cell, device_of(cell), learning_rate=0.05)
    for _ in range(3):
        one_step(engine, cell)
    state = engine.full_state()
    live = _pipelined_outputs(engine, False) if isinstance(engine, PipelinedEngine) else _outputs(engine.module, False)
    if state is None:
        return {}
    save_checkpoint(Path(folder), state=state, config=config, stage="sft", tokenizer=None, started_from={}, lora=facts)
    plain = make_cell("naive", 1, model=cell.model)
    base = build_policy(trial_of(plain))
    untrained = _outputs(base, False)
    start = Input(name="policy", path=folder, sha256=checkpoint_sha256(Path(folder)))
    merged = _outputs(build_policy(make_trial(plain, 0, starts=[start], work="unused")), False)
    adapted = _outputs(PeftModel.from_pretrained(base, str(Path(folder) / "adapter")), False)
    return {
        "merged": (merged - live).abs().max().item(), "adapted": (adapted - live).abs().max().item(),
        "learned": (untrained - live).abs().max().item(),
    }  # fmt: skip


@pytest.mark.parametrize("model", ["bloom-tiny", "qwen2-tiny"])
@pytest.mark.parametrize(("variant", "ranks"), possible(lora_rank=4))
def test_live_merged_and_reloaded_adapters_agree_on_tied_models(variant: str, ranks: int, model: str, tmp_path: Path) -> None:
    seen = run_ranks(train_adapters, ranks, cell_of(variant, ranks, model=model, lora_rank=4), str(tmp_path / "weights"))[0]
    assert seen["merged"] < AGREEMENT[comparable(variant)]
    assert seen["adapted"] < AGREEMENT[comparable(variant)]
    assert seen["learned"] > 0.5


def test_upstreams_way_of_wrapping_the_tied_head_fails_this(tmp_path: Path) -> None:
    """v0.2.8 replaced every linear layer, the tied head too; merging it moved the input embedding, so live and merged differ."""
    module = build_policy(trial_of(make_cell("naive", 1))).eval()
    head = module.lm_head
    assert head.weight is module.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(1)
    low, high = torch.randn(4, 64, generator=generator) * 0.1, torch.randn(4096, 4, generator=generator) * 0.1
    hook = head.register_forward_hook(lambda _, inputs, output: output + inputs[0] @ low.T @ high.T / 4)
    live = _outputs(module, False)
    hook.remove()
    with torch.no_grad():
        head.weight += high @ low / 4
    assert (_outputs(module, False) - live).abs().max() > 1e-2
