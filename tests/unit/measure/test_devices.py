from __future__ import annotations

import re

import pytest

from bench.measure.devices import DEVICES, DTYPES, DeviceRow, Unknown, device_row

ROWS = DEVICES.values()


def test_the_devices_that_people_rent_are_in_the_table():
    kinds = ("V100", "T4", "A100", "A10", "A30", "A40", "A6000", "L4", "L40", "L40S", "H100", "H800", "H200", "H20", "B200", "GB200",
             "3090", "4090", "5090", "6000 Ada")  # fmt: skip
    assert [kind for kind in kinds if not any(re.search(rf"\b{kind}", name) for name in DEVICES)] == []


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("Tesla V100-SXM2-32GB", "fp16", 125.0),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H20", "bf16", 148.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA B200", "fp8", 4500.0),
    ],
)
def test_peaks_are_dense_and_of_the_very_variant(name, dtype, teraflops):
    assert device_row(name).peak(dtype) == teraflops * 1e12


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_half_the_bits_double_the_rate_so_no_figure_is_a_sparse_one(row):
    assert row.peaks["fp16"] == row.peaks.get("bf16", row.peaks["fp16"])
    for wide, narrow in (("tf32", "bf16"), ("bf16", "fp8")):
        if wide in row.peaks and narrow in row.peaks:
            assert row.peaks[narrow] / row.peaks[wide] == pytest.approx(2, rel=0.03)
    assert set(row.peaks) <= set(DTYPES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_numbers_are_of_the_right_order_and_have_a_source(row):
    assert 5e12 < row.peaks["fp32"] <= row.peaks["fp16"] < 1e16
    assert 3e11 <= row.bandwidth <= 8e12
    assert 16 * 2**30 <= row.memory_bytes <= 192 * 2**30
    assert re.search(r"\b20\d\d\b|v\d", row.source)
    assert "http" not in row.source


def test_the_memory_of_the_chips_is_not_less_than_what_a_driver_offers():
    seen = {"NVIDIA H100 80GB HBM3": 81559, "NVIDIA H200": 143771, "NVIDIA A100-SXM4-80GB": 81920, "NVIDIA L40S": 46068, "Tesla T4": 15360}
    for name, mebibytes in seen.items():
        assert 0.93 * DEVICES[name].memory_bytes < mebibytes * 2**20 <= DEVICES[name].memory_bytes


def test_a_name_is_found_with_and_without_its_vendor():
    assert device_row("A100-SXM4-40GB") is device_row("NVIDIA A100-SXM4-40GB")
    assert device_row("NVIDIA Tesla T4") is device_row("Tesla T4")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cpu", "a CPU"),
        (None, "names no device"),
        ("  ", "names no device"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "slice"),
        ("NVIDIA H100", "no row"),
        ("NVIDIA A100-SXM4-96GB", "no row"),
        ("AMD Instinct MI300X", "no row"),
    ],
)
def test_what_is_unknown_says_why_and_is_never_a_number(name, reason):
    row = device_row(name)
    assert isinstance(row, Unknown)
    assert reason in row.reason
    assert not row


def test_a_type_without_matrix_units_has_no_peak():
    answer = device_row("Tesla V100-SXM2-16GB").peak("bf16")
    assert isinstance(answer, Unknown)
    assert answer.reason == "Tesla V100-SXM2-16GB has no matrix units for bf16; it has fp32, fp16"


def test_a_lowered_power_limit_is_told_and_changes_no_peak():
    full, lowered = device_row("NVIDIA H100 80GB HBM3", 700.0), device_row("NVIDIA H100 80GB HBM3", 500.0)
    assert isinstance(lowered, DeviceRow)
    assert (full.note, lowered.note) == (None, "power limit 500 W; the peaks hold at 700 W")
    assert lowered.peaks == full.peaks
