"""What devices can do at best, as data: dense peak FLOP/s by type, memory and its bandwidth, each row with its source. Torch-free.

Rows are found by the exact name that NVML and torch give. A name that is not here is unknown, with a reason: a wrong peak is worse
than none.

How the figures were read from the data sheets
* Tensor-core rates are *dense*. Since Ampere the sheets print the rate with 2:4 sparsity, alone or beside the dense one: halved.
* GeForce cards multiply 16-bit numbers at half rate when they add up in fp32, as torch does: that rate is taken.
* `fp32` is without tensor cores; `tf32` is fp32 rounded to 10 bits of mantissa in tensor cores, used only where torch is told so.
* Sheets for boards of several GPUs are divided by their number.
* Rates hold at the boost clock of the sheet. A card that boosts above it can exceed them by some percent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

DTYPES = ("fp32", "tf32", "bf16", "fp16", "fp8")
LOWERED = 0.98
"""A power limit below this share of the sheet's is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRow:
    """One device."""

    name: str
    """As NVML and torch give it."""
    peaks: dict[str, float]
    """Dense FLOP/s by type (`DTYPES`); a type that its matrix units do not have is missing."""
    memory_bytes: int
    """Of the memory chips; what the driver offers is some percent less."""
    bandwidth: float
    """Peak bytes/s of the memory."""
    power_watts: float | None
    """Power limit that the figures hold at."""
    source: str
    note: str | None = None
    """What a reader must know of this very device."""

    def peak(self, dtype: str) -> float | Unknown:
        """Dense peak FLOP/s for `dtype`, or why there is none."""
        if dtype in self.peaks:
            return self.peaks[dtype]
        return Unknown(f"{self.name} has no matrix units for {dtype}; it has {', '.join(self.peaks)}")


@dataclass(frozen=True, slots=True)
class Unknown:
    """Why there is no value."""

    reason: str

    def __bool__(self) -> bool:
        return False


_GIB = 1 << 30

_VOLTA = "NVIDIA V100 Tensor Core GPU data sheet, document 1165301, January 2020"
_VOLTA_S = "NVIDIA V100S column of the NVIDIA V100 Tensor Core GPU data sheet, document 1165301, January 2020"
_T4 = "NVIDIA T4 Tensor Core GPU data sheet, document 951643, March 2019"
_A100 = "NVIDIA A100 Tensor Core GPU data sheet, documents 1758950 (2021) and 2188504 (June 2021)"
_A10 = "NVIDIA A10 Tensor Core GPU data sheet, 2021"
_A30 = "NVIDIA A30 Tensor Core GPU data sheet, 2021"
_A40 = "NVIDIA A40 data sheet, 2021; NVIDIA Ampere GA102 GPU Architecture whitepaper v2, 2021"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper v2, 2021, appendices A and B"
_L4 = "NVIDIA L4 Tensor Core GPU data sheet, 2023"
_L40 = "NVIDIA L40 GPU data sheet, 2023"
_L40S = "NVIDIA L40S GPU data sheet, 2023"
_ADA = "NVIDIA Ada GPU Architecture whitepaper v2, 2023, appendix A"
_ADA_PRO = "NVIDIA RTX 6000 Ada Generation data sheet, 2023 (1457 TFLOP/s is fp8 with sparsity)"
_H100 = "NVIDIA H100 Tensor Core GPU data sheet, 2024; NVIDIA H100 Tensor Core GPU Architecture whitepaper v1.04, table 3"
_H800 = "NVIDIA H800 Tensor Core GPU data sheet, 2023: the H100 with less fp64 and a slower NVLink"
_H200 = "NVIDIA H200 Tensor Core GPU data sheet, 2024"
_H20 = "NVIDIA H20 GPU specification as published by server vendors, 2024 (no public NVIDIA data sheet)"
_GH200 = "NVIDIA GH200 Grace Hopper Superchip data sheet, 2024, 96 GB HBM3"
_B200 = "NVIDIA HGX platform specification, HGX B200, 2025, and NVIDIA DGX B200 data sheet, 2025; an eighth of each"
_GB200 = "NVIDIA GB200 NVL72 specification, Grace Blackwell Superchip column, 2025; a half of it"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper v1.1, 2025, appendix A"

# name; dense TFLOP/s: fp32, tf32, bf16, fp16, fp8; memory GiB, GB/s; watts; source
_Numbers = tuple[str, float, float | None, float | None, float | None, float | None, int, float, float | None, str]
_TABLE: tuple[_Numbers, ...] = (
    ("Tesla V100-SXM2-16GB", 15.7, None, None, 125.0, None, 16, 900, 300, _VOLTA),
    ("Tesla V100-SXM2-32GB", 15.7, None, None, 125.0, None, 32, 900, 300, _VOLTA),
    ("Tesla V100-PCIE-16GB", 14.0, None, None, 112.0, None, 16, 900, 250, _VOLTA),
    ("Tesla V100-PCIE-32GB", 14.0, None, None, 112.0, None, 32, 900, 250, _VOLTA),
    ("Tesla V100S-PCIE-32GB", 16.4, None, None, 130.0, None, 32, 1134, 250, _VOLTA_S),
    ("Tesla T4", 8.1, None, None, 65.0, None, 16, 320, 70, _T4),
    ("NVIDIA A100-SXM4-40GB", 19.5, 156.0, 312.0, 312.0, None, 40, 1555, 400, _A100),
    ("NVIDIA A100-SXM4-80GB", 19.5, 156.0, 312.0, 312.0, None, 80, 2039, 400, _A100),
    ("NVIDIA A100-PCIE-40GB", 19.5, 156.0, 312.0, 312.0, None, 40, 1555, 250, _A100),
    ("NVIDIA A100 80GB PCIe", 19.5, 156.0, 312.0, 312.0, None, 80, 1935, 300, _A100),
    ("NVIDIA A10", 31.2, 62.5, 125.0, 125.0, None, 24, 600, 150, _A10),
    ("NVIDIA A30", 10.3, 82.0, 165.0, 165.0, None, 24, 933, 165, _A30),
    ("NVIDIA A40", 37.4, 74.8, 149.7, 149.7, None, 48, 696, 300, _A40),
    ("NVIDIA RTX A6000", 38.7, 77.4, 154.8, 154.8, None, 48, 768, 300, _GA102),
    ("NVIDIA GeForce RTX 3090", 35.6, 35.6, 71.0, 71.0, None, 24, 936, 350, _GA102),
    ("NVIDIA L4", 30.3, 60.0, 121.0, 121.0, 242.5, 24, 300, 72, _L4),
    ("NVIDIA L40", 90.5, 90.5, 181.05, 181.05, 362.0, 48, 864, 300, _L40),
    ("NVIDIA L40S", 91.6, 183.0, 362.05, 362.05, 733.0, 48, 864, 350, _L40S),
    ("NVIDIA GeForce RTX 4090", 82.6, 82.6, 165.2, 165.2, 330.3, 24, 1008, 450, _ADA),
    ("NVIDIA RTX 6000 Ada Generation", 91.1, 182.1, 364.2, 364.2, 728.5, 48, 960, 300, _ADA_PRO),
    ("NVIDIA H100 80GB HBM3", 67.0, 494.7, 989.4, 989.4, 1978.9, 80, 3350, 700, _H100),
    ("NVIDIA H100 PCIe", 51.0, 378.0, 756.5, 756.5, 1513.0, 80, 2000, 350, _H100),
    ("NVIDIA H100 NVL", 60.0, 417.5, 835.5, 835.5, 1670.5, 94, 3900, 400, _H100),
    ("NVIDIA H800", 67.0, 494.7, 989.4, 989.4, 1978.9, 80, 3350, 700, _H800),
    ("NVIDIA H800 PCIe", 51.0, 378.0, 756.5, 756.5, 1513.0, 80, 2000, 350, _H800),
    ("NVIDIA H200", 67.0, 494.7, 989.4, 989.4, 1978.9, 141, 4800, 700, _H200),
    ("NVIDIA H200 NVL", 60.0, 417.5, 835.5, 835.5, 1670.5, 141, 4800, 600, _H200),
    ("NVIDIA H20", 44.0, 74.0, 148.0, 148.0, 296.0, 96, 4000, 400, _H20),
    ("NVIDIA GH200 480GB", 67.0, 494.7, 989.4, 989.4, 1978.9, 96, 4000, None, _GH200),
    ("NVIDIA B200", 75.0, 1125.0, 2250.0, 2250.0, 4500.0, 180, 8000, 1000, _B200),
    ("NVIDIA GB200", 80.0, 1250.0, 2500.0, 2500.0, 5000.0, 186, 8000, 1200, _GB200),
    ("NVIDIA GeForce RTX 5090", 104.8, 104.8, 209.5, 209.5, 419.0, 32, 1792, 575, _BLACKWELL),
)


def _rows() -> Iterator[DeviceRow]:
    for name, *rates, gibibytes, bandwidth, watts, source in _TABLE:
        peaks = {dtype: rate * 1e12 for dtype, rate in zip(DTYPES, rates, strict=True) if rate is not None}
        yield DeviceRow(
            name=name, peaks=peaks, memory_bytes=gibibytes * _GIB, bandwidth=bandwidth * 1e9, power_watts=watts, source=source
        )  # fmt: skip


DEVICES: dict[str, DeviceRow] = {row.name: row for row in _rows()}
"""Every row by name."""


def _bare(name: str) -> str:
    """The name without the vendor: drivers before 470 do not give it, and later ones gave it to Tesla cards too."""
    return " ".join(name.split()).removeprefix("NVIDIA ")


_BY_BARE_NAME = {_bare(name): row for name, row in DEVICES.items()}


def device_row(name: str | None, power_limit_watts: float | None = None) -> DeviceRow | Unknown:
    """The row of the device called `name`, or why there is none; `Unknown` is false.

    A power limit below the sheet's stays in the row's `note`: the peak is that of the sheet, and less is attainable.

    >>> device_row("NVIDIA H100 80GB HBM3").peaks["bf16"], device_row("NVIDIA H100 PCIe").peaks["bf16"]
    (989400000000000.0, 756500000000000.0)
    >>> device_row("cpu").reason
    'a CPU has no dense peak that a data sheet states'
    """
    if name is None or not name.strip():
        return Unknown("the record names no device")
    if name.strip().lower() == "cpu":
        return Unknown("a CPU has no dense peak that a data sheet states")
    if " MIG " in name:
        return Unknown(f"{name}: a slice of a device has no peaks of its own in a data sheet")
    row = _BY_BARE_NAME.get(_bare(name))
    if row is None:
        return Unknown(f"{name}: no row in bench/measure/devices.py; one with its source would be right")
    if power_limit_watts is not None and row.power_watts is not None and power_limit_watts < LOWERED * row.power_watts:
        return dataclasses.replace(row, note=f"power limit {power_limit_watts:g} W; the peaks hold at {row.power_watts:g} W")
    return row
