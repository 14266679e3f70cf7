"""What the verb `plan` adds to a plan: what its trials can claim and what they will cost. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.matrix import Plan
from bench.report.past_trials import past_trials, spreads
from bench.report.planned_cost import cost_lines, costs_to_json, planned_costs
from bench.report.sample_size import claims_to_json, sample_size_lines


def plan_notes(plan: Plan, results: Path, price: float | None = None) -> list[str]:
    """Both in words; `results` holds the earlier records that the cost is judged by, `price` is that of a device-hour."""
    pasts = past_trials(plan, results)
    return [*sample_size_lines(plan, spreads(pasts)), *cost_lines(plan, planned_costs(plan, pasts), price)]


def plan_forecast(plan: Plan, results: Path, price: float | None = None) -> dict[str, Any]:
    """Both for programs: {claims, cost}."""
    pasts = past_trials(plan, results)
    return {"claims": claims_to_json(plan, spreads(pasts)), "cost": costs_to_json(planned_costs(plan, pasts), price)}
