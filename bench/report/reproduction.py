"""Whether a trial that was run again gave what it gave before. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

from bench.measure.conditions import conditions
from bench.report.bands import COST_SHARE, Check
from bench.report.inventory import Row
from bench.report.metrics import METRICS, Trial, primary_metric
from bench.report.ranking import MEMORY
from bench.report.repetition import repeat_of
from bench.report.statistics import THRESHOLD
from bench.report.text import number

OUTCOME, WEIGHTS = "outcome", "initial weights"


@dataclass(frozen=True, slots=True)
class Reproduction:
    """The verdict and what it stands on."""

    checks: tuple[Check, ...]

    @property
    def compared(self) -> bool:
        """Whether losses or times could be compared; of a trial that did not end well only the outcome can."""
        found = [check.state for check in self.checks if check.name not in (OUTCOME, WEIGHTS)]
        return not found or any(state != "undefined" for state in found)

    @property
    def reproduced(self) -> bool:
        """Whether something could be compared, and nothing is outside."""
        return self.compared and all(check.state != "outside" for check in self.checks)

    @property
    def text(self) -> str:
        """A line for each check, then the verdict."""
        lines = [f"  {check.name}: {check.state}; {check.text}" for check in self.checks]
        outside = any(check.state == "outside" for check in self.checks)
        verdict = "reproduced" if self.reproduced else "not reproduced" if outside else "not judged: nothing could be compared"
        return "\n".join([*lines, verdict])


def judge_reproduction(new: Row, old: Row, siblings: Sequence[Row]) -> Reproduction:
    """Compare a new trial with its record; `siblings` are the old records of the same cell, the record itself among them."""
    checks = [_outcome(new, old)]
    if new.record.outcome == old.record.outcome == "ok":
        losses = repeat_of(new, old)
        checks += [*_initial_weights(new, old), Check("losses", losses.state, losses.text), *_costs(new, old, siblings)]
    return Reproduction(tuple(checks))


def _outcome(new: Row, old: Row) -> Check:
    mine, theirs = new.record.outcome, old.record.outcome
    if mine == theirs:
        return Check(OUTCOME, "inside", mine)
    return Check(OUTCOME, "outside", f"{mine}, recorded is {theirs}: {new.record.reason or 'no reason recorded'}")


def _initial_weights(new: Row, old: Row) -> list[Check]:
    mine, theirs = (_fact(row, "initial_weights_sha256") for row in (new, old))
    if mine is None or theirs is None:
        return []
    same = mine == theirs
    return [Check(WEIGHTS, "inside" if same else "outside", "the same" if same else "others (sha256), so losses cannot agree")]


def _fact(row: Row, name: str) -> Any:
    return row.record.lead.facts.get(name) if row.record.lead else None


def _costs(new: Row, old: Row, siblings: Sequence[Row]) -> list[Check]:
    """Speed, step time and memory, where both were measured on the same device; siblings from another one have no say."""
    trial, trials = Trial(new), [Trial(row) for row in siblings if row.record.outcome == "ok" and not _other_device(row, old)]
    problem = trial.clock_problem or Trial(old).clock_problem or _other_device(new, old)
    if problem:
        return [Check("times", "undefined", f"not compared: {problem}")]
    names = [primary_metric(new.cell.stage), "step_seconds", *MEMORY]
    return [check for name in names if (check := _cost(name, trial, trials)) is not None]


def _other_device(new: Row, old: Row) -> str | None:
    mine, theirs = (conditions(row.record).get("device name") for row in (new, old))
    return None if mine == theirs else f"recorded on {theirs}, now on {mine}"


def _cost(name: str, trial: Trial, trials: Sequence[Trial]) -> Check | None:
    value = trial.values[name].number
    points = [point for it in trials if (point := it.values[name].number) is not None]
    if value is None or not points:
        return None
    low, high, what = old_interval(points)
    item, state = METRICS[name], "inside" if low <= value <= high else "outside"
    return Check(item.title, state, f"{number(value)} {item.unit}; {what}: {number(low)} to {number(high)}")


def old_interval(points: Sequence[float]) -> tuple[float, float, str]:
    """Where a new trial of the same cell should lie, and what that interval is.

    Several trials: from the smallest to the largest, widened by the practical threshold of 3 %. The interval of their median
    would be the wrong one: it narrows with more trials, while single trials vary as before. Even without a change a new trial
    lies outside the bare range of n others with a chance of 2 / (n + 1). One trial: the reference band.

    >>> old_interval([2.0])
    (1.9, 2.1, '5 % around the one record')
    """
    if len(points) == 1:
        return points[0] * (1 - COST_SHARE), points[0] * (1 + COST_SHARE), f"{COST_SHARE * 100:.0f} % around the one record"
    return min(points) / exp(THRESHOLD), max(points) * exp(THRESHOLD), f"range of {len(points)} records and 3 % more"
