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
