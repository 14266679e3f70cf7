from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bench.report.bands import Check
from bench.report.inventory import Row
from bench.report.reproduction import Reproduction, judge_reproduction, old_interval
from tests.unit.report.trial_factory import make_cell, make_row

CELL = make_cell("sft", device="cuda", model="bloom-560m", precision="bf16-master", steps=60)


def row(trial: int = 0, **rest: Any) -> Row:
    return make_row(CELL, trial, **rest)


def states(new: Row, old: Row, *siblings: Row) -> dict[str, str]:
    return {check.name: check.state for check in judge_reproduction(new, old, [old, *siblings]).checks}


def test_the_same_values_are_reproduced() -> None:
    verdict = judge_reproduction(row(), row(), [row()])
    assert verdict.reproduced
    assert states(row(), row()) == {
        "outcome": "inside", "initial weights": "inside", "losses": "identical", "loss tokens/s": "inside", "step time": "inside",
        "device memory": "inside", "peak allocated": "inside", "host peak": "inside",
    }  # fmt: skip
    assert verdict.text.endswith("\nreproduced")


@pytest.mark.parametrize(("factor", "state"), [(1.04, "inside"), (0.96, "inside"), (1.06, "outside"), (0.94, "outside")])
def test_a_single_record_has_a_band_of_five_percent(factor: float, state: str) -> None:
    assert states(row(seconds=0.5 * factor), row(seconds=0.5))["step time"] == state


def test_several_records_have_their_range_and_three_percent_more() -> None:
    """The record says 0.50 s, its siblings 0.55 and 0.60 s: 0.61 s is inside, 0.63 s is not, and neither is 0.48 s."""
    siblings = (row(1, seconds=0.55), row(2, seconds=0.60))
    found = {seconds: states(row(seconds=seconds), row(seconds=0.5), *siblings)["step time"] for seconds in (0.48, 0.49, 0.61, 0.63)}
    assert found == {0.48: "outside", 0.49: "inside", 0.61: "inside", 0.63: "outside"}


def test_failed_siblings_have_no_part_in_the_range() -> None:
    failed = row(1, seconds=5.0, outcome="oom", reason="x")
    assert states(row(seconds=0.6), row(seconds=0.5), failed)["step time"] == "outside"


def test_siblings_from_another_device_have_no_part_in_the_range() -> None:
    other = with_fact(row(1, seconds=5.0), device_name="NVIDIA A100")
    assert states(row(seconds=0.6), row(seconds=0.5), other)["step time"] == "outside"


def test_the_interval_of_many_records_does_not_shrink_to_that_of_their_median() -> None:
    points = [1.0 + 0.01 * k for k in range(31)]
    low, high, what = old_interval(points)
    assert (low, high) == (pytest.approx(1 / 1.03), pytest.approx(1.3 * 1.03))
    assert what == "range of 31 records and 3 % more"


def test_another_outcome_is_not_reproduced_and_nothing_else_is_said() -> None:
    verdict = judge_reproduction(row(outcome="oom", reason="20 GiB asked for"), row(), [row()])
    assert verdict.checks == (Check("outcome", "outside", "oom, recorded is ok: 20 GiB asked for"),)
    assert not verdict.reproduced


def test_the_same_failure_is_reproduced() -> None:
    failed = row(outcome="oom", reason="x")
    assert judge_reproduction(failed, failed, [failed]).reproduced


def with_fact(item: Row, **facts: Any) -> Row:
    parts = [dataclasses.replace(part, facts=part.facts | facts) for part in item.record.parts]
    return dataclasses.replace(item, record=dataclasses.replace(item.record, parts=parts))


def test_other_initial_weights_are_told_apart_from_other_losses() -> None:
    assert states(with_fact(row(), initial_weights_sha256="a" * 64), row())["initial weights"] == "outside"


def test_times_of_another_device_or_without_a_clock_are_not_compared() -> None:
    other = with_fact(row(seconds=5.0), device_name="NVIDIA A100")
    assert (states(other, row())["times"], "step time" in states(other, row())) == ("undefined", False)
    forked = row(seconds=5.0, launcher="fork")
    assert states(forked, row())["times"] == "undefined"
    assert judge_reproduction(forked, row(), [row()]).reproduced


def test_nothing_outside_is_reproduced_and_one_outside_is_not() -> None:
    assert Reproduction((Check("a", "identical", ""), Check("b", "undefined", ""))).reproduced
    assert not Reproduction((Check("a", "inside", ""), Check("b", "outside", ""))).reproduced


def test_where_nothing_can_be_compared_nothing_is_reproduced() -> None:
    forked = row(launcher="fork")
    part = dataclasses.replace(forked.record.parts[0], series={})
    mute = Row(dataclasses.replace(forked.record, parts=[part]), forked.cell, forked.file)
    verdict = judge_reproduction(mute, mute, [mute])
    assert {check.name: check.state for check in verdict.checks}["losses"] == "undefined"
    assert not verdict.reproduced
    assert verdict.text.endswith("\nnot judged: nothing could be compared")
