"""Intervals and paired comparisons over independent trials. Pure; the unit of replication is a trial, never a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import ceil, comb, log, log2
from statistics import fmean, median

import numpy as np

LEVEL = 0.05
COVERAGE = 0.95
THRESHOLD = log(1.03)
"""Practical threshold: log-ratios within 3 % count as equal."""
FEWEST = 6
"""Trials below which all points are shown and nothing is claimed."""
BOOTSTRAP = 15
"""Trials from which the interval is a bootstrap's."""
LARGEST_EXACT = 14
"""Pairs up to which every sign pattern is enumerated; beyond, 20,000 seeded ones are drawn."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Values of one metric over a cell's trials."""

    points: tuple[float, ...]

    @property
    def middle(self) -> float:
        """Median over trials."""
        return median(self.points)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Interval of the median at 95 %: order statistics, from 15 trials on the percentile bootstrap; None below 6 trials.

        >>> Summary((3.0, 1.0, 2.0, 5.0, 4.0, 6.0)).interval
        (1.0, 6.0)
        """
        n = len(self.points)
        if n < FEWEST:
            return None
        ordered = sorted(self.points)
        if n >= BOOTSTRAP:
            return _bootstrap(ordered)
        cut = max(k for k in range(n // 2) if k == 0 or _coverage(n, k) >= COVERAGE)
        return ordered[cut], ordered[n - 1 - cut]


def _coverage(n: int, cut: int) -> float:
    """Probability that the median lies between the order statistics left after dropping `cut` at each end."""
    return 1 - 2 * sum(comb(n, k) for k in range(cut + 1)) / 2**n


def _bootstrap(ordered: Sequence[float]) -> tuple[float, float]:
    """Percentile bootstrap of the median, over all n^n resamples at once instead of some: exact, without a seed."""
    lower, upper, shares = _resampled_medians(len(ordered))
    values = np.asarray(ordered)
    medians = (values[lower] + values[upper]) / 2
    order = np.argsort(medians, kind="stable")
    total = np.cumsum(shares[order])
    first, last = np.searchsorted(total, ((1 - COVERAGE) / 2, (1 + COVERAGE) / 2))
    return float(medians[order[first]]), float(medians[order[min(last, len(order) - 1)]])


@cache
def _resampled_medians(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often the two middle values of a resample are the order statistics i and j: (i, j, share), i <= j, counted from 0.

    i < j: exactly half of the draws are at most i, one of them i, and the others at least j, one of them j (Hutson and
    Ernst, The exact bootstrap mean and variance of an L-estimator, 2000, theorem 2). For odd n both are the one middle value.
    """
    edges = np.arange(n + 1) / n
    middle = np.array([_at_least(n, (n + 1) // 2, share) for share in edges])
    alone = np.diff(middle)
    if n % 2:
        return np.arange(n), np.arange(n), alone
    i, j = np.triu_indices(n)
    below, above = np.diff(edges ** (n // 2)), -np.diff((1 - edges) ** (n // 2))
    shares = np.where(i < j, comb(n, n // 2) * below[i] * above[j], 0.0)
    apart = np.zeros(n)
    np.add.at(apart, i, shares)
    return i, j, np.where(i < j, shares, (alone - apart)[i])


def _at_least(n: int, least: int, share: float) -> float:
    """Probability that at least `least` of n draws fall where each falls with probability `share`."""
    return sum(comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(least, n + 1))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Paired comparison of a candidate with its baseline; ratios above 1 mean that the candidate is faster."""

    ratios: tuple[float, ...]
    """Candidate / baseline of each trial pair."""
    p_value: float
    """Two-sided sign-flip permutation test of log-ratios against 0."""
    p_equal: float
    """Larger of two one-sided sign-flip tests against the thresholds."""

    @property
    def middle(self) -> float:
        """Median ratio."""
        return median(self.ratios)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Interval of the median ratio at 95 %; None below 6 pairs."""
        return Summary(self.ratios).interval

    @property
    def beyond(self) -> str | None:
        """`faster` or `slower` where median and mean log-ratio agree on a difference beyond the threshold, else None."""
        centre, mean = log(self.middle), fmean(map(log, self.ratios))
        if abs(centre) <= THRESHOLD or centre * mean <= 0:
            return None
        return "faster" if centre > 0 else "slower"


def compare(ratios: Sequence[float]) -> Comparison:
    """Test paired ratios (all above 0)."""
    return compare_all(np.asarray([ratios], dtype=float))[0]


def compare_all(ratios: np.ndarray) -> list[Comparison]:
    """Test many comparisons of equally many pairs at once: a comparison a row."""
    logs = np.log(ratios)
    p_equal = np.maximum(one_sided(logs + THRESHOLD), one_sided(THRESHOLD - logs))
    return [Comparison(tuple(row.tolist()), float(p), float(q)) for row, p, q in zip(ratios, two_sided(logs), p_equal, strict=True)]


@cache
def sign_patterns(n: int) -> np.ndarray:
    """Signs of n pairs, a pattern a row: all 2^n of them, or beyond 14 pairs the observed one and 20,000 seeded draws."""
    if n <= LARGEST_EXACT:
        return np.array(list(product((1.0, -1.0), repeat=n)))
    drawn = np.random.default_rng(0).choice((1.0, -1.0), size=(20_000, n))
    return np.vstack([np.ones(n), drawn])


def two_sided(logs: np.ndarray) -> np.ndarray:
    """P values of sign-flip tests against a centre of 0; the last axis holds the pairs."""
    sums = np.abs(logs @ sign_patterns(logs.shape[-1]).T)
    return np.mean(sums >= sums[..., :1] * (1 - 1e-12), axis=-1)


def one_sided(logs: np.ndarray) -> np.ndarray:
    """P values of the hypothesis that the centre is at most 0; the last axis holds the pairs."""
    sums = logs @ sign_patterns(logs.shape[-1]).T
    return np.mean(sums >= sums[..., :1] - np.abs(sums[..., :1]) * 1e-12, axis=-1)


def adjust(p_values: Sequence[float]) -> list[float]:
    """Benjamini-Hochberg adjusted p values, in the order given.

    >>> [round(p, 3) for p in adjust([0.01, 0.04, 0.03])]
    [0.03, 0.04, 0.04]
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index], reverse=True)
    adjusted, least = [0.0] * len(p_values), 1.0
    for rank, index in zip(range(len(p_values), 0, -1), order, strict=True):
        least = min(least, p_values[index] * len(p_values) / rank)
        adjusted[index] = least
    return adjusted


def needed_trials(comparisons: int) -> int:
    """Trials that a lone effect among so many comparisons needs: the smallest p of n pairs is 2 / 2^n.

    >>> [needed_trials(m) for m in (1, 3, 6, 24)]
    [6, 7, 8, 10]
    """
    return max(FEWEST, ceil(log2(2 * max(comparisons, 1) / LEVEL)))


def verdicts(comparisons: Sequence[Comparison]) -> list[str]:
    """A verdict for each comparison of one family: faster, slower, equal, inconclusive, or no claim with what is lacking."""
    needed = needed_trials(len(comparisons))
    differ, equal = adjust([item.p_value for item in comparisons]), adjust([item.p_equal for item in comparisons])
    return [_verdict(item, p, q, needed) for item, p, q in zip(comparisons, differ, equal, strict=True)]


def _verdict(item: Comparison, p_differ: float, p_equal: float, needed: int) -> str:
    """From p values that are adjusted over the family: that of a difference, and that of two one-sided tests of equality."""
    n = len(item.ratios)
    if n < FEWEST:
        return f"no claim (n={n})"
    if p_differ <= LEVEL and item.beyond:
        return item.beyond
    if p_equal <= LEVEL:
        return "equal"
    return f"no claim (n={n}, needs {needed})" if n < needed else "inconclusive"
