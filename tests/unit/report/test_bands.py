from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench.report.bands import Band, Reference, allowed_share, band_verdict, device_name, judge_bands, read_references, suites_of
from bench.report.inventory import Row
from tests.unit.report.trial_factory import make_cell, make_row, write

CELL = make_cell("sft", device="cuda", model="bloom-560m", steps=50)


def row_with(losses: list[float], **rest: Any) -> Row:
    row = make_row(CELL, **rest)
    part = row.record.parts[0]
    return Row(dataclasses.replace(row.record, parts=[dataclasses.replace(part, series={"loss": losses})]), CELL, row.file)


FALLING = [4.0 - 0.05 * step for step in range(50)]


def band_of(mine: list[float], reference: list[float], **rest: Any) -> Band:
    return band_verdict(row_with(mine, **rest), Reference([row_with(reference)]))


def states(mine: list[float], reference: list[float], **rest: Any) -> dict[str, str]:
    return {check.name: check.state for check in band_of(mine, reference, **rest).checks}


def test_a_repeated_trial_is_inside() -> None:
    assert set(states(FALLING, FALLING).values()) == {"inside"}
    assert band_of(FALLING, FALLING).state == "inside"
    assert band_of(FALLING, FALLING).other_losses is None


def test_another_shape_is_outside() -> None:
    assert states(FALLING[::-1], FALLING)["correlation"] == "outside"


@pytest.mark.parametrize(("loss", "share"), [(2.1, 0.10), (2.0, 0.05), (0.5, 0.05), (0.49, 0.02)])
def test_points_have_the_band_of_their_size(loss: float, share: float) -> None:
    assert allowed_share(loss) == share


def test_one_point_outside_is_outside() -> None:
    bumped = [*FALLING[:10], FALLING[10] * 1.11, *FALLING[11:]]
    assert states(bumped, FALLING)["points"] == "outside"
    assert states([*FALLING[:10], FALLING[10] * 1.09, *FALLING[11:]], FALLING)["points"] == "inside"


def test_the_final_loss_has_three_percent() -> None:
    high = [*FALLING[:45], *[value * 1.04 for value in FALLING[45:]]]
    assert states(high, FALLING)["final loss"] == "outside"


def test_a_curve_that_keeps_its_points_and_loses_its_shape_is_outside() -> None:
    """A loss that stands still near the reference's mean: every point is within 10 %, the correlation tells."""
    slow = [3.0 - 0.001 * step for step in range(50)]
    noise = [2.97 + (0.02 if step % 2 else -0.02) for step in range(50)]
    found = {check.name: check.state for check in band_of(noise, slow).curve}
    assert found == {"correlation": "outside", "points": "inside", "final loss": "inside"}


def test_a_reference_that_does_not_vary_is_undefined_and_never_a_pass() -> None:
    still = band_of([1.0] * 50, [1.0] * 50)
    assert {check.name: check.state for check in still.curve} == {"correlation": "undefined", "points": "inside", "final loss": "inside"}
    assert still.state == "undefined"
    assert band_of([1.0] * 49 + [2.0], [1.0] * 50).state == "outside"
    assert band_of([0.0] * 50, [0.0] * 50).state == "undefined"


def test_two_steps_are_too_few_for_a_correlation() -> None:
    assert band_of(FALLING[:2], FALLING[:2]).state == "undefined"


def test_a_trial_that_stands_still_where_the_reference_falls_is_outside() -> None:
    assert states([FALLING[0]] * 50, FALLING)["correlation"] == "outside"


def test_another_number_of_steps_is_outside() -> None:
    band = band_of(FALLING[:40], FALLING)
    assert (band.state, band.other_losses) == ("outside", "outside the reference band: curve: 40 steps against 50")


@pytest.mark.parametrize(("seconds", "state", "better"), [(0.104, "inside", False), (0.106, "outside", False), (0.094, "outside", True)])
def test_step_time_has_five_percent(seconds: float, state: str, better: bool) -> None:
    [check] = [check for check in band_of(FALLING, FALLING, seconds=seconds).costs if check.name == "step time"]
    assert (check.state, check.better) == (state, better)


@pytest.mark.parametrize(("factor", "state"), [(1.04, "inside"), (1.06, "outside"), (0.94, "outside")])
@pytest.mark.parametrize("name", ["device memory", "peak allocated"])
def test_memory_has_five_percent(name: str, factor: float, state: str) -> None:
    row = row_with(FALLING)
    part = row.record.parts[0]
    memory = dataclasses.replace(part.memory, peak_allocated_bytes=int((part.memory.peak_allocated_bytes or 0) * factor))
    peaks = {uuid: int(value * factor) for uuid, value in row.record.observed["device_memory_peak_bytes"].items()}
    observed = row.record.observed | {"device_memory_peak_bytes": peaks}
    record = dataclasses.replace(row.record, parts=[dataclasses.replace(part, memory=memory)], observed=observed)
    found = {check.name: check.state for check in band_verdict(Row(record, CELL, row.file), Reference([row_with(FALLING)])).costs}
    assert found[name] == state


def test_times_outside_the_band_are_shown_and_do_not_strike() -> None:
    band = band_of(FALLING, FALLING, seconds=0.2)
    assert (band.state, band.other_losses) == ("outside", None)
    assert band.costs[0].text == "0.2000 s, 100.0% above 0.1000 of 1 record; allowed 5%"


def test_stalls_that_the_typical_step_does_not_show_are_outside_by_the_rate() -> None:
    stored = row_with(FALLING)
    laps = [
        dataclasses.replace(lap, seconds=lap.seconds * (1 if place % 3 else 3)) for place, lap in enumerate(stored.record.parts[0].laps)
    ]
    part = dataclasses.replace(stored.record.parts[0], laps=laps)
    stalled = Row(dataclasses.replace(stored.record, parts=[part]), CELL, "stalled.json")
    states = {check.name: (check.state, check.better) for check in band_verdict(stalled, Reference([stored])).costs}
    assert states["step time"] == ("inside", False)
    assert states["loss tokens/s"] == ("outside", False)


def test_times_and_memory_are_held_to_the_median_of_all_stored_trials() -> None:
    """One stored trial was slow: against it alone 0.1 s would be outside."""
    stored = Reference([numbered(number, seconds) for number, seconds in enumerate((0.13, 0.1, 0.1))])
    assert {check.state for check in band_verdict(row_with(FALLING, seconds=0.1), stored).costs} == {"inside"}


def numbered(number: int, seconds: float) -> Row:
    row = row_with(FALLING, seconds=seconds)
    return Row(dataclasses.replace(row.record, trial=number), CELL, f"{number}.json")


def test_a_trial_that_was_never_stored_is_judged_by_times_and_memory_alone() -> None:
    stored = Reference([numbered(1, 0.1)])
    band = band_verdict(row_with(FALLING[::-1], seconds=0.1), stored)
    assert (band.curve, band.state) == ((), "inside")


def test_times_that_are_no_measurements_are_not_checked() -> None:
    assert band_of(FALLING, FALLING, launcher="fork").costs == ()
    measured = row_with(FALLING)
    assert band_verdict(measured, Reference([row_with(FALLING, launcher="fork")])).costs == ()


def test_of_ppo_the_first_iteration_is_judged() -> None:
    """Two steps an iteration; the policy's loss is near 0, so 2 % is of the advantages' scale."""
    good = make_row(make_cell("ppo", device="cuda", model="bloom-560m"))
    curve = good.record.parts[0].series["loss"]
    for moved, state in (
        ([*curve[:2], *[value + 0.3 for value in curve[2:]]], "inside"),
        ([curve[0], curve[1] + 0.03, *curve[2:]], "outside"),
    ):
        part = dataclasses.replace(good.record.parts[0], series=good.record.parts[0].series | {"loss": moved})
        row = Row(dataclasses.replace(good.record, parts=[part]), good.cell, good.file)
        first, *others = band_verdict(row, Reference([good])).curve
        assert (first.name, first.state, {check.state for check in others}) == ("first iteration", state, {"inside"})


def test_references_match_by_cell_and_device(tmp_path: Path) -> None:
    reference = row_with(FALLING)
    write(tmp_path / "h100" / "suite" / "records", reference.record)
    stored = read_references(tmp_path)
    assert judge_bands([row_with(FALLING)], stored).keys() == {reference.file}
    assert suites_of(stored) == {"suite"}
    assert judge_bands([row_with(FALLING, outcome="oom", reason="x")], stored) == {}
    other = row_with(FALLING)
    part = dataclasses.replace(other.record.parts[0], facts={"device_name": "another card"})
    other = Row(dataclasses.replace(other.record, parts=[part]), CELL, other.file)
    assert judge_bands([other], stored) == {}
    assert device_name(other.record) == "another card"


def test_each_device_has_its_own_stored_trial(tmp_path: Path) -> None:
    first = row_with(FALLING)
    part = dataclasses.replace(first.record.parts[0], facts={"device_name": "another card"})
    second = Row(dataclasses.replace(first.record, parts=[part]), CELL, "second.json")
    for folder, row in (("a", first), ("b", second)):
        write(tmp_path / folder / "suite" / "records", row.record)
    assert judge_bands([first, second], read_references(tmp_path)).keys() == {first.file, second.file}


def test_another_cpu_is_another_device() -> None:
    here = make_row(make_cell("sft", launcher="torchrun"))
    machine = here.record.provenance["machines"][0] | {"cpu": "another CPU"}
    there = Row(dataclasses.replace(here.record, provenance=here.record.provenance | {"machines": [machine]}), here.cell, here.file)
    assert (device_name(here.record), device_name(there.record)) == ("a CPU", "another CPU")
    assert judge_bands([there], [here]) == {}
    assert judge_bands([here], [here]).keys() == {here.file}


def test_no_folder_of_references_is_no_reference(tmp_path: Path) -> None:
    assert read_references(None) == ()
    assert read_references(tmp_path / "none") == ()
    assert read_references(tmp_path) == ()
