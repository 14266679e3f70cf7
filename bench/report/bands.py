"""Reference bands: whether a trial repeats a stored record of the same cell on the same device. Rules: docs/metrics.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from bench.record import Record
from bench.report.inventory import Row, read_inventory
from bench.report.metrics import Trial
from bench.report.parity import losses

LEAST_CORRELATION = 0.95
FINAL_SHARE = 0.03
COST_SHARE = 0.05
COSTS = ("step_seconds", "peak_allocated_gib", "device_memory_gib")


@dataclass(frozen=True, slots=True)
class Check:
    """One quantity against its band."""

    name: str
    state: str
    """inside, outside or undefined."""
    text: str


@dataclass(frozen=True, slots=True)
class Band:
    """Verdict on one trial: `inside`, `outside` or `undefined`, with its checks."""

    reference: str
    """File of the stored record."""
    checks: tuple[Check, ...]

    @property
    def state(self) -> str:
        """Outside if any check is; undefined if none could be made."""
        states = {check.state for check in self.checks}
        return "outside" if "outside" in states else "inside" if "inside" in states else "undefined"


def device_name(record: Record) -> str:
    """Name of the device that a record was measured on; `cpu` where it says none."""
    name = record.lead.facts.get("device_name") if record.lead else None
    return str(name or record.cell.get("device", "cpu"))


def read_references(folder: Path | None) -> tuple[Row, ...]:
    """The stored records below `folder`; none if it is missing or empty."""
    if folder is None or not folder.is_dir() or not any(folder.rglob("*.json")):
        return ()
    return read_inventory(folder).rows


def judge_bands(rows: Iterable[Row], references: Sequence[Row], trials: Mapping[str, Trial] | None = None) -> dict[str, Band]:
    """The band verdict of every ok record that has a reference (same cell, trial and device), by file.

    `trials`, by file too, is needed where the rows have been summed up.
    """
    stored = {_identity(row): row for row in reversed(references) if row.record.outcome == "ok"}
    found = {}
    for row in rows:
        reference = stored.get(_identity(row))
        if reference is not None and row.record.outcome == "ok":
            found[row.file] = band_verdict(row, reference, trials[row.file] if trials else None)
    return found


def _identity(row: Row) -> tuple[str, int, str]:
    return row.record.cell_id, row.record.trial, device_name(row.record)


def band_verdict(row: Row, reference: Row, trial: Trial | None = None) -> Band:
    """Compare one trial with its reference: curve, final loss, step time, memory; `trial` where `row` has been summed up."""
    mine, theirs = losses(row.record), losses(reference.record)
    checks = [*_curve_checks(mine, theirs), *_cost_checks(trial or Trial(row), Trial(reference))]
    return Band(reference.file, tuple(checks))


def _curve_checks(mine: Sequence[float], theirs: Sequence[float]) -> list[Check]:
    if not mine or len(mine) != len(theirs):
        return [Check("curve", "outside" if mine and theirs else "undefined", f"{len(mine)} steps against {len(theirs)}")]
    ends = fmean(mine[-5:]), fmean(theirs[-5:])
    gap = abs(ends[0] - ends[1]) / abs(ends[1]) if ends[1] else None
    final = Check("final loss", "undefined", "the reference ends at 0") if gap is None else _within("final loss", gap, FINAL_SHARE)
    return [_correlation(mine, theirs), _pointwise(mine, theirs), final]


def _within(name: str, gap: float, allowed: float) -> Check:
    return Check(name, "inside" if gap <= allowed else "outside", f"{gap:.1%} off; allowed {allowed:.0%}")


def _correlation(mine: Sequence[float], theirs: Sequence[float]) -> Check:
    if len(mine) < 3 or np.ptp(theirs) == 0:
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


def _cost_checks(trial: Trial, reference: Trial) -> list[Check]:
    checks = []
    for name in COSTS:
        mine, theirs = trial.values[name].number, reference.values[name].number
        if trial.clock_problem or reference.clock_problem or mine is None or not theirs:
            continue
        checks.append(_within(name, abs(mine - theirs) / theirs, COST_SHARE))
    return checks
