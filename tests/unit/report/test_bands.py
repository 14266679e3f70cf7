from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench.report.bands import allowed_share, band_verdict, device_name, judge_bands, read_references
from bench.report.inventory import Row
from tests.unit.report.trial_factory import make_cell, make_row, write

CELL = make_cell("sft", device="cuda", model="bloom-560m", steps=50)


def row_with(losses: list[float], **rest: Any) -> Row:
    row = make_row(CELL, **rest)
    part = row.record.parts[0]
    return Row(dataclasses.replace(row.record, parts=[dataclasses.replace(part, series={"loss": losses})]), CELL, row.file)


FALLING = [4.0 - 0.05 * step for step in range(50)]


def states(mine: list[float], reference: list[float], **rest: Any) -> dict[str, str]:
    return {check.name: check.state for check in band_verdict(row_with(mine, **rest), row_with(reference)).checks}


def test_a_repeated_trial_is_inside() -> None:
    assert set(states(FALLING, FALLING).values()) == {"inside"}
    assert band_verdict(row_with(FALLING), row_with(FALLING)).state == "inside"


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


def test_a_reference_that_does_not_vary_is_undefined_and_never_a_pass() -> None:
    assert states([1.0] * 50, [1.0] * 50)["correlation"] == "undefined"


def test_another_number_of_steps_is_outside() -> None:
    assert band_verdict(row_with(FALLING[:40]), row_with(FALLING)).state == "outside"


def test_step_time_has_five_percent() -> None:
    assert states(FALLING, FALLING, seconds=0.104)["step_seconds"] == "inside"
    assert states(FALLING, FALLING, seconds=0.106)["step_seconds"] == "outside"


def test_times_that_are_no_measurements_are_not_checked() -> None:
    assert "step_seconds" not in states(FALLING, FALLING, launcher="fork")


def test_references_match_by_cell_trial_and_device(tmp_path: Path) -> None:
    reference = row_with(FALLING)
    write(tmp_path / "h100" / "suite" / "records", reference.record)
    stored = read_references(tmp_path)
    assert judge_bands([row_with(FALLING)], stored).keys() == {reference.file}
    other = row_with(FALLING)
    part = dataclasses.replace(other.record.parts[0], facts={"device_name": "another card"})
    other = Row(dataclasses.replace(other.record, parts=[part]), CELL, other.file)
    assert judge_bands([other], stored) == {}
    assert device_name(other.record) == "another card"


def test_no_folder_of_references_is_no_reference(tmp_path: Path) -> None:
    assert read_references(None) == ()
    assert read_references(tmp_path / "none") == ()
    assert read_references(tmp_path) == ()
