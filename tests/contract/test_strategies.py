"""The contract of bench/strategies/base.py, for every strategy that is found, as far as training goes."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import AutoConfig

from bench.cell import Cell, Precision, validate_settings
from bench.models.presets import PRESETS
from bench.strategies.base import all_strategies
from tests.contract.rank_harness import run_ranks
from tests.contract.strategy_work import (
    at_its_widest,
    comparable,
    kind_of,
    learning_rates,
    make_cell,
    make_engine,
    one_step,
    overflow,
    rank_gradients,
    supported,
    tolerance,
    train_pairs,
    trained,
)

INSTALLED = sorted(name for name, kind in all_strategies().items() if kind.missing() is None)
every_strategy = pytest.mark.parametrize("strategy", INSTALLED)

# ------------------------------------------------------------------------------------------------------------ declarations


@pytest.mark.parametrize("strategy", sorted(all_strategies()))
def test_a_strategy_says_what_it_is_and_offers(strategy: str) -> None:
    kind = all_strategies()[strategy]
    assert kind.name == strategy
    assert kind.description
    assert kind.precisions
    assert kind.precisions <= set(get_args(Precision))


def test_every_strategy_has_a_line_in_the_documentation() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text(encoding="utf-8").splitlines()
    assert {line.split("`")[1] for line in lines if line.startswith("| `")} == set(all_strategies())


@every_strategy
def test_a_precision_that_is_not_offered_is_unsupported_with_its_name(strategy: str) -> None:
    for precision in get_args(Precision):
        reason = all_strategies()[strategy].unsupported(make_cell(strategy, 1, precision=precision))
        assert (reason is None) == (precision in all_strategies()[strategy].precisions)
        assert reason is None or precision in reason


@every_strategy
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_forced_settings_are_settings_and_differ_from_the_cell(strategy: str, device: str) -> None:
    for optimizer in ("adamw", "foreach", "fused", "hybrid"):
        cell = make_cell(strategy, 1, precision=comparable(strategy), device=device, optimizer=optimizer)
        forced = all_strategies()[strategy].forced_settings(cell)
        validate_settings("sft", {"steps": 1, **forced})
        assert all(getattr(cell.settings, name) != value for name, value in forced.items())


def test_naive_on_two_ranks_is_unsupported() -> None:
    assert "one rank" in str(all_strategies()["naive"].unsupported(make_cell("naive", 2)))


def test_hybrid_adam_on_a_cpu_is_unsupported_where_it_is_not_forced() -> None:
    for strategy in ("naive", "ddp", "zero1", "zero2", "hybrid"):
        assert "cuda only" in str(all_strategies()[strategy].unsupported(make_cell(strategy, 1, optimizer="hybrid")))
        assert all_strategies()[strategy].unsupported(make_cell(strategy, 1, optimizer="hybrid", device="cuda")) is None


@pytest.mark.parametrize("strategy", ["gemini", "gemini_auto", "gemini_cpu", "zero1_cpu", "zero2_cpu"])
def test_strategies_that_need_colossalais_adam_force_it_on_a_gpu(strategy: str) -> None:
    kind = all_strategies()[strategy]
    assert kind.forced_settings(make_cell(strategy, 1, precision="bf16-master", device="cuda")) == {"optimizer": "hybrid"}
    assert kind.forced_settings(make_cell(strategy, 1, precision="bf16-master", device="cuda", optimizer="hybrid")) == {}


@every_strategy
def test_only_strategies_that_split_models_take_model_parallel_degrees(strategy: str) -> None:
    for setting in ("tensor_parallel", "pipeline_parallel"):
        cell = make_cell(strategy, 2, precision=comparable(strategy), **{"micro_batch": 2, setting: 2})
        reason = all_strategies()[strategy].unsupported(cell)
        assert (reason is None) == all_strategies()[strategy].model_parallel, reason


def test_finding_strategies_imports_no_framework() -> None:
    code = "import sys; from bench.strategies.base import all_strategies; all_strategies(); print(*sys.modules)"
    seen = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not {"torch", "transformers", "colossalai", "deepspeed"} & seen


# ------------------------------------------------------------------------------------------------------------------- losses


@at_its_widest
@pytest.mark.parametrize("model", ["bloom-tiny", "llama-tiny"])
@pytest.mark.parametrize("lora_rank", [0, 8])
def test_losses_are_those_of_naive(variant: str, ranks: int, model: str, lora_rank: int) -> None:
    precision = comparable(variant)
    supported(variant, ranks, model=model, lora_rank=lora_rank, precision=precision)
    losses = trained(variant, ranks, model=model, lora_rank=lora_rank, precision=precision)["losses"]
    assert losses == pytest.approx(
        trained("naive", 1, model=model, lora_rank=lora_rank, precision=precision)["losses"], rel=tolerance(variant)
    )
    assert losses[-1] < losses[0] - (0.3 if lora_rank == 0 else 0.002)


@every_strategy
def test_two_ranks_are_one_rank_at_the_same_global_batch(strategy: str) -> None:
    supported(strategy, 2, precision=comparable(strategy))
    one, two = (trained(strategy, ranks, precision=comparable(strategy)) for ranks in (1, 2))
    assert two["losses"] == pytest.approx(one["losses"], rel=tolerance(strategy))
    assert two["norms"] == pytest.approx(one["norms"], rel=10 * tolerance(strategy))


@at_its_widest
@pytest.mark.parametrize("optimizer", ["foreach", "fused"])
def test_every_adamw_of_torch_has_the_same_losses(variant: str, ranks: int, optimizer: str) -> None:
    precision = comparable(variant)
    supported(variant, ranks, precision=precision, optimizer=optimizer)
    losses = trained(variant, ranks, precision=precision, optimizer=optimizer)["losses"]
    assert losses == pytest.approx(trained("naive", 1, precision=precision)["losses"], rel=tolerance(variant))


@at_its_widest
def test_accumulation_changes_nothing(variant: str, ranks: int) -> None:
    small = supported(variant, ranks, precision=comparable(variant), micro_batch=1)
    fewest = 2 if small.settings.pipeline_parallel > 1 else 1
    largest = small.step_batch // small.data_parallel_size // fewest
    many = trained(variant, ranks, precision=comparable(variant), micro_batch=1)
    few = trained(variant, ranks, precision=comparable(variant), micro_batch=largest)
    assert many["losses"] == pytest.approx(few["losses"], rel=tolerance(variant))
    assert many["norms"] == pytest.approx(few["norms"], rel=10 * tolerance(variant))


@at_its_widest
@pytest.mark.parametrize("lora_rank", [0, 8])
def test_the_gradient_norm_is_that_of_naive(variant: str, ranks: int, lora_rank: int) -> None:
    precision = comparable(variant)
    supported(variant, ranks, precision=precision, lora_rank=lora_rank, model="bloom-tiny")
    norms, naive = (
        trained(kind, n, precision=precision, lora_rank=lora_rank, model="bloom-tiny")["norms"]
        for kind, n in ((variant, ranks), ("naive", 1))
    )
    assert norms == pytest.approx(naive, rel=10 * tolerance(variant))


@pytest.mark.parametrize("model", ["gpt2-tiny", "llama-tiny", "qwen2-tiny"])
@pytest.mark.parametrize("precision", ["fp32", "bf16-master"])
def test_the_gradient_norm_over_slices_is_that_of_naive_whatever_the_architecture(model: str, precision: str) -> None:
    """GPT-2's matrices of queries, keys and values are one, cut by a function of its own."""
    ways = (("hybrid-tensor2", 2), ("naive", 1))
    seen, naive = (run_ranks(losses_and_norms, n, make_cell(kind, n, precision=precision, model=model))[0] for kind, n in ways)
    assert seen == pytest.approx(naive, rel=1e-4 if precision == "fp32" else 1e-2)


def losses_and_norms(cell: Cell) -> list[float]:
    _, engine, _ = make_engine(cell)
    return [value for _ in range(3) for value in one_step(engine, cell)]


@pytest.mark.parametrize(
    ("base", "variant", "tokens"),
    [
        ("gpt2-tiny", "hybrid", 4001), ("llama-tiny", "hybrid", 4001), ("qwen2-tiny", "hybrid", 4001),
        ("llama-tiny", "hybrid-tensor2", 4002), ("qwen2-tiny", "hybrid-tensor2", 4002),
    ],
)  # fmt: skip
def test_a_vocabulary_that_64_does_not_divide_is_trained_and_saved_as_it_is(base: str, variant: str, tokens: int, tmp_path: Path) -> None:
    """ColossalAI gathers the slices of GPT-2 on a GPU only."""
    preset = PRESETS[base]
    AutoConfig.for_model(preset.model_type, **{**preset.config, "vocab_size": tokens}).save_pretrained(tmp_path)
    seen, naive = (run_ranks(losses_and_rows, n, make_cell(kind, n, model=str(tmp_path)))[0] for kind, n in ((variant, 2), ("naive", 1)))
    assert seen[0] == pytest.approx(naive[0], rel=1e-4)
    assert seen[1] == naive[1] == {tokens}


def losses_and_rows(cell: Cell) -> tuple[list[float], set[int]]:
    """Losses of two steps, and the rows of every matrix of a token each in the whole state."""
    _, engine, _ = make_engine(cell)
    losses = [one_step(engine, cell)[0] for _ in range(2)]
    state = engine.full_state() or {}
    names = ("wte.weight", "embed_tokens.weight", "lm_head.weight")
    return losses, {len(it) for name, it in state.items() if name.endswith(names)}


@at_its_widest
def test_clipping_is_that_of_naive_and_its_absence_still_gives_the_norm(variant: str, ranks: int) -> None:
    """Gradients clipped to a norm near AdamW's epsilon move the weights less, so a missing clip shows in the losses."""
    precision = comparable(variant)
    supported(variant, ranks, precision=precision)
    clipped = trained(variant, ranks, precision=precision, clip_norm=1e-6)
    free = trained(variant, ranks, precision=precision, clip_norm=None)
    naive = trained("naive", 1, precision=precision, clip_norm=1e-6)
    assert clipped["losses"] == pytest.approx(naive["losses"], rel=tolerance(variant))
    assert clipped["losses"][-1] > free["losses"][-1] + 0.05
    assert free["norms"][0] == pytest.approx(clipped["norms"][0], rel=1e-5)
    assert free["norms"] == pytest.approx(trained("naive", 1, precision=precision, clip_norm=None)["norms"], rel=10 * tolerance(variant))


@at_its_widest
@pytest.mark.parametrize("lora_rank", [0, 8])
def test_activation_checkpointing_changes_no_loss(variant: str, ranks: int, lora_rank: int) -> None:
    """BLOOM in full and LLaMA with LoRA; nothing else of the cell changes with it."""
    changes: dict[str, Any] = {
        "precision": comparable(variant),
        "lora_rank": lora_rank,
        "model": "llama-tiny" if lora_rank else "bloom-tiny",
    }
    supported(variant, ranks, **changes)
    supported(variant, ranks, **changes, activation_checkpointing=True)
    with_it, without = (trained(variant, ranks, **changes, **more) for more in ({"activation_checkpointing": True}, {}))
    assert with_it["losses"] == pytest.approx(without["losses"], rel=tolerance(variant))
    assert with_it["dtypes"] == without["dtypes"]


@at_its_widest
def test_two_forward_passes_may_share_one_backward_pass(variant: str, ranks: int) -> None:
    precision = comparable(variant)
    cell = supported(variant, ranks, precision=precision)
    if cell.settings.pipeline_parallel > 1:
        pytest.skip("a pipeline runs whole steps")
    losses = run_ranks(train_pairs, ranks, cell, 3)[0]
    naive = run_ranks(train_pairs, 1, make_cell("naive", 1, precision=precision), 3)[0]
    assert losses == pytest.approx(naive, rel=tolerance(variant))


# ---------------------------------------------------------------------------------------------------------------- precision


@at_its_widest
@pytest.mark.parametrize("precision", get_args(Precision))
def test_a_precision_mode_trains_and_stores_its_type(variant: str, ranks: int, precision: str) -> None:
    supported(variant, ranks, precision=precision)
    run = trained(variant, ranks, precision=precision)
    assert run["losses"] == pytest.approx(trained("naive", 1, precision="fp32")["losses"], rel=2e-2)
    assert run["losses"][-1] < run["losses"][0] - 0.2
    wanted = {"fp32": "float32", "bf16-autocast": "float32", "fp16-master": "float16"}.get(precision, "bfloat16")
    assert set(run["dtypes"].values()) == {f"torch.{wanted}"}


@at_its_widest
def test_masters_keep_what_the_storage_type_would_round_away(variant: str, ranks: int) -> None:
    """A step of 0.001 from a layer norm's weight of 1 is less than half a step of bf16: without masters it never moves."""
    if not {"bf16-master", "bf16-pure"} <= kind_of(variant).precisions:
        pytest.skip("offers only one of the two modes")
    supported(variant, ranks, precision="bf16-pure")
    master, pure = (trained(variant, ranks, precision=mode)["moved"] for mode in ("bf16-master", "bf16-pure"))
    assert pure["transformer.ln_f.weight"] == 0.0
    assert master["transformer.ln_f.weight"] > 0.0


@at_its_widest
def test_a_step_that_overflows_fp16_is_skipped_and_says_so(variant: str, ranks: int) -> None:
    seen = run_ranks(overflow, ranks, supported(variant, ranks, precision="fp16-master"))[0]
    assert seen["norm"] == math.inf
    assert max(seen["moved"].values()) == 0.0
    assert math.isfinite(seen["next"][1])
    assert max(seen["moved_next"].values()) > 0.0


# -------------------------------------------------------------------------------------------------------------- parameters


@at_its_widest
def test_with_lora_only_the_adapters_move(variant: str, ranks: int) -> None:
    precision = comparable(variant)
    supported(variant, ranks, lora_rank=8, precision=precision, model="bloom-tiny")
    moved = trained(variant, ranks, lora_rank=8, precision=precision, model="bloom-tiny")["moved"]
    adapters = {name for name in moved if "lora_" in name}
    assert len(adapters) == 16
    assert all(moved[name] > 0 for name in adapters)
    assert all(change == 0 for name, change in moved.items() if name not in adapters)


@at_its_widest
def test_full_fine_tuning_moves_every_tensor(variant: str, ranks: int) -> None:
    precision = comparable(variant)
    supported(variant, ranks, precision=precision)
    moved = trained(variant, ranks, precision=precision)["moved"]
    assert "lm_head.weight" in moved
    assert all(change > 0 for change in moved.values())


@at_its_widest
def test_the_learning_rate_is_set_for_the_next_step(variant: str, ranks: int) -> None:
    at_zero, at_some = run_ranks(learning_rates, ranks, supported(variant, ranks, precision=comparable(variant), weight_decay=0.0))[0]
    assert max(at_zero.values()) == 0.0
    assert max(at_some.values()) == pytest.approx(0.01, rel=0.3)


# ----------------------------------------------------------------------------------------------------------------- gradients


def synchronised(by_rank: list[dict[str, list[float]]]) -> bool:
    """Whether every rank's optimizer meets the same gradient, and it is that of all ranks' data together.

    Losses are global (already divided by all tokens of the step), so that gradient is the sum over ranks.
    """
    first = by_rank[0]["met"]
    total = [sum(values) for values in zip(*(rank["own"] for rank in by_rank), strict=True)]
    return all(rank["met"] == pytest.approx(first, abs=1e-7) for rank in by_rank) and first == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_ddp_synchronises_gradients(micro_batch: int) -> None:
    assert synchronised(run_ranks(rank_gradients, 2, make_cell("ddp", 2, micro_batch=micro_batch), False))


def test_training_the_module_inside_ddp_is_caught() -> None:
    assert not synchronised(run_ranks(rank_gradients, 2, make_cell("ddp", 2), True))
