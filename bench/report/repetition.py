"""Whether the losses of one trial repeat those of another trial of the same cell and seed. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from bench.report.bands import curve_checks
from bench.report.inventory import Row
from bench.report.parity import deviations, losses


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Verdict on two loss curves."""

    state: str
    """`identical` to the last bit, `inside` or `outside` the band, or `undefined`: no losses, or a reference that does not vary."""
    text: str
    largest: float | None = None
    """Largest relative deviation of a step."""


def repeat_of(row: Row, reference: Row) -> Losses:
    """Compare the curve of `row` with that of `reference`, by the rules of reference bands."""
    mine, theirs = losses(row.record), losses(reference.record)
    if not mine or not theirs:
        return Losses(state="undefined", text="no losses to compare")
    if len(mine) != len(theirs):
        return Losses(state="outside", text=f"{len(mine)} steps against {len(theirs)}")
    gaps = deviations(mine, theirs, row.cell.stage)
    if mine == theirs and len(set(theirs)) == 1 < len(theirs):
        return Losses(state="undefined", text=f"identical, but the same over all {len(theirs)} steps", largest=0.0)
    if mine == theirs:
        return Losses(state="identical", text=f"identical over {len(mine)} steps", largest=0.0)
    checks = curve_checks(row, reference)
    outside = [check for check in checks if check.state == "outside"]
    state = "outside" if outside else "undefined" if any(check.state == "undefined" for check in checks) else "inside"
    where = f"largest deviation {max(gaps):.1e} at step {gaps.index(max(gaps))}"
    return Losses(state=state, text="; ".join([f"{check.name}: {check.text}" for check in outside] + [where]), largest=max(gaps))
