"""Weights that any strategy saves at two ranks are loaded by any other at any number of ranks, exactly; adapters as peft saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bench.checkpoint import WEIGHTS, checkpoint_sha256, save_checkpoint
from bench.models.build import build_policy
from bench.record import Input
from bench.strategies.base import all_strategies
from bench.strategies.colossal import import_colossalai
from bench.strategies.precision import storage_dtype
from bench.trial import make_trial
from tests.contract.rank_harness import run_ranks
from tests.contract.strategy_work import _outputs, device_of, make_cell, make_engine, one_step, trial_of

import_colossalai()


def best_precision(strategy: str) -> str:
    return "fp32" if "fp32" in all_strategies()[strategy].precisions else "bf16-master"


def usable(strategy: str, ranks: int, **changes: Any) -> Any:
    """A cell that can run here, or None."""
    cell = make_cell(strategy, ranks, precision=best_precision(strategy), **changes)
    return cell if all_strategies()[strategy].unsupported(cell) is None else None


SAVERS = [name for name in all_strategies() if usable(name, 2)]
LOADERS = [(name, 2) for name in SAVERS] + [("naive", 1), ("ddp", 1), ("zero2", 1), ("gemini", 1)]


def train_and_save(cell: Any, folder: str) -> None:
    _, engine, module = make_engine(cell)
    config = module.config
    for _ in range(2):
        one_step(engine, cell)
    if (state := engine.full_state()) is not None:
        save_checkpoint(Path(folder), state=state, config=config, stage="sft", tokenizer=None, started_from={}, lora={})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Strategy -> what it saved, trained at two ranks."""
    root = tmp_path_factory.mktemp("saved")
    for strategy in SAVERS:
        run_ranks(train_and_save, 2, usable(strategy, 2), str(root / strategy))
    return {strategy: root / strategy for strategy in SAVERS}


def load_all(cell: Any, folders: list[str]) -> list[dict[str, Any]]:
    """For each folder: how far the weights that the engine holds are from those in the file, and the loss of a step from there."""
    strategy = all_strategies()[cell.strategy]
    strategy.start(cell, device_of(cell))
    found = []
    for folder in folders:
        start = Input(name="policy", path=folder, sha256=checkpoint_sha256(Path(folder)))
        module = build_policy(make_trial(cell, 0, starts=[start], work="unused"))
        engine = strategy.prepare(module, cell, device_of(cell), learning_rate=1e-3)
        state, stored = engine.full_state(), load_file(Path(folder) / WEIGHTS)
        if state is not None:
            dtype = storage_dtype(cell.settings.precision)
            assert {name for name in state if name != "lm_head.weight"} == stored.keys()
            differ = [name for name, tensor in stored.items() if not torch.equal(state[name].to(dtype), tensor.to(dtype))]
            found.append({"differ": differ, "tied": torch.equal(state["lm_head.weight"], state["transformer.word_embeddings.weight"])})
        if cell.model_parallel_size == 1:
            one_step(engine, cell)
    return found


@pytest.mark.parametrize(("strategy", "ranks"), LOADERS)
def test_what_one_strategy_saved_another_loads_exactly(strategy: str, ranks: int, saved: dict[str, Path]) -> None:
    savers = SAVERS if ranks == 1 else ["zero2", "gemini"]
    found = run_ranks(load_all, ranks, usable(strategy, ranks), [str(saved[saver]) for saver in savers])[0]
    assert found == [{"differ": [], "tied": True}] * len(savers)


@pytest.mark.parametrize("slices", [{"tensor_parallel": 2}, {"pipeline_parallel": 2}])
def test_hybrid_loads_it_in_slices_of_the_model(slices: dict[str, int], saved: dict[str, Path]) -> None:
    cell = make_cell("hybrid", 2, **slices)
    assert all_strategies()["hybrid"].unsupported(cell) is None
    found = run_ranks(load_all, 2, cell, [str(saved["zero2"]), str(saved["gemini"])])[0]
    assert found == [{"differ": [], "tied": True}] * 2


# -- adapters --------------------------------------------------------------------------------------------------------


def train_adapters(cell: Any, folder: str) -> dict[str, float]:
    """Train adapters, save, and say how far the merged weights and the reloaded adapters are from the live model."""
    from peft import PeftModel

    from bench.models.build import add_lora

    strategy = all_strategies()[cell.strategy]
    strategy.start(cell, device_of(cell))
    module = build_policy(trial_of(cell))
    facts, config = add_lora(module, cell, seed=7), module.config
    engine = strategy.prepare(module, cell, device_of(cell), learning_rate=0.05)
    for _ in range(3):
        one_step(engine, cell)
    state, live = engine.full_state(), _outputs(engine.module, False)
    if state is None:
        return {}
    save_checkpoint(Path(folder), state=state, config=config, stage="sft", tokenizer=None, started_from={}, lora=facts)
    plain = make_cell(cell.strategy, cell.world_size, model=cell.model)
    base = build_policy(trial_of(plain))
    untrained = _outputs(base, False)
    start = Input(name="policy", path=folder, sha256=checkpoint_sha256(Path(folder)))
    merged = _outputs(build_policy(make_trial(plain, 0, starts=[start], work="unused")), False)
    adapted = _outputs(PeftModel.from_pretrained(base, str(Path(folder) / "adapter")), False)
    return {
        "merged": (merged - live).abs().max().item(), "adapted": (adapted - live).abs().max().item(),
        "learned": (untrained - live).abs().max().item(),
    }  # fmt: skip


ADAPTED = ["naive", *(name for name in SAVERS if "fp32" in all_strategies()[name].precisions and usable(name, 2, lora_rank=4))]


@pytest.mark.parametrize("model", ["bloom-tiny", "qwen2-tiny"])
@pytest.mark.parametrize("strategy", ADAPTED)
def test_live_merged_and_reloaded_adapters_agree_on_tied_models(strategy: str, model: str, tmp_path: Path) -> None:
    cell = make_cell(strategy, 1 if strategy == "naive" else 2, model=model, lora_rank=4)
    seen = run_ranks(train_adapters, cell.world_size, cell, str(tmp_path / "weights"))[0]
    assert seen["merged"] < 1e-5
    assert seen["adapted"] < 1e-5
    assert seen["learned"] > 0.1


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
