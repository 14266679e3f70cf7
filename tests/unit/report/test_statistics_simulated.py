"""The ruler measured: simulated trials with a known truth, through the same functions that reports use."""

from __future__ import annotations

import numpy as np
import pytest

from bench.report.statistics import THRESHOLD, Summary, adjust, compare_all, needed_trials, sign_patterns, two_sided, verdicts

FALSE_SHARE = 0.05
CLAIMS = ("faster", "slower")


def simulated(ratio: float, *, cv: float, experiments: int, pairs: int, seed: int = 1) -> np.ndarray:
    """Ratios of candidate over baseline, two independent trials a pair: (experiment, pair)."""
    draw = np.random.default_rng(seed)
    baseline, candidate = draw.normal(1, cv, (2, experiments, pairs))
    return ratio * candidate / baseline


def alone(ratios: np.ndarray) -> list[str]:
    """Verdict of each experiment as a family of its own."""
    return [verdicts([item])[0] for item in compare_all(ratios)]


def share(found: list[str], *words: str) -> float:
    return sum(verdict in words for verdict in found) / len(found)


@pytest.mark.parametrize(("members", "pairs", "cv"), [(1, 6, 0.05), (3, 7, 0.02), (3, 7, 0.10)])
def test_families_of_equals_hold_a_false_verdict_in_at_most_one_of_twenty(members: int, pairs: int, cv: float) -> None:
    """10,000 families; CV up to 10 %, where the threshold of 3 % no longer protects by itself."""
    items = compare_all(simulated(1.0, cv=cv, experiments=10_000 * members, pairs=pairs))
    families = [verdicts(items[first : first + members]) for first in range(0, len(items), members)]
    assert sum(any(verdict in CLAIMS for verdict in family) for family in families) / len(families) <= FALSE_SHARE


def test_equals_that_share_one_baseline_hold_the_level_too() -> None:
    """In a report all strategies of a family are compared with the same naive trials, so the comparisons are correlated."""
    draw = np.random.default_rng(2)
    baseline, candidates = draw.normal(1, 0.1, (5_000, 1, 8)), draw.normal(1, 0.1, (5_000, 6, 8))
    items = compare_all((candidates / baseline).reshape(-1, 8))
    families = [verdicts(items[first : first + 6]) for first in range(0, len(items), 6)]
    assert sum(any(verdict in CLAIMS for verdict in family) for family in families) / len(families) <= FALSE_SHARE


def is_false(verdict: str, truth: float) -> bool:
    """Whether a verdict contradicts the truth; equal is false at the threshold already."""
    apart = abs(np.log(truth)) >= THRESHOLD - 1e-9
    return (verdict == "faster" and truth <= 1) or (verdict == "slower" and truth >= 1) or (verdict == "equal" and bool(apart))


@pytest.mark.parametrize(
    ("members", "pairs", "cv", "truths"),
    [
        (3, 7, 0.02, (1.0, 1.03, 1 / 1.03, 0.95, 1.1)),
        (6, 8, 0.02, (1.0, 1.03, 1 / 1.03, 0.95, 1.1)),
        (6, 8, 0.01, (1.03, 1 / 1.03)),
        (3, 8, 0.005, (1.0, 1.03)),
    ],
)
def test_families_hold_any_false_verdict_in_at_most_one_of_twenty(members: int, pairs: int, cv: float, truths: tuple[float, ...]) -> None:
    """10,000 families of strategies against one baseline: equals, differences, and the worst case of equality, mixed."""
    draw = np.random.default_rng(7)
    truth = draw.choice(truths, (10_000, members))
    baseline, candidates = draw.normal(1, cv, (10_000, 1, pairs)), draw.normal(1, cv, (10_000, members, pairs))
    items = compare_all((truth[..., None] * candidates / baseline).reshape(-1, pairs))
    families = [verdicts(items[first : first + members]) for first in range(0, len(items), members)]
    wrong = [any(map(is_false, family, row)) for family, row in zip(families, truth.tolist(), strict=True)]
    assert sum(wrong) / len(wrong) <= FALSE_SHARE
    assert sum(verdict in (*CLAIMS, "equal") for family in families for verdict in family) > len(items) / 5  # it does decide


def test_a_against_a_is_equal_in_a_thousand_experiments() -> None:
    """7 + 7 trials at a trial CV of 1 %, the CV of a quiet machine."""
    found = alone(simulated(1.0, cv=0.01, experiments=1_000, pairs=7))
    assert share(found, "equal") > 0.95
    assert share(found, *CLAIMS) == 0


@pytest.mark.parametrize(("cv", "power"), [(0.01, 1.0), (0.02, 0.94), (0.03, 0.69)])
def test_a_planted_slowdown_of_five_percent_at_seven_and_seven_trials_is_found(cv: float, power: float) -> None:
    found = alone(simulated(0.95, cv=cv, experiments=5_000, pairs=7))
    assert share(found, "slower") == pytest.approx(power, abs=0.03)
    assert share(found, "faster") == 0


def test_a_planted_difference_beyond_the_threshold_is_rarely_called_equal() -> None:
    """The true ratio stands at the threshold itself: the worst case of the two one-sided tests."""
    for ratio in (1.03, 1 / 1.03):
        assert share(alone(simulated(ratio, cv=0.01, experiments=5_000, pairs=8)), "equal") <= FALSE_SHARE + 0.005


def test_a_difference_within_the_threshold_is_never_a_claim() -> None:
    found = alone(simulated(0.99, cv=0.002, experiments=2_000, pairs=7))
    assert share(found, "equal") > 0.99


def test_at_seven_trials_and_twenty_four_comparisons_a_lone_effect_is_never_found() -> None:
    """However large it is: the smallest p of 7 pairs is 2/128, and 24 x that is above the level."""
    effects = simulated(0.5, cv=0.001, experiments=200, pairs=7)
    others = simulated(1.0, cv=0.01, experiments=200 * 23, pairs=7, seed=3).reshape(200, 23, 7)
    for effect, rest in zip(effects, others, strict=True):
        assert verdicts(compare_all(np.vstack([effect[None], rest])))[0] == f"no claim (n=7, needs {needed_trials(24)})"


@pytest.mark.parametrize("members", [1, 3, 6, 24])
def test_the_needed_trials_are_the_fewest_that_can_find_a_lone_effect(members: int) -> None:
    least = needed_trials(members)
    for pairs, found in ((least, True), (least - 1, False)):
        p = float(two_sided(np.full(pairs, 0.5)))
        assert (adjust([p, *[1.0] * (members - 1)])[0] <= 0.05) is found


@pytest.mark.parametrize("pairs", [6, 9, 14, 15, 20, 31])
def test_the_interval_covers_the_median(pairs: int) -> None:
    """Order statistics cover with at least 95 %; the bootstrap comes near it. Skewed values, as times are."""
    values = np.random.default_rng(pairs).lognormal(0, 0.5, (4_000, pairs))
    intervals = [Summary(tuple(row)).interval for row in values.tolist()]
    covered = sum(low <= 1.0 <= high for low, high in filter(None, intervals)) / len(values)
    assert covered >= (0.945 if pairs < 15 else 0.925)
    assert covered <= 0.995


@pytest.mark.parametrize("count", [15, 16])
def test_the_exact_bootstrap_is_what_resampling_converges_to(count: int) -> None:
    draw = np.random.default_rng(4)
    values = np.sort(draw.normal(size=count))
    resampled = np.median(values[draw.integers(0, count, (200_000, count))], axis=1)
    low, high = Summary(tuple(values.tolist())).interval or (0, 0)
    for end, share_below in ((low, 0.025), (high, 0.975)):
        assert np.mean(resampled < end - 1e-12) <= share_below + 0.002
        assert np.mean(resampled <= end + 1e-12) >= share_below - 0.002


def test_beyond_fourteen_pairs_sampled_signs_agree_with_all_signs() -> None:
    """20 pairs, of which 6 are 0: their signs do not matter, so the exact p is that of the other 14."""
    logs = np.random.default_rng(5).normal(0.3, 1, 14)
    padded = np.concatenate([logs, np.zeros(6)])
    assert len(sign_patterns(20)) == 20_001
    assert float(two_sided(padded)) == pytest.approx(float(two_sided(logs)), abs=0.01)


def test_sign_flips_hold_the_level_for_skewed_symmetric_and_discrete_noise() -> None:
    draw = np.random.default_rng(6)
    pairs = draw.lognormal(0, 0.3, (2, 10_000, 8))
    assert np.mean(two_sided(np.log(pairs[0] / pairs[1])) <= 0.05) <= FALSE_SHARE + 0.005
    assert np.mean(two_sided(draw.choice((-1.0, 1.0), (10_000, 8))) <= 0.05) <= FALSE_SHARE + 0.005
