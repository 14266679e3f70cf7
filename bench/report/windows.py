"""The timed window of a trial: which laps count, and whether they are steady. Rules: docs/metrics.md, "The timed window"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from bench.record import Lap, Part, Record

WARM_UP_LAPS = {"sft": 5, "rm": 5, "ppo": 2}
"""Laps that are dropped first; a PPO lap is one iteration unless the suite says otherwise."""
STEADY = 0.02
"""Largest relative difference of half medians, and of the slope over the window."""
PUBLISHABLE = {"sft": (30, 60.0), "rm": (30, 60.0), "ppo": (5, 120.0)}
"""Least steps (PPO: iterations) and seconds of a window; shorter ones are labelled indicative."""
LARGEST_SLOPE_POINTS = 60


class JobLap(NamedTuple):
    """One lap over all ranks."""

    first_step: int
    steps: int
    seconds: float
    """Of the slowest rank."""
    seconds_by_rank: tuple[float, ...]
    counts: dict[str, int]
    """Summed over the data-parallel ranks."""
    phases_by_rank: tuple[dict[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The laps that count, summed up: a report of many thousand records keeps no single lap."""

    steps_by_lap: tuple[int, ...]
    seconds_by_lap: tuple[tuple[float, ...], ...]
    """Seconds of each lap on each rank."""
    seconds_by_rank: tuple[float, ...]
    """Seconds of each rank over the window."""
    counts: dict[str, int]
    """Units over all laps and data-parallel ranks; a unit that a lap lacks is left out."""
    phases_by_rank: tuple[dict[str, float], ...]
    """Seconds of each rank over the window by phase."""
    phase_share: float
    """Largest share of a rank's lap that its phases claim; above 1 is impossible."""
    dropped: int
    """Warm-up laps before them."""
    steady: bool | None
    """Null where there are fewer than four laps to test."""
    indicative: str | None
    """Why it is too short to publish, or None."""

    @property
    def elapsed(self) -> float:
        """Seconds of the slowest rank over the window."""
        return max(self.seconds_by_rank)

    @property
    def steps(self) -> int:
        """Steps (PPO: iterations) in the window."""
        return sum(self.steps_by_lap)

    def total(self, unit: str) -> int | None:
        """Units over all laps and ranks; None if the laps do not count them."""
        return self.counts.get(unit)


def counting_parts(parts: Sequence[Part]) -> list[Part]:
    """The ranks whose work is summed: tensor- and pipeline-parallel ranks that see the same tokens count once.

    A rank says so with the fact `data_parallel_rank`; without it every rank is its own.
    """
    chosen: dict[object, Part] = {}
    for part in sorted(parts, key=lambda item: item.rank):
        chosen.setdefault(part.facts.get("data_parallel_rank", ("rank", part.rank)), part)
    return list(chosen.values())


def job_laps(record: Record) -> list[JobLap]:
    """The laps of the whole job, as far as every rank that left a part has them."""
    parts = sorted(record.parts, key=lambda item: item.rank)
    if not parts:
        return []
    counting = {part.rank for part in counting_parts(parts)}
    return [_merge(laps, [part.rank in counting for part in parts]) for laps in zip(*(part.laps for part in parts), strict=False)]


def _merge(laps: tuple[Lap, ...], counted: list[bool]) -> JobLap:
    if len(laps) == 1:
        only = laps[0]
        return JobLap(only.first_step, only.steps, only.seconds, (only.seconds,), only.counts, (only.phases,))
    slowest = max(laps, key=lambda lap: lap.seconds)
    working = [lap for lap, counts in zip(laps, counted, strict=True) if counts]
    units = [unit for unit in working[0].counts if all(unit in lap.counts for lap in working)]
    counts = {unit: sum(lap.counts[unit] for lap in working) for unit in units}
    seconds = tuple(lap.seconds for lap in laps)
    return JobLap(slowest.first_step, slowest.steps, slowest.seconds, seconds, counts, tuple(lap.phases for lap in laps))


def cut_window(laps: Sequence[JobLap], stage: str) -> Window | None:
    """Drop the warm-up, and more of it until the rest is steady, at most half of the laps. None if there are no laps."""
    if not laps:
        return None
    floor = WARM_UP_LAPS[stage] if len(laps) > WARM_UP_LAPS[stage] else min(1, len(laps) - 1)
    choices = ((dropped, is_steady(laps[dropped:])) for dropped in range(floor, max(floor, len(laps) // 2) + 1))
    enough = (choice for choice in choices if choice[1] or choice == (floor, None))
    dropped, steady = next(enough, (floor, False))
    kept = laps[dropped:]
    seconds = tuple(lap.seconds_by_rank for lap in kept)
    return Window(
        steps_by_lap=tuple(lap.steps for lap in kept), seconds_by_lap=seconds,
        seconds_by_rank=tuple(map(sum, zip(*seconds, strict=True))), counts=summed_counts(kept),
        phases_by_rank=tuple(map(_added, zip(*(lap.phases_by_rank for lap in kept), strict=True))), phase_share=_phase_share(kept),
        dropped=dropped, steady=steady, indicative=_why_indicative(kept, floor, stage),
    )  # fmt: skip


def _added(phases: Sequence[dict[str, float]]) -> dict[str, float]:
    """One rank's phases over some laps."""
    names = dict.fromkeys(name for lap in phases for name in lap)
    return {name: sum(lap.get(name, 0.0) for lap in phases) for name in names}


def _phase_share(laps: Sequence[JobLap]) -> float:
    shares = (
        sum(phases.values()) / seconds
        for lap in laps
        for phases, seconds in zip(lap.phases_by_rank, lap.seconds_by_rank, strict=True)
        if seconds > 0
    )
    return max(shares, default=0.0)


def summed_counts(laps: Sequence[JobLap | Lap]) -> dict[str, int]:
    """Units over some laps; one that a lap lacks is left out."""
    found = dict(laps[0].counts)
    for lap in laps[1:]:
        counts = lap.counts
        found = {unit: total + counts[unit] for unit, total in found.items() if unit in counts}
    return found


def _why_indicative(laps: Sequence[JobLap], floor: int, stage: str) -> str | None:
    least_steps, least_seconds = PUBLISHABLE[stage]
    steps, seconds = sum(lap.steps for lap in laps), sum(lap.seconds for lap in laps)
    if floor < WARM_UP_LAPS[stage]:
        return f"too few laps to drop {WARM_UP_LAPS[stage]} as warm-up; dropped {floor}"
    if steps < least_steps or seconds < least_seconds:
        unit = "iterations" if stage == "ppo" else "steps"
        return f"window of {steps} {unit} and {seconds:.1f} s; publishable from {least_steps} {unit} and {least_seconds:.0f} s"
    return None


def is_steady(laps: Sequence[JobLap]) -> bool | None:
    """Whether step times keep within 2 %: medians of both halves, and the robust slope over the window; None below 4 laps."""
    if len(laps) < 4:
        return None
    times = [lap.seconds / max(lap.steps, 1) for lap in laps]
    middle = median(times)
    if middle <= 0:
        return False
    half = len(times) // 2
    drift = abs(median(times[:half]) - median(times[-half:])) / middle
    return drift <= STEADY and abs(theil_sen(times)) * (len(times) - 1) / middle <= STEADY


def theil_sen(values: Sequence[float]) -> float:
    """Median of all pairwise slopes per index (Theil 1950, Sen 1968); long series are thinned evenly first."""
    step = max(1, -(-len(values) // LARGEST_SLOPE_POINTS))
    points = np.asarray(values, dtype=float)[::step]
    earlier, later = _pairs(len(points))
    return float(np.median((points[later] - points[earlier]) / ((later - earlier) * step)))


@lru_cache(maxsize=LARGEST_SLOPE_POINTS)
def _pairs(count: int) -> tuple[Any, ...]:
    """Index arrays of all pairs of `count` points, the earlier and the later of each."""
    return np.triu_indices(count, 1)
