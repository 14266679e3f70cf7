"""Whether the losses of one trial repeat those of another trial of the same cell and seed. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from bench.report.bands import COSTS, Check, allowed_share, band_verdict
from bench.report.inventory import Row
from bench.report.parity import compared_steps, deviations, losses


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Verdict on two loss curves."""

    state: str
    """`identical` to the last bit, `inside` or `outside` the band, or `undefined`: no losses, or a reference that does not vary."""
    text: str
    largest: float | None = None
    """Largest relative deviation of a step."""


def repeat_of(row: Row, reference: Row) -> Losses:
    """Compare the curve of `row` with that of `reference`: bands of docs/metrics.md, or for PPO the first iteration.

    Later iterations of PPO learn from sampled tokens; rounding may flip one of them, and from there on the curves part.
    """
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
    checks = [_first_iteration(row, gaps)] if row.cell.stage == "ppo" else _band(row, reference)
    outside = [check for check in checks if check.state == "outside"]
    state = "outside" if outside else "inside" if any(check.state == "inside" for check in checks) else "undefined"
    where = f"largest deviation {max(gaps):.1e} at step {gaps.index(max(gaps))}"
    return Losses(state=state, text="; ".join([f"{check.name}: {check.text}" for check in outside] + [where]), largest=max(gaps))


def _band(row: Row, reference: Row) -> list[Check]:
    return [check for check in band_verdict(row, reference).checks if check.name not in COSTS]


def _first_iteration(row: Row, gaps: list[float]) -> Check:
    steps, allowed = compared_steps("ppo", row.record, exact=True), allowed_share(0.0)
    gap = max(gaps[:steps])
    return Check("first iteration", "inside" if gap <= allowed else "outside", f"{gap:.1%} off; allowed {allowed:.0%}")
