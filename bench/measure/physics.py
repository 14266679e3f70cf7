"""Numbers that cannot be true. Torch-free, pure; the report withholds what is named here and prints why.

Such numbers have been published: 563 % MFU, 361 TFLOP/s on a model of 125 M parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

RATE_SLACK = 1.05
"""A measured ceiling is a median of one size of matrix product; another size may be this much faster."""
PHASE_SLACK = 1.03
"""Phases may exceed the whole by this factor: they are read from other clocks."""
RATE_TOLERANCE = 0.01
"""Rate x seconds and the units counted may differ by this share: roundings."""

GIB = 1 << 30


def impossible_numbers(
    *,
    mfu: float | None = None,
    hfu: float | None = None,
    mbu: float | None = None,
    flops_per_second: float | None = None,
    matrix_rate: float | None = None,
    memory_bytes: float | None = None,
    card_bytes: float | None = None,
    phases: Mapping[str, float] | None = None,
    seconds: float | None = None,
    units: float | None = None,
    units_per_second: float | None = None,
) -> list[str]:
    """What is impossible among the numbers given, a sentence each; empty if nothing is. What is None is not looked at.

    `mfu`, `hfu`, `mbu` are shares of the peak; `flops_per_second` of one device goes with `matrix_rate`, the rate measured on it in
    the same type; `phases` and `seconds` are of the same lap or window; `units` (tokens, sequences) were done in `seconds` at
    `units_per_second`.
    """
    shares = {"MFU": mfu, "HFU": hfu, "MBU": mbu}
    found = [text for name, share in shares.items() if share is not None for text in _share(name, share)]
    if mfu is not None and hfu is not None and hfu < mfu * (1 - 1e-9):
        found.append(f"HFU below MFU: {hfu:.1%} < {mfu:.1%}; padding and recomputation only add to it")
    if flops_per_second is not None and matrix_rate is not None:
        found += _rate(flops_per_second, matrix_rate)
    if memory_bytes is not None and card_bytes is not None and memory_bytes > card_bytes:
        found.append(f"memory above the card: {memory_bytes / GIB:.1f} GiB, the card has {card_bytes / GIB:.1f} GiB")
    if phases is not None and seconds is not None:
        found += _phases(phases, seconds)
    if units is not None and units_per_second is not None and seconds is not None:
        found += _product(units, units_per_second, seconds)
    return found


def _share(name: str, share: float) -> list[str]:
    if not math.isfinite(share) or share < 0:
        return [f"{name} is {share}; a share of the peak is a number from 0 to 1"]
    return [f"{name} above 100 %: {share:.1%} of the device's peak"] if share > 1 else []


def _rate(flops_per_second: float, matrix_rate: float) -> list[str]:
    if flops_per_second <= RATE_SLACK * matrix_rate:
        return []
    return [f"faster than the matrix products of the same node: {flops_per_second / 1e12:.2f} TFLOP/s, measured {matrix_rate / 1e12:.2f}"]


def _phases(phases: Mapping[str, float], seconds: float) -> list[str]:
    negative = [f"phase {name} took {value:g} s" for name, value in phases.items() if value < 0 and name != "other"]
    whole = sum(phases.values())
    if whole > PHASE_SLACK * seconds:
        return [*negative, f"phases above the whole: they sum to {whole:.3f} s of {seconds:.3f} s"]
    return negative


def _product(units: float, units_per_second: float, seconds: float) -> list[str]:
    if seconds <= 0:
        return [f"{units:g} units in {seconds:g} s"]
    implied = units_per_second * seconds
    if abs(implied - units) <= RATE_TOLERANCE * max(units, 1.0):
        return []
    return [f"rate and count do not match: {units_per_second:g} units/s x {seconds:g} s = {implied:g}, counted {units:g}"]
