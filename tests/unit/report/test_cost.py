from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench.cell import Cell
from bench.report.commands import report
from bench.report.inventory import Row
from bench.report.metrics import Trial
from bench.report.registry import Given
from tests.unit.report.trial_factory import make_cell, make_record, write

GPU: dict[str, Any] = {"device": "cuda", "model": "bloom-560m", "precision": "bf16-master"}


def trial_of(
    cell: Cell, *, joules: tuple[float | None, ...] = (), laps: list[Any] | None = None, price: float | None = None, seconds: float = 0.5
) -> Trial:
    """`joules` and `laps`: energy of the whole trial and of each lap, of each device."""
    record = make_record(cell, seconds=seconds)
    devices = {f"GPU-{index}": {"energy_joules": value, "laps_energy_joules": laps} for index, value in enumerate(joules)}
    observed = {**record.observed, "devices": devices}
    return Trial(Row(dataclasses.replace(record, observed=observed), cell, "a.json"), Given(price=price))


def number(trial: Trial, name: str) -> float:
    value = trial.values[name]
    assert value.number is not None, value.reason
    return value.number


SFT = make_cell("sft", steps=50, **GPU)
PPO = make_cell("ppo", iterations=8, **GPU)


def test_energy_of_a_thousand_loss_tokens_is_that_of_the_window() -> None:
    """10 laps of 5 steps of 8 rows with 60 loss tokens each, 5 of them warm-up; the warm-up takes more."""
    laps = [*[900.0] * 5, *[120.0] * 5]
    assert number(trial_of(SFT, joules=(9000.0,), laps=laps), "energy_per_1000_loss_tokens") == 50.0
    two = make_cell("sft", "ddp", nodes=2, steps=50, **GPU)
    assert number(trial_of(two, joules=(1.0, 1.0), laps=laps), "energy_per_1000_loss_tokens") == 100.0


def test_energy_of_an_iteration_is_that_of_the_window() -> None:
    trial = trial_of(PPO, joules=(1.0,), laps=[5000.0, 4000.0, *[500.0] * 6], seconds=20.0)
    assert number(trial, "energy_per_iteration") == 500.0


def test_energy_of_the_whole_trial_over_all_its_work() -> None:
    """50 steps of 480 loss tokens; 8 iterations."""
    assert number(trial_of(SFT, joules=(1200.0,)), "trial_energy_per_1000_loss_tokens") == 50.0
    assert number(trial_of(PPO, joules=(4000.0,), seconds=20.0), "trial_energy_per_iteration") == 500.0


@pytest.mark.parametrize(
    ("laps", "reason"),
    [
        (None, "the energy of the laps was not recorded"),
        ([1.0] * 9, "the energy of the laps was not recorded"),
        ([*[1.0] * 9, None], "a device's energy counter was not read on both sides of a lap"),
    ],
)
def test_laps_without_energy_have_a_reason(laps: list[Any] | None, reason: str) -> None:
    assert trial_of(SFT, joules=(5.0,), laps=laps).values["energy_per_1000_loss_tokens"].reason == reason


def test_energy_that_is_unknown_in_the_warm_up_only_does_not_matter() -> None:
    assert number(trial_of(SFT, joules=(None,), laps=[None, *[120.0] * 9]), "energy_per_1000_loss_tokens") == 50.0


@pytest.mark.parametrize(
    ("joules", "reason"),
    [
        ((), "no device counts its energy"),
        ((None,), "no device counts its energy"),
        ((5.0, None), "not every device counts its energy"),
    ],
)
def test_no_counter_no_energy_and_a_reason(joules: tuple[float | None, ...], reason: str) -> None:
    trial = trial_of(make_cell("sft", "ddp", steps=50, processes_per_node=max(1, len(joules)), **GPU), joules=joules)
    assert trial.values["energy_joules"].reason == trial.values["trial_energy_per_1000_loss_tokens"].reason == reason


def test_device_hours_and_their_price() -> None:
    """960 loss tokens/s on one device; on two, each of which is paid for, 1 % slower than half the time of one."""
    one = trial_of(make_cell("sft", steps=50, **GPU), price=3.0)
    assert number(one, "device_hours_per_million_loss_tokens") == pytest.approx(1e6 / 960 / 3600)
    assert number(one, "cost_per_million_loss_tokens") == pytest.approx(3 * 1e6 / 960 / 3600)
    two = trial_of(make_cell("sft", "ddp", nodes=2, steps=50, **GPU))
    assert number(two, "device_hours_per_million_loss_tokens") == pytest.approx(2 * 1.01 * 1e6 / 960 / 3600)


def test_an_iteration_has_its_price_too() -> None:
    trial = trial_of(make_cell("ppo", iterations=8, **GPU), price=1.8, seconds=20.0)
    assert number(trial, "device_hours_per_1000_iterations") == pytest.approx(20 * 1000 / 3600)
    assert number(trial, "cost_per_1000_iterations") == pytest.approx(10.0)


def test_no_price_no_cost_and_a_reason() -> None:
    trial = trial_of(make_cell("sft", steps=50, **GPU))
    assert trial.values["cost_per_million_loss_tokens"].reason == "no price was given (`report --price`)"


def test_the_report_shows_cost_only_with_a_price(tmp_path: Path) -> None:
    records = write(tmp_path / "suite" / "records", make_record(make_cell("sft", steps=50, **GPU), seconds=0.5))
    without = report(records, tmp_path / "a").markdown.read_text(encoding="utf-8")
    priced = report(records, tmp_path / "b", price=2.5).markdown.read_text(encoding="utf-8")
    assert "cost per million loss tokens: no price was given" in without
    assert "cost per million loss tokens (price)" in priced
