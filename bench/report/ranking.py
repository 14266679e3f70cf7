"""Which cell of a comparison set is fastest and which needs least memory, and whether the statistics back it. Rules: docs/metrics.md.

A set is ranked in speed among cells that ran under the same conditions only: those of `naive`, where it was measured beside others, else
those that most cells share. Memory is ranked among all of them, by one figure that all of them have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log
from typing import TYPE_CHECKING

from bench.cell import Cell
from bench.differences import settings_of, told_apart
from bench.report.conditions import on_other_machines, other_conditions
from bench.report.inventory import BASELINE
from bench.report.metrics import primary_metric
from bench.report.parity import comparison_key
from bench.report.statistics import THRESHOLD
from bench.report.text import listed

if TYPE_CHECKING:
    from bench.report.analysis import CellResult

MEMORY = ("device_memory_gib", "peak_allocated_gib", "host_peak_gib")
"""Memory metrics, the most telling first."""


@dataclass(frozen=True, slots=True)
class Leaders:
    """The best cell by one metric, and what a reader must know of that."""

    metric: str
    results: tuple[CellResult, ...]
    """The best median first, then those within the practical threshold of it."""
    names: tuple[str, ...]
    """Of those cells: the strategy, and what tells it from another cell of the same strategy."""
    backed: bool = False
    """Whether the statistics say it: the best is `faster` than naive, or naive is and no other is faster or inconclusive."""
    left_out: tuple[str, ...] = ()
    """Strategies that ran under other conditions, or lack the figure, and were not ranked."""
    elsewhere: tuple[str, ...] = ()
    """Strategies that were ranked and ran on other machines than the best."""

    @property
    def text(self) -> str:
        """The best one, and those within the practical threshold of it."""
        first, *others = self.names
        return f"{first} ({listed(others)} within 3 %)" if others else first


@dataclass(frozen=True, eq=False)
class RankedSet:
    """Measured cells that differ in nothing but the strategy (and `naive`, which runs on one rank); struck ones are not in it."""

    cell: Cell
    """One of them, for what they share."""
    results: tuple[CellResult, ...]

    @cached_property
    def fastest(self) -> Leaders | None:
        """By the primary metric of the stage, among cells of like conditions; None where fewer than two are."""
        alike = like_conditions(self.results)
        best = _best(alike, primary_metric(self.cell.stage), highest=True)
        if not best:
            return None
        return self._leaders(
            primary_metric(self.cell.stage), best, alike, backed=_backed(best[0], alike),
            elsewhere=_once(it.cell.strategy for it in alike if on_other_machines(it.ok, best[0].ok)),
        )  # fmt: skip

    @cached_property
    def leanest(self) -> Leaders | None:
        """By the most telling figure of memory that all cells have, else that any has; None where fewer than two have it."""
        name = next((name for name in MEMORY if all(it.summary(name) for it in self.results)), memory_metric(self.results))
        known = [it for it in self.results if it.summary(name)]
        best = _best(known, name, highest=False)
        return self._leaders(name, best, known) if best else None

    def _leaders(
        self, metric: str, best: Sequence[CellResult], among: Sequence[CellResult], *, backed: bool = False, elsewhere: tuple[str, ...] = ()
    ) -> Leaders:
        told = told_apart([settings_of(it.cell) for it in self.results], [it.cell.strategy for it in self.results])
        named = {it: f"{it.cell.strategy} [{apart}]" if apart else it.cell.strategy for it, apart in zip(self.results, told, strict=True)}
        return Leaders(
            metric=metric, results=tuple(best), names=_once(named[it] for it in best), backed=backed,
            left_out=_once(it.cell.strategy for it in self.results if it not in among), elsewhere=elsewhere,
        )  # fmt: skip


def memory_metric(results: Sequence[CellResult]) -> str:
    """The memory metric that a table shows: the most telling one that any of its cells has."""
    return next((name for name in MEMORY if any(result.summary(name) for result in results)), MEMORY[0])


def _once(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def ranked_sets(results: Iterable[CellResult]) -> tuple[RankedSet, ...]:
    """Comparison sets with at least two ranked cells on the same number of ranks."""
    groups: dict[tuple[str, int, int], list[CellResult]] = defaultdict(list)
    for result in results:
        if result.ranked:
            groups[(comparison_key(result.cell), result.cell.nodes, result.cell.processes_per_node)].append(result)
    return tuple(RankedSet(members[0].cell, tuple(members)) for members in groups.values() if len(members) > 1)


def like_conditions(results: Sequence[CellResult]) -> list[CellResult]:
    """Those that ran under the conditions of naive, if any other did, else those that ran under the conditions that most share."""
    baseline = next((it for it in results if it.cell.strategy == BASELINE), None)
    if baseline is not None and len(beside := _beside(baseline, results)) > 1:
        return beside
    return max((_beside(it, results) for it in results), key=len)


def _beside(one: CellResult, results: Sequence[CellResult]) -> list[CellResult]:
    return [it for it in results if it is one or not other_conditions(it.ok, one.ok)]


def _best(results: Sequence[CellResult], name: str, *, highest: bool) -> list[CellResult]:
    """The best median and those within the practical threshold of it; empty where fewer than two have one."""
    known = [(summary.middle, it) for it in results if (summary := it.summary(name))]
    if len(known) < 2 or min(value for value, _ in known) <= 0:
        return []
    ordered = sorted(known, key=lambda item: -item[0] if highest else item[0])
    return [it for value, it in ordered if abs(log(value / ordered[0][0])) <= THRESHOLD]


def _backed(best: CellResult, among: Sequence[CellResult]) -> bool:
    if best.cell.strategy != BASELINE:
        return best.verdict == "faster"
    return all(it.verdict in ("slower", "equal") for it in among if it is not best)
