"""Reference bands: whether a trial repeats the stored records of the same cell on the same device. Rules: docs/metrics.md.

A band is made from records, never written by hand: the curve of a trial is held to that of the stored trial with the same number
(and so the same seed), its speed and memory to the median over all stored trials of the cell.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median

import numpy as np

from bench.measure.conditions import conditions
from bench.record import Record
from bench.report.inventory import Row, read_inventory
from bench.report.metrics import METRICS, Trial, primary_metric
from bench.report.parity import compared_steps, deviations, first_of_ppo, losses
from bench.report.text import counted, number

LEAST_CORRELATION = 0.95
FINAL_SHARE = 0.03
COST_SHARE = 0.05
COSTS = ("step_seconds", "peak_allocated_gib", "device_memory_gib")
FEWEST_STEPS = 3
"""Steps below which a correlation means nothing."""


@dataclass(frozen=True, slots=True)
class Check:
    """One quantity against its band."""

    name: str
    state: str
    """inside, outside or undefined."""
    text: str
    better: bool = False
    """Outside on the good side: faster or leaner than the band."""


@dataclass(frozen=True, slots=True)
class Band:
    """Verdict on one trial: `inside`, `outside` or `undefined`, with its checks."""

    reference: str
    """File of the stored record with the same number, else of the first one of the cell."""
    curve: tuple[Check, ...]
    """Of the losses; none where no stored trial has this number."""
    costs: tuple[Check, ...]
    """Of speed and memory; none where the clocks do not count."""

    @property
    def checks(self) -> tuple[Check, ...]:
        """All of them."""
        return self.curve + self.costs

    @property
    def state(self) -> str:
        """Outside if any check is. Undefined if nothing, or a curve that cannot be judged, was checked: that is never a pass."""
        if any(check.state == "outside" for check in self.checks):
            return "outside"
        undefined = not self.checks or any(check.state == "undefined" for check in self.curve)
        return "undefined" if undefined else "inside"

    @property
    def other_losses(self) -> str | None:
        """Why the losses are other than the stored ones, which strikes the trial; None if they are not."""
        outside = [f"{check.name}: {check.text}" for check in self.curve if check.state == "outside"]
        return f"outside the reference band: {'; '.join(outside)}" if outside else None


def costs_of(stage: str) -> tuple[str, ...]:
    """What a band holds beside the losses: the rate of the whole window, which stalls lower, the typical step, and memory."""
    return (*COSTS, primary_metric(stage))


class Reference:
    """The stored ok trials of one cell on one device."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = tuple(rows)

    def of_trial(self, trial: int) -> Row | None:
        """The stored record with this number."""
        return next((row for row in self.rows if row.record.trial == trial), None)

    @cached_property
    def costs(self) -> dict[str, list[float]]:
        """Speed and memory of the stored trials whose clocks count."""
        trials = [trial for trial in map(Trial, self.rows) if trial.clock_problem is None]
        values = {name: [trial.values[name].number for trial in trials] for name in costs_of(self.rows[0].cell.stage)}
        return {name: [value for value in found if value is not None] for name, found in values.items()}


def device_name(record: Record) -> str:
    """Name of the device that a record was measured on, of a CPU its model; `cpu` where it says none."""
    return conditions(record).get("device name") or str(record.cell.get("device", "cpu"))


def read_references(folder: Path | None) -> tuple[Row, ...]:
    """The stored records below `folder` (results/references: <device>/<suite>/records/...); none if it is missing or empty."""
    if folder is None or not folder.is_dir() or not any(folder.rglob("*.json")):
        return ()
    return read_inventory(folder, once=lambda row: (*_identity(row), row.record.trial)).rows


def suites_of(references: Iterable[Row]) -> frozenset[str]:
    """The suites that stored records belong to, by where they lie: <device>/<suite>/records/..."""
    return frozenset(parts[1] for row in references if len(parts := row.file.split("/")) > 3)


def judge_bands(rows: Iterable[Row], references: Sequence[Row], trials: Mapping[str, Trial] | None = None) -> dict[str, Band]:
    """The band verdict of every ok record whose cell has a reference on its device, by file.

    `trials`, by file too, is needed where the rows have been summed up.
    """
    stored: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in references:
        if row.record.outcome == "ok":
            stored[_identity(row)].append(row)
    known = {key: Reference(found) for key, found in stored.items()}
    judged = [(row, known[_identity(row)]) for row in rows if row.record.outcome == "ok" and _identity(row) in known]
    return {row.file: band_verdict(row, reference, trials[row.file] if trials else None) for row, reference in judged}


def _identity(row: Row) -> tuple[str, str]:
    return row.record.cell_id, device_name(row.record)


def band_verdict(row: Row, reference: Reference, trial: Trial | None = None) -> Band:
    """Compare one trial with its reference; `trial` where `row` has been summed up."""
    same, mine = reference.of_trial(row.record.trial), trial or Trial(row)
    names = () if mine.clock_problem else costs_of(row.cell.stage)
    costs = [cost_check(name, mine.values[name].number, reference.costs[name]) for name in names]
    return Band(
        reference=(same or reference.rows[0]).file, curve=tuple(curve_checks(row, same)) if same else (),
        costs=tuple(check for check in costs if check is not None),
    )  # fmt: skip


def cost_check(name: str, value: float | None, stored: Sequence[float]) -> Check | None:
    """A rate, step time or memory against the median of stored ones; None where one of them is not known."""
    if value is None or not stored:
        return None
    middle = median(stored)
    gap, item = value / middle - 1, METRICS[name]
    where = f"{abs(gap):.1%} {'above' if gap > 0 else 'below'} {number(middle)} of {counted(len(stored), 'record')}"
    state = "inside" if abs(gap) <= COST_SHARE else "outside"
    better = state == "outside" and (gap > 0) == (item.direction == "higher")
    return Check(item.title, state, f"{number(value)} {item.unit}, {where}; allowed {COST_SHARE:.0%}", better=better)


# -- curves ------------------------------------------------------------------------------------------------------


def curve_checks(row: Row, reference: Row) -> list[Check]:
    """Losses against those of the stored trial with the same seed: the whole curve; of PPO the first iteration.

    Later iterations of PPO learn from sampled tokens; rounding may flip one of them, and from there on the curves part.
    """
    mine, theirs = losses(row.record), losses(reference.record)
    if not mine or len(mine) != len(theirs):
        return [Check("curve", "outside" if mine and theirs else "undefined", f"{len(mine)} steps against {len(theirs)}")]
    if row.cell.stage == "ppo":
        others = [Check("first iteration", "outside" if gap > most else "inside", text) for text, gap, most in first_of_ppo(row, reference)]
        return [_first_iteration(row, deviations(mine, theirs, row.cell.stage)), *others]
    return [_correlation(mine, theirs), _pointwise(mine, theirs), _final(mine, theirs)]


def _first_iteration(row: Row, gaps: Sequence[float]) -> Check:
    steps, allowed = compared_steps("ppo", row.record, exact=True), allowed_share(0.0)
    return _within("first iteration", max(gaps[:steps]), allowed)


def _final(mine: Sequence[float], theirs: Sequence[float]) -> Check:
    ends = fmean(mine[-5:]), fmean(theirs[-5:])
    if not ends[1]:
        return Check("final loss", "undefined", "the reference ends at 0")
    return _within("final loss", abs(ends[0] - ends[1]) / abs(ends[1]), FINAL_SHARE)


def _within(name: str, gap: float, allowed: float) -> Check:
    return Check(name, "inside" if gap <= allowed else "outside", f"{gap:.1%} off; allowed {allowed:.0%}")


def _correlation(mine: Sequence[float], theirs: Sequence[float]) -> Check:
    if len(mine) < FEWEST_STEPS:
        return Check("correlation", "undefined", f"{counted(len(mine), 'step')}; at least {FEWEST_STEPS}")
    if np.ptp(theirs) == 0:
        return Check("correlation", "undefined", "the reference does not vary")
    value = 0.0 if np.ptp(mine) == 0 else float(np.corrcoef(mine, theirs)[0, 1])
    return Check("correlation", "inside" if value >= LEAST_CORRELATION else "outside", f"{value:.3f}; at least {LEAST_CORRELATION}")


def allowed_share(loss: float) -> float:
    """Allowed relative deviation of a point, by the reference's loss there."""
    return 0.10 if loss > 2 else 0.05 if loss >= 0.5 else 0.02


def _pointwise(mine: Sequence[float], theirs: Sequence[float]) -> Check:
    outside = [i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if abs(a - b) > allowed_share(abs(b)) * abs(b)]
    if outside:
        return Check("points", "outside", f"{len(outside)} of {len(mine)} points outside, the first at step {outside[0]}")
    return Check("points", "inside", f"all {len(mine)} points inside")
