"""Intervals and paired comparisons over independent trials. Pure; the unit of replication is a trial, never a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import ceil, comb, log, log2
from statistics import median

import numpy as np

LEVEL = 0.05
COVERAGE = 0.95
THRESHOLD = log(1.03)
"""Practical threshold: log-ratios within 3 % count as equal."""
FEWEST = 6
"""Trials below which all points are shown and nothing is claimed."""
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
        """Order-statistic interval that covers the median with at least 95 %; None below 6 trials.

        >>> Summary((3.0, 1.0, 2.0, 5.0, 4.0, 6.0)).interval
        (1.0, 6.0)
        """
        n = len(self.points)
        if n < FEWEST:
            return None
        ordered = sorted(self.points)
        cut = max(k for k in range(n // 2) if k == 0 or _coverage(n, k) >= COVERAGE)
        return ordered[cut], ordered[n - 1 - cut]


def _coverage(n: int, cut: int) -> float:
    """Probability that the median lies between the order statistics left after dropping `cut` at each end."""
    return 1 - 2 * sum(comb(n, k) for k in range(cut + 1)) / 2**n


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


def compare(ratios: Sequence[float]) -> Comparison:
    """Test paired ratios (all above 0)."""
    logs = np.log(np.asarray(ratios, dtype=float))
    return Comparison(
        tuple(ratios), _two_sided(logs), max(_one_sided(logs + THRESHOLD), _one_sided(THRESHOLD - logs))
    )  # fmt: skip


@cache
def _signs(n: int) -> np.ndarray:
    if n <= LARGEST_EXACT:
        return np.array(list(product((1.0, -1.0), repeat=n)))
    drawn = np.random.default_rng(0).choice((1.0, -1.0), size=(20_000, n))
    return np.vstack([np.ones(n), drawn])


def _two_sided(values: np.ndarray) -> float:
    sums = np.abs(_signs(len(values)) @ values)
    return float(np.mean(sums >= sums[0] * (1 - 1e-12)))


def _one_sided(values: np.ndarray) -> float:
    """P of the hypothesis that the centre of `values` is at most 0."""
    sums = _signs(len(values)) @ values
    return float(np.mean(sums >= sums[0] - abs(sums[0]) * 1e-12))


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
    adjusted = adjust([item.p_value for item in comparisons])
    return [_verdict(item, p, needed) for item, p in zip(comparisons, adjusted, strict=True)]


def _verdict(item: Comparison, adjusted: float, needed: int) -> str:
    n = len(item.ratios)
    if n < FEWEST:
        return f"no claim (n={n})"
    if adjusted <= LEVEL and abs(log(item.middle)) > THRESHOLD:
        return "faster" if item.middle > 1 else "slower"
    if item.p_equal <= LEVEL:
        return "equal"
    return f"no claim (n={n}, needs {needed})" if n < needed else "inconclusive"
