"""The device of a trial: its peaks from the data sheets, the rate that was measured on it, and its memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from bench.measure.devices import DeviceRow, Unknown, device_row
from bench.measure.flops import PRODUCT_DTYPE
from bench.measure.shape import Shape, shape_of, shape_of_config
from bench.models.presets import PRESETS
from bench.report.registry import NoValue, Trial, once


@lru_cache(maxsize=256)
def preset_shape(model: str) -> Shape | None:
    """The shape of a preset; None for any other model, whose files a report does not read."""
    return shape_of(model) if model in PRESETS else None


@once
def shape_in(trial: Trial) -> Shape:
    """The shape of the trial's model: as the record tells it, else that of a preset; NoValue where its sizes are not known."""
    told = trial.lead.facts.get("model_config")
    shape = (shape_of_config(told) if isinstance(told, dict) else None) or preset_shape(trial.cell.model)
    if shape is None:
        raise NoValue(f"the sizes of {trial.cell.model} are not known: the record does not tell them, and it is no preset")
    return shape


def precision_in(trial: Trial) -> str:
    """The precision in force: what the ranks say, else what the cell asks for."""
    return str(trial.lead.facts.get("precision") or trial.cell.settings.precision)


def product_dtype(trial: Trial) -> str:
    """What the matrix products of the trial multiply."""
    return PRODUCT_DTYPE[precision_in(trial)]


def name_in(trial: Trial) -> str:
    """Name of the device that every rank ran on; NoValue if there are several."""
    names = {str(name) for part in trial.record.parts if (name := part.facts.get("device_name"))}
    if trial.cell.settings.device == "cpu":
        return "cpu"
    if len(names) != 1:
        raise NoValue("the record names no device" if not names else f"ranks ran on different devices: {', '.join(sorted(names))}")
    return names.pop()


@once
def measured_on(trial: Trial) -> DeviceRow:
    """The row of the trial's device; NoValue where the clock does not count, or the device has no data sheet here."""
    if trial.clock_problem:
        raise NoValue(trial.clock_problem)
    limits = [found["power_limit_watts"] for found in _devices(trial) if found.get("power_limit_watts")]
    row = device_row(name_in(trial), min(limits, default=None))
    if isinstance(row, Unknown):
        raise NoValue(row.reason)
    return row


def peak_of(trial: Trial) -> float:
    """Dense peak FLOP/s of one device in the type that the trial multiplies; NoValue where there is none."""
    peak = measured_on(trial).peak(product_dtype(trial))
    if isinstance(peak, Unknown):
        raise NoValue(peak.reason)
    return peak


def attained_rate(trial: Trial) -> float:
    """FLOP/s of matrix products that `doctor --bench` measured: on the trial's node, else on such a device; NoValue otherwise."""
    dtype, name = product_dtype(trial), name_in(trial)
    if name == "cpu":
        raise NoValue("what a CPU attains depends on the threads of each rank")
    rates = [rate for found in _ceilings(trial, name) if (rate := (found.get("matrix_flops_per_second") or {}).get(dtype))]
    rate = min(rates) if rates else trial.given.ceilings.get(name, {}).get(dtype)
    if not rate:
        raise NoValue(f"no matrix-product rate of {name} in {dtype} was measured (`coati-bench doctor --bench`, `report --ceilings`)")
    return float(rate)


def card_bytes(trial: Trial) -> int | None:
    """Memory of one device: the most that any source states, or None."""
    facts = [part.facts.get("device_total_bytes") for part in trial.record.parts]
    known = [value for value in (*facts, *(found.get("memory_bytes") for found in _devices(trial))) if isinstance(value, int)]
    return max(known, default=None)


def host_bytes(trial: Trial) -> int | None:
    """Memory of the largest node, or None."""
    return max((value for machine in _machines(trial) if isinstance(value := machine.get("memory_bytes"), int)), default=None)


def _machines(trial: Trial) -> list[dict[str, Any]]:
    machines = trial.record.provenance.get("machines") or []
    return [machine for machine in machines if isinstance(machine, dict)]


def _devices(trial: Trial) -> Iterator[dict[str, Any]]:
    """The devices of every node, as its driver describes them."""
    for machine in _machines(trial):
        yield from (device for device in machine.get("devices") or [] if isinstance(device, dict))


def _ceilings(trial: Trial, name: str) -> Iterator[dict[str, Any]]:
    for machine in _machines(trial):
        found = machine.get("ceilings")
        if isinstance(found, dict) and found.get("device", name) == name:
            yield found
