"""What must be equal before two trials are compared, as far as the records say it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bench.cell import cell_from_json
from bench.measure import conditions as module
from bench.measure.conditions import Difference, conditions, conditions_here, differences
from bench.record import Record
from tests.unit.report.trial_factory import make_record

CARD = {"name": "NVIDIA H100 80GB HBM3", "power_limit_watts": 700.0, "application_sm_clock_megahertz": 1980, "ecc": True}


def record(device: str, *cards: dict[str, Any]) -> Record:
    cell = {"stage": "sft", "model": "bloom-tiny", "strategy": "naive", "steps": 10, "device": device}
    made = make_record(cell_from_json(cell))
    return dataclasses.replace(made, provenance={**made.provenance, "machines": [{"cpu": "a CPU", "devices": list(cards)}]})


def test_a_lowered_power_limit_is_a_difference():
    before, now = (conditions(record("cuda", CARD | change)) for change in ({}, {"power_limit_watts": 500.0}))
    assert differences([before], [now]) == [Difference("power limit", "700 W", "500 W")]


@pytest.mark.parametrize(
    ("key", "value", "name"), [("application_sm_clock_megahertz", 1200, "application clock, MHz"), ("ecc", False, "ECC")]
)
def test_so_are_locked_clocks_and_error_correction(key, value, name):
    before, now = conditions(record("cuda", CARD)), conditions(record("cuda", CARD | {key: value}))
    assert [item.name for item in differences([before], [now])] == [name]


def test_every_limit_among_the_devices_counts():
    assert conditions(record("cuda", CARD, CARD | {"power_limit_watts": 500.0}))["power limit"] == "500 W, 700 W"


def test_what_a_driver_does_not_tell_is_no_difference():
    unknown = {key: None for key in CARD if key != "name"}
    assert differences([conditions(record("cuda", CARD))], [conditions(record("cuda", unknown))]) == []


def test_devices_of_a_machine_do_not_matter_to_a_trial_on_its_cpu():
    assert "power limit" not in conditions(record("cpu", CARD))


def test_the_present_machine_is_described_in_the_same_words(monkeypatch):
    monkeypatch.setattr(module, "machine", lambda: {"cpu": "a CPU", "devices": [CARD]})
    here, there = conditions_here("cuda"), conditions(record("cuda", CARD))
    shared = ("power limit", "application clock, MHz", "ECC")
    assert [here[name] for name in shared] == [there[name] for name in shared] == ["700 W", "1980", "True"]
    assert "power limit" not in conditions_here("cpu")
