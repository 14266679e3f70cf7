from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.cell import Cell
from bench.matrix import Plan, Warm
from bench.record import Record, save_record
from bench.report.past_trials import past_trials, spreads
from bench.report.planned_cost import PlannedCost, cost_lines, costs_to_json, planned_costs
from bench.suite import Limits
from tests.unit.report.trial_factory import make_cell, make_record

LAPS = 60 * 0.5 + 0.6 * 5 * 0.5
"""Seconds of the factory's laps of 60 steps at 0.5 s: the first lap of 5 steps takes 1.6 times as long."""


def cell_of(strategy: str = "naive", stage: str = "sft", **changes: Any) -> Cell:
    return make_cell(stage, strategy, **({"device": "cuda", "model": "bloom-560m", "steps": 60, "launcher": "torchrun"} | changes))


def plan_of(*cells: Cell, trials: int = 7, warm: tuple[Cell, ...] = ()) -> Plan:
    return Plan(
        suite="next", trials=trials, cells={cell.cell_id: cell for cell in cells}, blocks=(), skipped=(), data=(), limits=Limits(),
        warm=tuple(Warm(key=cell.cell_id, cell=cell) for cell in warm),
    )  # fmt: skip


def earlier(
    results: Path, cell: Cell, *seconds: float, joules: float | None = None, where: str = "references/h100/chain", **rest: Any
) -> None:
    for trial, value in enumerate(seconds):
        devices = {"devices": {"GPU-0": {"energy_joules": joules}}} if joules else {}
        record: Record = make_record(cell, trial, seconds=0.5, observed={"seconds": value} | devices, **rest)
        save_record(record, results / where / "records" / cell.cell_id / f"{trial}.json")


def costs_of(plan: Plan, results: Path) -> tuple[PlannedCost, ...]:
    return planned_costs(plan, past_trials(plan, results))


def only(costs: tuple[PlannedCost, ...]) -> PlannedCost:
    [cost] = costs
    return cost


def test_the_same_cell_takes_the_median_of_its_earlier_trials(tmp_path: Path) -> None:
    earlier(tmp_path, cell_of(), 100.0, 140.0, 110.0, joules=36_000.0)
    plan = plan_of(cell_of())
    cost = only(costs_of(plan, tmp_path))
    assert (cost.device, cost.trials("the same cell")) == ("NVIDIA H100 80GB HBM3", 7)
    assert cost.device_hours == cost.hours == pytest.approx(7 * 110 / 3600)
    assert cost.joules == pytest.approx(7 * 36_000)
    [line] = cost_lines(plan, (cost,), price=3.0)
    assert line == (
        "Cost on NVIDIA H100 80GB HBM3: 0.21 device-hours (0.21 h one trial after another), 0.070 kWh, 0.64 at 3 each; "
        "7 trials: 7 by the same cell in earlier records."
    )


def test_another_strategy_is_judged_by_the_nearest_cell(tmp_path: Path) -> None:
    """Precision is the same in zero2, so that is nearer to ddp than naive in another precision."""
    earlier(tmp_path, cell_of("zero2"), 200.0)
    earlier(tmp_path, cell_of("naive", precision="bf16-master"), 900.0)
    cost = only(costs_of(plan_of(cell_of("ddp"), trials=1), tmp_path))
    assert (cost.trials("the nearest cell"), cost.hours) == (1, pytest.approx(200 / 3600))


def test_twice_the_steps_take_the_loop_twice_and_the_start_once(tmp_path: Path) -> None:
    earlier(tmp_path, cell_of(steps=60), LAPS + 20, joules=1_000.0)
    cost = only(costs_of(plan_of(cell_of(steps=120), trials=1), tmp_path))
    assert cost.estimates[0].seconds == pytest.approx(2 * LAPS + 20)
    assert cost.joules == pytest.approx(1_000 * (2 * LAPS + 20) / (LAPS + 20))


def test_every_rank_counts_as_a_device(tmp_path: Path) -> None:
    pair = cell_of("ddp", processes_per_node=2)
    earlier(tmp_path, pair, 360.0)
    cost = only(costs_of(plan_of(pair, trials=5), tmp_path))
    assert (cost.hours, cost.device_hours) == (pytest.approx(0.5), pytest.approx(1.0))


def test_what_no_record_speaks_of_is_unknown_with_a_reason_and_in_no_sum(tmp_path: Path) -> None:
    earlier(tmp_path, cell_of(), 100.0)
    plan = plan_of(cell_of(), cell_of(stage="rm"), cell_of("ddp", processes_per_node=2), cell_of(model="bloom-1b1"), trials=2)
    cost = only(costs_of(plan, tmp_path))
    assert (cost.trials(), cost.trials("unknown"), cost.hours) == (8, 6, pytest.approx(200 / 3600))
    assert "  not in it: 2 trials; no earlier ok trial of rm, bloom-560m, 1 x 1 by torchrun on this device" in cost_lines(plan, (cost,))


def test_warm_starts_are_made_once(tmp_path: Path) -> None:
    earlier(tmp_path, cell_of(), 100.0)
    earlier(tmp_path, cell_of(stage="rm"), 50.0)
    assert only(costs_of(plan_of(cell_of(stage="rm"), trials=3, warm=(cell_of(),)), tmp_path)).hours == pytest.approx(250 / 3600)


def test_each_kind_of_device_has_its_own_cost_and_a_failure_says_nothing(tmp_path: Path) -> None:
    earlier(tmp_path, cell_of(), 100.0)
    earlier(tmp_path, cell_of("ddp"), 9_000.0, outcome="timeout", reason="slow")
    other = make_record(cell_of(), seconds=0.5, observed={"seconds": 300.0})
    for part in other.parts:
        part.facts["device_name"] = "NVIDIA A100"
    save_record(other, tmp_path / "references" / "a100" / "chain" / "records" / other.cell_id / "0.json")
    costs = costs_of(plan_of(cell_of(), cell_of("ddp"), trials=1), tmp_path)
    assert {cost.device: round(cost.hours * 3600) for cost in costs} == {"NVIDIA A100": 600, "NVIDIA H100 80GB HBM3": 200}


def test_the_records_of_the_suite_itself_count_and_those_of_other_suites_do_not(tmp_path: Path) -> None:
    earlier(tmp_path, cell_of(), 100.0, where="another")
    plan = plan_of(cell_of())
    assert costs_of(plan, tmp_path) == ()
    assert cost_lines(plan, ())[0].startswith("Cost: unknown; no earlier ok trial of sft of bloom-560m on these ranks")
    earlier(tmp_path, cell_of(), 100.0, where="next")
    assert only(costs_of(plan, tmp_path)).trials("the same cell") == 7


def test_files_that_are_no_records_do_not_keep_a_plan_from_being_shown(tmp_path: Path) -> None:
    earlier(tmp_path, cell_of(), 100.0)
    (tmp_path / "references" / "h100" / "chain" / "records" / cell_of().cell_id / "00.json").write_text("{")
    assert only(costs_of(plan_of(cell_of()), tmp_path)).trials("the same cell") == 7


def test_programs_get_every_cell(tmp_path: Path) -> None:
    earlier(tmp_path, cell_of(), 100.0)
    plan = plan_of(cell_of(), cell_of(stage="rm"), trials=2)
    [content] = json.loads(json.dumps(costs_to_json(costs_of(plan, tmp_path), 2.0), allow_nan=False))
    assert content["trials"] == {"the same cell": 2, "the nearest cell": 0, "unknown": 2}
    assert content["price"] == pytest.approx(2 * 200 / 3600)
    assert content["cells"][cell_of().cell_id] == {"trials": 2, "by": "the same cell", "seconds": 100.0, "joules": None}
    assert content["cells"][cell_of(stage="rm").cell_id]["by"] == "unknown"


def test_the_spread_of_earlier_trials_is_the_median_over_cells_with_three_of_them(tmp_path: Path) -> None:
    for strategy, seconds in (("naive", (0.5, 0.505, 0.495)), ("ddp", (0.5, 0.51, 0.49)), ("zero2", (0.5, 1.0))):
        for trial, value in enumerate(seconds):
            record = make_record(cell_of(strategy), trial, seconds=value)
            save_record(record, tmp_path / "references" / "h100" / "chain" / "records" / record.cell_id / f"{trial}.json")
    [spread] = spreads(past_trials(plan_of(cell_of()), tmp_path))
    assert (spread.cells, spread.trials, spread.device) == (2, 6, "NVIDIA H100 80GB HBM3")
    assert spread.cv == pytest.approx(0.015, abs=0.0005)


def test_forked_trials_have_no_spread(tmp_path: Path) -> None:
    earlier(tmp_path, cell_of(), 100.0, 101.0, 102.0, launcher="fork")
    assert spreads(past_trials(plan_of(cell_of()), tmp_path)) == []
