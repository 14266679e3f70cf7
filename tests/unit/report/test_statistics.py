from __future__ import annotations

import random
from statistics import fmean

import pytest

from bench.report.statistics import Summary, adjust, compare, needed_trials, verdicts


def jittered(ratio: float, n: int, *, spread: float, seed: int) -> list[float]:
    draw = random.Random(seed)  # noqa: S311
    return [ratio * (1 + draw.gauss(0, spread)) for _ in range(n)]


def test_below_six_trials_there_is_no_interval() -> None:
    assert Summary((1.0, 2.0, 3.0, 4.0, 5.0)).interval is None


def test_six_trials_span_smallest_to_largest() -> None:
    assert Summary((6.0, 1.0, 5.0, 2.0, 4.0, 3.0)).interval == (1.0, 6.0)


def test_more_trials_narrow_the_interval() -> None:
    """n = 9: dropping one at each end covers with 1 - 2 * 10 / 512 = 96.1 %; n = 15: three with 96.5 %."""
    assert Summary(tuple(map(float, range(9)))).interval == (1.0, 7.0)
    assert Summary(tuple(map(float, range(15)))).interval == (3.0, 11.0)


def test_the_smallest_p_of_n_pairs() -> None:
    assert compare([1.1] * 6).p_value == pytest.approx(2 / 2**6)


def test_single_trials_claim_nothing() -> None:
    assert verdicts([compare([1.5])]) == ["no claim (n=1)"]
    assert verdicts([compare([1.5] * 5)]) == ["no claim (n=5)"]


def test_a_lone_effect_among_several_needs_more_trials() -> None:
    same = compare([1.0, 1.04, 0.96, 1.05, 0.95, 1.0])
    assert verdicts([compare([1.5] * 6), *[same] * 5])[0] == "no claim (n=6, needs 8)"
    assert needed_trials(6) == 8


def test_a_clear_effect_is_found() -> None:
    assert verdicts([compare([1.5, 1.51, 1.49, 1.5, 1.52, 1.5])]) == ["faster"]
    assert verdicts([compare([0.5, 0.51, 0.49, 0.5, 0.52, 0.5])]) == ["slower"]


def test_a_difference_within_three_percent_is_equal() -> None:
    assert verdicts([compare([1.01, 1.012, 1.011, 1.009, 1.013, 1.01])]) == ["equal"]


def test_noise_is_inconclusive_and_never_equal() -> None:
    assert verdicts([compare([1.2, 0.8, 1.3, 0.7, 1.25, 0.85])]) == ["inconclusive"]


def test_a_against_a_is_never_faster_or_slower() -> None:
    """2,000 null experiments at 1 % noise: the threshold keeps false claims far below the level."""
    found = [verdicts([compare(jittered(1.0, 7, spread=0.014, seed=seed))])[0] for seed in range(2000)]
    assert fmean(verdict in ("faster", "slower") for verdict in found) < 0.005
    assert fmean(verdict == "equal" for verdict in found) > 0.8


def test_a_planted_slowdown_of_five_percent_is_found_with_seven_trials() -> None:
    found = [verdicts([compare(jittered(0.95, 7, spread=0.014, seed=seed))])[0] for seed in range(300)]
    assert fmean(verdict == "slower" for verdict in found) > 0.9


def test_many_pairs_are_sampled_and_repeatable() -> None:
    ratios = jittered(1.06, 20, spread=0.01, seed=1)
    assert compare(ratios) == compare(ratios)
    assert verdicts([compare(ratios)]) == ["faster"]


def test_adjusted_p_values_are_monotone_and_at_most_one() -> None:
    assert adjust([0.9, 0.01, 0.8]) == [pytest.approx(0.9), pytest.approx(0.03), pytest.approx(0.9)]
    assert adjust([]) == []


@pytest.mark.parametrize(
    ("ratios", "p_value", "p_equal", "interval"),
    [
        ([1.1, 1.12, 1.08, 1.11, 1.09, 1.13], 0.03125, 1.0, (1.08, 1.13)),
        ([1.021, 0.994, 1.043, 1.012, 0.981, 1.037, 1.052], 0.109375, 0.1796875, (0.981, 1.052)),
        ([0.951, 0.972, 1.004, 0.938, 0.961, 0.990, 1.011, 0.945, 0.969, 0.957], 0.01171875, 0.5712890625, (0.945, 1.004)),
    ],
)
def test_tests_and_intervals_are_those_of_scipy(ratios: list[float], p_value: float, p_equal: float, interval: tuple[float, float]) -> None:
    """From SciPy 1.17.1: permutation_test (samples, all resamples) of the log-ratios, quantile_test(...).confidence_interval."""
    found = compare(ratios)
    assert (found.p_value, found.p_equal, found.interval) == (p_value, p_equal, interval)


def test_adjusted_p_values_are_those_of_scipy() -> None:
    """scipy.stats.false_discovery_control, 1.17.1."""
    assert adjust([0.001, 0.04, 0.03, 0.2, 0.04, 0.9]) == pytest.approx([0.006, 0.06, 0.06, 0.24, 0.06, 0.9])


def test_equality_is_a_claim_of_its_family_too() -> None:
    """The smallest p of equality at 6 pairs is 1/64: enough among two comparisons, not for the only equal one among six."""
    same, wild = compare([1.0, 1.001, 0.999, 1.002, 0.998, 1.0]), compare([1.2, 0.8, 1.3, 0.7, 1.25, 0.85])
    assert verdicts([same, wild])[0] == "equal"
    assert verdicts([same, *[wild] * 5])[0] == "no claim (n=6, needs 8)"


def test_one_far_outlier_makes_no_claim_against_the_other_trials() -> None:
    """Fifteen pairs slightly below 1 and one far above: mean and median disagree, so neither direction is claimed."""
    assert compare([0.96] * 15 + [40.0]).beyond is None
    assert compare([0.96] * 16).beyond == "slower"
