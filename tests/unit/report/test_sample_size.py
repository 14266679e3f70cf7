from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bench.cell import Cell
from bench.matrix import Plan, make_plan
from bench.report.past_trials import Spread
from bench.report.sample_size import claims_to_json, detectable_difference, families, sample_size_lines
from bench.report.statistics import THRESHOLD, compare_all, verdicts
from tests.unit.report.test_statistics_simulated import simulated

SUITE = """
suite: sizes
trials: {trials}
axes: {{stage: [sft], model: [bloom-tiny], strategy: [{strategies}], lora_rank: [0, 8]}}
settings: {{device: {device}, launcher: {launcher}, precision: bf16-master}}
stages: {{sft: {{steps: 30}}}}
"""


def plan_of(
    folder: Path, *, trials: int = 7, strategies: str = "naive, ddp, zero2, gemini", device: str = "cuda", launcher: str = "torchrun"
) -> Plan:
    path = folder / "sizes.yaml"
    path.write_text(SUITE.format(trials=trials, strategies=strategies, device=device, launcher=launcher), encoding="utf-8")
    return make_plan(path)


@pytest.mark.parametrize(("trials", "cv"), [(7, 0.01), (7, 0.02), (10, 0.03), (16, 0.03)])
def test_the_detectable_difference_is_found_four_times_of_five_and_half_of_it_is_not(trials: int, cv: float) -> None:
    """Against fresh simulations with the report's own verdicts."""
    smallest = detectable_difference(trials, cv=cv)
    assert smallest is not None
    for effect, low, high in ((smallest, 0.72, 0.90), (smallest / 2, 0.0, 0.55)):
        items = compare_all(simulated(1 + effect, cv=cv, experiments=1_000, pairs=trials, seed=11))
        assert low <= sum(verdicts([item])[0] == "faster" for item in items) / 1_000 <= high


def test_more_trials_less_noise_and_fewer_comparisons_find_smaller_differences() -> None:
    usual = detectable_difference(8, cv=0.03, comparisons=3) or 0
    assert (detectable_difference(12, cv=0.03, comparisons=3) or 1) < usual
    assert (detectable_difference(8, cv=0.02, comparisons=3) or 1) < usual
    assert (detectable_difference(8, cv=0.03, comparisons=1) or 1) < usual


def test_nothing_below_the_practical_threshold_is_detectable() -> None:
    assert (detectable_difference(14, cv=0.001) or 0) >= THRESHOLD


def test_too_few_trials_detect_nothing_however_large() -> None:
    assert detectable_difference(5, cv=0.01) is None
    assert detectable_difference(7, cv=0.01, comparisons=24) is None


def test_a_family_is_the_strategies_with_one_naive_partner(tmp_path: Path) -> None:
    assert [(family.cell.lora_rank, family.comparisons, family.needed) for family in families(plan_of(tmp_path))] == [(0, 3, 7), (8, 3, 7)]


def test_the_plan_says_what_so_many_trials_can_claim(tmp_path: Path) -> None:
    [line] = sample_size_lines(plan_of(tmp_path))
    assert line.startswith(
        "Claims (sft, 3 comparisons with naive, 2 times): needs 7 trials; 7 trials planned, which find differences from about "
    )
    assert line.endswith("% at a CV of 2% between trials.")


def test_the_plan_says_what_is_found_at_the_spread_of_earlier_trials(tmp_path: Path) -> None:
    spread = Spread(cv=0.0123, cells=2, trials=14, device="NVIDIA H100")
    [line] = sample_size_lines(plan_of(tmp_path), [spread])
    difference = detectable_difference(7, cv=0.012, comparisons=3) or 0
    assert line.endswith(f" between trials; {difference:.1%} at 1.2%, the CV of 14 earlier trials of 2 cells on NVIDIA H100.")
    [entry] = claims_to_json(plan_of(tmp_path), [spread])
    assert entry["measured"][0]["detectable_difference"] == difference


def test_the_plan_says_that_too_few_trials_claim_nothing(tmp_path: Path) -> None:
    [line] = sample_size_lines(plan_of(tmp_path, trials=6))
    assert line.endswith("a difference needs 7 trials; 6 trials planned, so `no claim` (which never means no difference).")


def cells_of(plan: Plan) -> list[Cell]:
    return list(plan.cells.values())


def test_forked_and_emulated_cells_and_those_without_naive_are_no_family(tmp_path: Path) -> None:
    forked = plan_of(tmp_path, device="cpu", launcher="fork", strategies="naive, ddp")
    assert len(cells_of(forked)) == 4
    assert families(forked) == ()
    assert families(plan_of(tmp_path, strategies="ddp, zero2")) == ()
    [full, adapters] = families(plan_of(tmp_path, device="cpu", strategies="naive, ddp, zero2"))
    assert (full.comparisons, adapters.comparisons) == (1, 1)  # zero2 is emulated on a CPU
    assert sample_size_lines(forked)[0].startswith("Claims: none;")


def test_trials_side_by_side_are_no_family(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    beside = dataclasses.replace(plan, limits=dataclasses.replace(plan.limits, side_by_side=4))
    assert families(plan)
    assert families(beside) == ()
