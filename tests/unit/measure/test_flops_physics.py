from __future__ import annotations

import math

import pytest

from bench.measure.physics import impossible_numbers

POSSIBLE = {
    "mfu": 0.42, "hfu": 0.55, "mbu": 0.6, "flops_per_second": 400e12, "matrix_rate": 790e12,
    "memory_bytes": 70 * 2**30, "card_bytes": 80 * 2**30,
    "phases": {"rollout": 6.0, "learn": 3.9, "other": 0.1}, "seconds": 10.0, "units": 20_000, "units_per_second": 2000.0,
}  # fmt: skip


def test_possible_numbers_are_left_alone():
    assert impossible_numbers(**POSSIBLE) == []


def test_what_is_not_there_is_not_looked_at():
    assert impossible_numbers() == []
    assert impossible_numbers(memory_bytes=2**60, phases={"a": 9.0}, units=5) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mfu": 5.63, "hfu": 5.63}, "MFU above 100 %: 563.0% of the device's peak"),
        ({"hfu": 1.01}, "HFU above 100 %"),
        ({"mbu": 1.2}, "MBU above 100 %"),
        ({"mfu": math.nan, "hfu": None}, "MFU is nan"),
        ({"mfu": -0.1}, "MFU is -0.1"),
        ({"hfu": 0.41}, "HFU below MFU: 41.0% < 42.0%"),
        (
            {"flops_per_second": 361e12, "matrix_rate": 300e12},
            "faster than the matrix products of the same node: 361.00",
        ),
        ({"memory_bytes": 81 * 2**30}, "memory above the card: 81.0 GiB, the card has 80.0 GiB"),
        ({"phases": {"rollout": 6.0, "learn": 5.0}}, "phases above the whole: they sum to 11.000 s of 10.000 s"),
        ({"phases": {"rollout": -1.0, "learn": 5.0}}, "phase rollout took -1 s"),
        ({"units_per_second": 3000.0}, "rate and count do not match: 3000 units/s x 10 s = 30000, counted 20000"),
    ],
)
def test_an_impossible_number_is_named(wrong, said):
    found = impossible_numbers(**{**POSSIBLE, **wrong})
    assert any(text.startswith(said) for text in found), found


def test_no_time_is_no_time():
    assert impossible_numbers(units=5, units_per_second=1.0, seconds=0.0) == ["5 units in 0 s"]


def test_a_little_above_a_measured_median_is_possible():
    assert impossible_numbers(flops_per_second=820e12, matrix_rate=790e12) == []
    assert len(impossible_numbers(flops_per_second=840e12, matrix_rate=790e12)) == 1
