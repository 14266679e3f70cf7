"""How many trials a comparison needs, and the smallest difference that so many can find. Torch-free."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from math import exp, log, sqrt
from typing import Any

import numpy as np

from bench.cell import Cell
from bench.matrix import Plan
from bench.report.inventory import BASELINE
from bench.report.parity import comparison_key
from bench.report.past_trials import Spread
from bench.report.statistics import FEWEST, LEVEL, THRESHOLD, needed_trials, sign_patterns
from bench.strategies.base import all_strategies

POWER = 0.8
"""Share of experiments in which a detectable difference is found."""
CVS = (0.01, 0.02)
"""Coefficients of variation between trials that `plan` assumes: a quiet machine, and a usual one."""
_EXPERIMENTS = 400
_PATTERNS = 2048
"""Sign patterns that a simulated test uses at the most; reports use all of them."""
_LARGEST_LOG = log(8.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Comparisons that are judged together: the strategies with the same `naive` partner."""

    cell: Cell
    """One of them, for what they share."""
    comparisons: int
    trials: int

    @property
    def needed(self) -> int:
        """Trials that a lone effect among them needs."""
        return needed_trials(self.comparisons)

    def detectable(self, cv: float) -> float | None:
        """Smallest difference that the planned trials find, as a share of the baseline; None if they can find none."""
        return detectable_difference(self.trials, cv=cv, comparisons=self.comparisons)


@cache
def detectable_difference(trials: int, *, cv: float, comparisons: int = 1) -> float | None:
    """The smallest lone effect among `comparisons` that `trials` pairs find in 80 % of experiments, as a share of the baseline.

    `cv` is the standard deviation over the mean of independent trials of one cell. Found means what the report means by it:
    significant after Benjamini-Hochberg, and a median beyond the threshold of 3 %. Simulated (seeded), since the sign-flip
    test has no closed form. None where even the smallest p is too large, or where only more than eightfold would be found.
    """
    if trials < FEWEST or 2 / 2**trials * comparisons > LEVEL:
        return None
    noise = np.random.default_rng(0).normal(0, cv * sqrt(2), (_EXPERIMENTS, trials))
    patterns = _some_patterns(trials)
    flipped = noise @ patterns.T
    balance = patterns.sum(axis=1)

    def found(effect: float) -> float:
        sums = np.abs(flipped + effect * balance)
        p = np.mean(sums >= sums[:, :1] * (1 - 1e-12), axis=1)
        return float(np.mean((p * comparisons <= LEVEL) & (np.abs(np.median(noise, axis=1) + effect) > THRESHOLD)))

    effect = _smallest(found)
    return None if effect is None else exp(effect) - 1


def _some_patterns(trials: int) -> np.ndarray:
    """All sign patterns, or the observed one and seeded draws of the others where they are many."""
    patterns = sign_patterns(trials)
    if len(patterns) <= _PATTERNS:
        return patterns
    drawn = np.random.default_rng(1).choice(len(patterns) - 1, _PATTERNS - 1, replace=False) + 1
    return patterns[np.concatenate([[0], drawn])]


def _smallest(found: Callable[[float], float], low: float = 0.0, high: float = _LARGEST_LOG) -> float | None:
    """Where the power reaches `POWER`, to a tenth of a per cent, by bisection."""
    if found(high) < POWER:
        return None
    while high - low > 0.001:
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) >= POWER else (middle, high)
    return high


def families(plan: Plan) -> tuple[Family, ...]:
    """The families of a plan in which times will be compared: `naive` is there, and the strategies make timing claims."""
    if plan.limits.shares_devices:
        return ()
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in plan.cells.values():
        groups[comparison_key(cell)].append(cell)
    return tuple(_families(groups.values(), plan.trials))


def _families(groups: Iterable[list[Cell]], trials: int) -> Iterator[Family]:
    for cells in groups:
        compared = [cell for cell in cells if cell.strategy != BASELINE and _is_timed(cell)]
        if compared and any(cell.strategy == BASELINE and _is_timed(cell) for cell in cells):
            yield Family(cell=compared[0], comparisons=len(compared), trials=trials)


def _is_timed(cell: Cell) -> bool:
    """Whether its times can mean something, as far as planning knows."""
    return cell.settings.launcher == "torchrun" and not all_strategies()[cell.strategy].emulated(cell)


def sample_size_lines(plan: Plan, measured: Sequence[Spread] = ()) -> list[str]:
    """What the planned trials can claim, a line for each size of family; one line if nothing will be claimed.

    `measured` are spreads of earlier trials, for which the smallest difference is said too.
    """
    found = Counter((family.cell.stage, family.comparisons) for family in families(plan))
    if not found:
        return ["Claims: none; no naive cell and strategy of one setting are both timed (fork, emulation, side_by_side: no timing claims)."]
    return [_line(stage, comparisons, count, plan.trials, measured) for (stage, comparisons), count in found.items()]


def claims_to_json(plan: Plan, measured: Sequence[Spread] = ()) -> list[dict[str, Any]]:
    """What the planned trials can claim, for programs: an entry for each size of family."""
    found = Counter((family.cell.stage, family.comparisons) for family in families(plan))
    return [
        {
            "stage": stage, "comparisons": comparisons, "families": count, "planned_trials": plan.trials,
            "needed_trials": needed_trials(comparisons),
            "detectable_difference": {f"{cv:g}": detectable_difference(plan.trials, cv=cv, comparisons=comparisons) for cv in CVS},
            "measured": [
                {**asdict(spread), "detectable_difference": _detectable(plan.trials, spread, comparisons)} for spread in measured
            ],
        }
        for (stage, comparisons), count in found.items()
    ]  # fmt: skip


def _detectable(trials: int, spread: Spread, comparisons: int) -> float | None:
    return detectable_difference(trials, cv=max(round(spread.cv, 3), 0.001), comparisons=comparisons)


def _line(stage: str, comparisons: int, count: int, trials: int, measured: Sequence[Spread]) -> str:
    what = f"{comparisons} comparison{'s' * (comparisons > 1)} with naive"
    sets = f"{stage}, {what}{f', {count} times' if count > 1 else ''}"
    needed = needed_trials(comparisons)
    planned = f"{trials} trial{'s' * (trials > 1)} planned"
    if trials < needed:
        return f"Claims ({sets}): a difference needs {needed} trials; {planned}, so `no claim` (which never means no difference)."
    smallest = [(cv, detectable_difference(trials, cv=cv, comparisons=comparisons)) for cv in CVS]
    words = " and ".join(f"{difference:.1%} at a CV of {cv:.0%}" for cv, difference in smallest if difference)
    seen = [_measured(spread, _detectable(trials, spread, comparisons)) for spread in measured]
    return f"Claims ({sets}): needs {needed} trials; {planned}, which find differences from about {words} between trials{''.join(seen)}."


def _measured(spread: Spread, difference: float | None) -> str:
    where = f"the CV of {spread.trials} earlier trials of {spread.cells} cell{'s' * (spread.cells > 1)} on {spread.device}"
    return f"; {'none' if difference is None else f'{difference:.1%}'} at {spread.cv:.1%}, {where}"
