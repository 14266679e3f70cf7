"""The contract of bench/strategies/base.py, for every strategy that is found."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any, get_args

import pytest

from bench.cell import Precision, validate_settings
from bench.strategies.base import all_strategies
from tests.contract.rank_harness import run_ranks
from tests.contract.strategy_work import (
    generate,
    learning_rates,
    make_cell,
    overflow,
    rank_gradients,
    round_trip,
    train_pairs,
    trained,
    two_engines,
    without_colossalai,
)

STRATEGIES = [name for name, strategy in sorted(all_strategies().items()) if strategy.missing() is None]
"""Those whose packages are installed."""
PLACES = [(strategy, ranks) for strategy in STRATEGIES for ranks in (1, 2) if strategy != "naive" or ranks == 1]
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
WIDEST = [(strategy, 1 if strategy == "naive" else 2) for strategy in STRATEGIES]
at_its_widest = pytest.mark.parametrize(("strategy", "ranks"), WIDEST)
every_place = pytest.mark.parametrize(("strategy", "ranks"), PLACES)


def comparable(strategy: str) -> str:
    """The precision mode in which a strategy is compared with naive."""
    return "fp32" if "fp32" in all_strategies()[strategy].precisions else "bf16-master"


def tolerance(strategy: str) -> float:
    """Of losses; gradient norms get ten times as much: in bf16 every addition of an accumulated gradient is rounded."""
    return 1e-4 if comparable(strategy) == "fp32" else 1e-3


def skip_unsupported(strategy: str, ranks: int, **changes: Any) -> None:
    reason = all_strategies()[strategy].unsupported(make_cell(strategy, ranks, **changes))
    if reason:
        pytest.skip(reason)


# ------------------------------------------------------------------------------------------------------------ declarations


@every_strategy
def test_a_strategy_says_what_it_is_and_offers(strategy: str) -> None:
    kind = all_strategies()[strategy]
    assert kind.name == strategy
    assert kind.description
    assert kind.precisions
    assert kind.precisions <= set(get_args(Precision))


@every_strategy
def test_a_precision_that_is_not_offered_is_unsupported_with_its_name(strategy: str) -> None:
    for precision in get_args(Precision):
        reason = all_strategies()[strategy].unsupported(make_cell(strategy, 1, precision=precision))
        assert (reason is None) == (precision in all_strategies()[strategy].precisions)
        assert reason is None or precision in reason


@every_strategy
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_forced_settings_are_settings_and_differ_from_the_cell(strategy: str, device: str) -> None:
    for optimizer in ("adamw", "fused", "hybrid"):
        cell = make_cell(strategy, 1, precision=comparable(strategy), device=device, optimizer=optimizer)
        forced = all_strategies()[strategy].forced_settings(cell)
        validate_settings("sft", {"steps": 1, **forced})
        assert all(getattr(cell.settings, name) != value for name, value in forced.items())


def test_naive_on_two_ranks_is_unsupported() -> None:
    assert "one rank" in str(all_strategies()["naive"].unsupported(make_cell("naive", 2)))


def test_hybrid_adam_on_a_cpu_is_unsupported_where_it_is_not_forced() -> None:
    for strategy in ("naive", "ddp", "zero2"):
        assert "cuda only" in str(all_strategies()[strategy].unsupported(make_cell(strategy, 1, optimizer="hybrid")))
        assert all_strategies()[strategy].unsupported(make_cell(strategy, 1, optimizer="hybrid", device="cuda")) is None


def test_gemini_has_no_fp32_and_forces_its_adam() -> None:
    gemini = all_strategies()["gemini"]
    assert "fp32" not in gemini.precisions
    assert gemini.forced_settings(make_cell("gemini", 1, precision="bf16-master", device="cuda")) == {"optimizer": "hybrid"}
    assert gemini.forced_settings(make_cell("gemini", 1, precision="bf16-master", device="cuda", optimizer="hybrid")) == {}


def test_finding_strategies_imports_no_framework() -> None:
    code = "import sys; from bench.strategies.base import all_strategies; all_strategies(); print(*sys.modules)"
    seen = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not {"torch", "transformers", "colossalai"} & seen


# ------------------------------------------------------------------------------------------------------------------- losses


@every_place
@pytest.mark.parametrize("model", ["bloom-tiny", "llama-tiny"])
@pytest.mark.parametrize("lora_rank", [0, 8])
def test_losses_are_those_of_naive(strategy: str, ranks: int, model: str, lora_rank: int) -> None:
    precision = comparable(strategy)
    skip_unsupported(strategy, ranks, model=model, lora_rank=lora_rank, precision=precision)
    losses = trained(strategy, ranks, model=model, lora_rank=lora_rank, precision=precision)["losses"]
    naive = trained("naive", 1, model=model, lora_rank=lora_rank)["losses"]
    if precision == "fp32":
        assert losses == pytest.approx(naive, rel=1e-4)
    else:
        assert losses[0] == pytest.approx(naive[0], rel=2e-2)
        zero2 = trained("zero2", ranks, model=model, lora_rank=lora_rank, precision=precision)["losses"]
        assert losses == pytest.approx(zero2, rel=1e-3)
    assert losses[-1] < losses[0] - (0.5 if lora_rank == 0 else 0.002)


@every_place
def test_accumulation_changes_nothing(strategy: str, ranks: int) -> None:
    skip_unsupported(strategy, ranks, precision=comparable(strategy))
    small = trained(strategy, ranks, steps=3, precision=comparable(strategy), micro_batch=1)
    large = trained(strategy, ranks, steps=3, precision=comparable(strategy), micro_batch=8 // ranks)
    assert small["losses"] == pytest.approx(large["losses"], rel=tolerance(strategy))
    assert small["norms"] == pytest.approx(large["norms"], rel=10 * tolerance(strategy))


@every_strategy
def test_two_ranks_are_one_rank_at_the_same_global_batch(strategy: str) -> None:
    skip_unsupported(strategy, 2, precision=comparable(strategy))
    one, two = (trained(strategy, ranks, precision=comparable(strategy)) for ranks in (1, 2))
    assert two["losses"] == pytest.approx(one["losses"], rel=tolerance(strategy))
    assert two["norms"] == pytest.approx(one["norms"], rel=10 * tolerance(strategy))


@every_place
@pytest.mark.parametrize("lora_rank", [0, 8])
def test_the_gradient_norm_is_that_of_naive(strategy: str, ranks: int, lora_rank: int) -> None:
    precision = comparable(strategy)
    skip_unsupported(strategy, ranks, precision=precision, lora_rank=lora_rank)
    norms = trained(strategy, ranks, precision=precision, lora_rank=lora_rank)["norms"]
    assert norms == pytest.approx(trained("naive", 1, precision=precision, lora_rank=lora_rank)["norms"], rel=10 * tolerance(strategy))


@every_place
def test_clipping_is_that_of_naive_and_its_absence_still_gives_the_norm(strategy: str, ranks: int) -> None:
    """Gradients clipped to a norm near AdamW's epsilon move the weights less, so a missing clip shows in the losses."""
    precision = comparable(strategy)
    skip_unsupported(strategy, ranks, precision=precision)
    clipped = trained(strategy, ranks, steps=4, precision=precision, clip_norm=1e-6)
    free = trained(strategy, ranks, steps=4, precision=precision, clip_norm=None)
    naive = trained("naive", 1, steps=4, precision=precision, clip_norm=1e-6)
    assert clipped["losses"] == pytest.approx(naive["losses"], rel=tolerance(strategy))
    assert clipped["losses"][-1] > free["losses"][-1] + 0.05
    assert free["norms"][0] == pytest.approx(clipped["norms"][0], rel=1e-5)
    assert free["norms"] == pytest.approx(
        trained("naive", 1, steps=4, precision=precision, clip_norm=None)["norms"], rel=10 * tolerance(strategy)
    )


@at_its_widest
def test_activation_checkpointing_changes_no_loss(strategy: str, ranks: int) -> None:
    precision = comparable(strategy)
    skip_unsupported(strategy, ranks, precision=precision, activation_checkpointing=True)
    for model in ("bloom-tiny", "llama-tiny"):
        with_it = trained(strategy, ranks, steps=3, model=model, precision=precision, activation_checkpointing=True, lora_rank=8)["losses"]
        without = trained(strategy, ranks, model=model, precision=precision, lora_rank=8)["losses"][:3]
        assert with_it == pytest.approx(without, rel=tolerance(strategy))


@at_its_widest
def test_two_forward_passes_may_share_one_backward_pass(strategy: str, ranks: int) -> None:
    precision = comparable(strategy)
    skip_unsupported(strategy, ranks, precision=precision)
    losses = run_ranks(train_pairs, ranks, make_cell(strategy, ranks, precision=precision), 3)[0]
    naive = run_ranks(train_pairs, 1, make_cell("naive", 1, precision=precision), 3)[0]
    assert losses == pytest.approx(naive, rel=tolerance(strategy))


# ---------------------------------------------------------------------------------------------------------------- precision


@at_its_widest
@pytest.mark.parametrize("precision", get_args(Precision))
def test_a_precision_mode_trains_and_stores_its_type(strategy: str, ranks: int, precision: str) -> None:
    skip_unsupported(strategy, ranks, precision=precision)
    run = trained(strategy, ranks, steps=4, precision=precision)
    assert run["losses"] == pytest.approx(trained("naive", 1)["losses"][:4], rel=2e-2)
    assert run["losses"][-1] < run["losses"][0] - 0.2
    wanted = {"fp32": "float32", "bf16-autocast": "float32", "fp16-master": "float16"}.get(precision, "bfloat16")
    assert set(run["dtypes"].values()) == {f"torch.{wanted}"}


@at_its_widest
def test_masters_keep_what_the_storage_type_would_round_away(strategy: str, ranks: int) -> None:
    """A step of 0.001 from a layer norm's weight of 1 is less than half a step of bf16: without masters it never moves."""
    if not {"bf16-master", "bf16-pure"} <= all_strategies()[strategy].precisions:
        pytest.skip("offers only one of the two modes")
    master, pure = (trained(strategy, ranks, steps=4, precision=mode)["moved"] for mode in ("bf16-master", "bf16-pure"))
    assert pure["transformer.ln_f.weight"] == 0.0
    assert master["transformer.ln_f.weight"] > 0.0


@every_strategy
def test_a_step_that_overflows_fp16_is_skipped_and_says_so(strategy: str) -> None:
    skip_unsupported(strategy, 1, precision="fp16-master")
    seen = run_ranks(overflow, 1, make_cell(strategy, 1, precision="fp16-master"))[0]
    assert seen["norm"] == math.inf
    assert seen["moved"] == 0.0
    assert math.isfinite(seen["next"][1])
    assert seen["moved_next"] > 0.0


# -------------------------------------------------------------------------------------------------------------- parameters


@at_its_widest
def test_with_lora_only_the_adapters_move(strategy: str, ranks: int) -> None:
    precision = comparable(strategy)
    skip_unsupported(strategy, ranks, lora_rank=8, precision=precision)
    moved = trained(strategy, ranks, lora_rank=8, precision=precision)["moved"]
    adapters = {name for name in moved if "lora_" in name}
    assert len(adapters) == 16
    assert all(moved[name] > 0 for name in adapters)
    assert all(change == 0 for name, change in moved.items() if name not in adapters)


@at_its_widest
def test_full_fine_tuning_moves_every_tensor(strategy: str, ranks: int) -> None:
    precision = comparable(strategy)
    skip_unsupported(strategy, ranks, precision=precision)
    moved = trained(strategy, ranks, precision=precision)["moved"]
    assert "lm_head.weight" in moved
    assert all(change > 0 for change in moved.values())


@every_strategy
def test_the_learning_rate_is_set_for_the_next_step(strategy: str) -> None:
    at_zero, at_some = run_ranks(learning_rates, 1, make_cell(strategy, 1, precision=comparable(strategy), weight_decay=0.0))[0]
    assert at_zero == 0.0
    assert at_some == pytest.approx(0.01, rel=0.3)


@at_its_widest
@pytest.mark.parametrize("lora_rank", [0, 8])
@pytest.mark.parametrize("scorer", [False, True])
def test_the_full_state_survives_a_checkpoint(strategy: str, ranks: int, lora_rank: int, scorer: bool, tmp_path: Any) -> None:
    precision = comparable(strategy)
    cell = make_cell(strategy, ranks, precision=precision, lora_rank=lora_rank)
    skip_unsupported(strategy, ranks, precision=precision, lora_rank=lora_rank)
    seen = run_ranks(round_trip, ranks, cell, scorer, str(tmp_path / "weights"))[0]
    assert seen["difference"] < (1e-5 if precision == "fp32" else 0.05)
    assert seen["learned"] > 0.1


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


# ---------------------------------------------------------------------------------------------------------------------- PPO


@at_its_widest
@pytest.mark.parametrize("model", ["bloom-tiny", "llama-tiny", "gpt2-tiny"])
def test_generation_with_a_cache_is_that_without(strategy: str, ranks: int, model: str) -> None:
    precision = comparable(strategy)
    skip_unsupported(strategy, ranks, precision=precision, model=model)
    seen = run_ranks(generate, ranks, make_cell(strategy, ranks, precision=precision, model=model, lora_rank=8))
    for rank in seen:
        assert rank["difference"] < (1e-4 if precision == "fp32" else 0.05)
        assert rank["same"] or precision != "fp32"
        assert math.isfinite(rank["loss"])


@at_its_widest
@pytest.mark.parametrize("lora_rank", [0, 8])
def test_a_policy_and_a_critic_train_side_by_side(strategy: str, ranks: int, lora_rank: int) -> None:
    precision = comparable(strategy)
    skip_unsupported(strategy, ranks, precision=precision, lora_rank=lora_rank)
    seen = run_ranks(two_engines, ranks, make_cell(strategy, ranks, precision=precision, lora_rank=lora_rank), 4)[0]
    naive = run_ranks(two_engines, 1, make_cell("naive", 1, precision=precision, lora_rank=lora_rank), 4)[0]
    assert seen["policy"] == pytest.approx(naive["policy"], rel=tolerance(strategy))
    assert seen["critic"] == pytest.approx(naive["critic"], rel=20 * tolerance(strategy))
    assert seen["critic"][-1] < seen["critic"][0]
    assert len(set(seen["reference"])) == 1


# --------------------------------------------------------------------------------------------------------- without ColossalAI


@every_strategy
def test_strategies_of_plain_torch_need_no_colossalai(strategy: str) -> None:
    kind = all_strategies()[strategy]
    cell = make_cell(strategy, 1, precision=comparable(strategy))
    assert kind.emulated(cell) == kind.uses_colossalai
    assert not kind.emulated(dataclasses.replace(cell, settings=dataclasses.replace(cell.settings, device="cuda")))
    if kind.uses_colossalai:
        with pytest.raises(AssertionError, match=r"ImportError|ModuleNotFoundError"):
            run_ranks(without_colossalai, 1, cell)
    else:
        assert run_ranks(without_colossalai, 1, cell)[0] == pytest.approx(trained(strategy, 1)["losses"][0])
