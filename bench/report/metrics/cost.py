"""Cost: energy and money for a unit of work."""

from __future__ import annotations

from typing import Any

from bench.report.metrics.speed import WINDOW
from bench.report.registry import NoValue, Trial, metric
from bench.report.windows import counting_parts

LOSS_STAGES = ("sft", "rm")
LAPS = "NVML total energy counter, interpolated at the edges of the laps"
WHOLE = "NVML total energy counter over the whole trial, over the work of all its laps"
PRICE = "device-hours x `report --price`"


def devices_of(trial: Trial) -> list[dict[str, Any]]:
    """What was observed of each of the job's devices; NoValue where that is not one for each rank."""
    observed, ranks = trial.record.observed, trial.cell.world_size
    devices = observed.get("devices") or {}
    if unseen := observed.get("nodes_without_telemetry"):
        raise NoValue(f"no telemetry of node {', '.join(map(str, unseen))}")
    if devices and len(devices) != ranks:
        raise NoValue(f"devices that were read: {len(devices)}; the job has {ranks}")
    return list(devices.values())


@metric(title="energy", unit="J", direction="lower", source="NVML total energy counter, one reader per node", clocked=True)
def energy_joules(trial: Trial) -> float:
    """Energy that the devices used over the whole trial, start and evaluation included."""
    found = [device.get("energy_joules") for device in devices_of(trial)]
    values = [float(value) for value in found if isinstance(value, (int, float))]
    if not values or len(values) < len(found):
        raise NoValue("no device counts its energy" if not values else "not every device counts its energy")
    return sum(values)


def window_energy(trial: Trial) -> float:
    """Joules of all devices over the timed window; NoValue where a lap's energy is not known."""
    window, laps = trial.timed(), len(trial.lead.laps)
    found: list[Any] = [device.get("laps_energy_joules") for device in devices_of(trial)]
    if not found or any(not isinstance(energies, list) or len(energies) != laps for energies in found):
        raise NoValue("the energy of the laps was not recorded")
    joules = [energy for energies in found for energy in energies[window.dropped : window.dropped + len(window.steps_by_lap)]]
    if any(energy is None for energy in joules):
        raise NoValue("a device's energy counter was not read on both sides of a lap")
    return float(sum(joules))


@metric(title="energy per 1,000 loss tokens", unit="J", direction="lower", source=LAPS, stages=LOSS_STAGES, clocked=True)
def energy_per_1000_loss_tokens(trial: Trial) -> float:
    """Energy of all devices over the timed window, for a thousand of its loss tokens."""
    return window_energy(trial) / trial.total("loss_tokens") * 1000


@metric(title="energy per iteration", unit="J", direction="lower", source=LAPS, stages=("ppo",), clocked=True)
def energy_per_iteration(trial: Trial) -> float:
    """Energy of all devices over the timed window, for one of its iterations."""
    return window_energy(trial) / trial.timed().steps


@metric(title="trial's energy per 1,000 loss tokens", unit="J", direction="lower", source=WHOLE, stages=LOSS_STAGES, clocked=True)
def trial_energy_per_1000_loss_tokens(trial: Trial) -> float:
    """Energy of the whole trial for a thousand of its loss tokens: start, loading and evaluation are in it, so short trials look dearer
    than long ones.
    """
    parts = counting_parts(trial.record.parts)
    tokens = sum(lap.counts.get("loss_tokens", 0) for part in parts for lap in part.laps)
    if not tokens:
        raise NoValue("the trial counted no loss_tokens")
    return energy_joules(trial) / tokens * 1000


@metric(title="trial's energy per iteration", unit="J", direction="lower", source=WHOLE, stages=("ppo",), clocked=True)
def trial_energy_per_iteration(trial: Trial) -> float:
    """Energy of the whole trial for one of its iterations: start, loading and evaluation are in it, so short trials look dearer than long
    ones.
    """
    iterations = max((sum(lap.steps for lap in part.laps) for part in trial.record.parts), default=0)
    if not iterations:
        raise NoValue("no iteration was finished")
    return energy_joules(trial) / iterations


@metric(title="device-hours per million loss tokens", unit="h", direction="lower", source=WINDOW, stages=LOSS_STAGES, clocked=True)
def device_hours_per_million_loss_tokens(trial: Trial) -> float:
    """Hours of all devices of the job for a million loss tokens at the speed of the timed window."""
    return trial.cell.world_size / trial.rate("loss_tokens") * 1e6 / 3600


@metric(title="device-hours per 1,000 iterations", unit="h", direction="lower", source=WINDOW, stages=("ppo",), clocked=True)
def device_hours_per_1000_iterations(trial: Trial) -> float:
    """Hours of all devices of the job for a thousand iterations at the speed of the timed window."""
    window = trial.timed()
    return trial.cell.world_size * window.elapsed / window.steps * 1000 / 3600


@metric(title="cost per million loss tokens", unit="price", direction="lower", source=PRICE, stages=LOSS_STAGES, clocked=True)
def cost_per_million_loss_tokens(trial: Trial) -> float:
    """Price of those device-hours."""
    return device_hours_per_million_loss_tokens(trial) * price_of(trial)


@metric(title="cost per 1,000 iterations", unit="price", direction="lower", source=PRICE, stages=("ppo",), clocked=True)
def cost_per_1000_iterations(trial: Trial) -> float:
    """Price of those device-hours."""
    return device_hours_per_1000_iterations(trial) * price_of(trial)


def price_of(trial: Trial) -> float:
    """What a device costs for an hour; NoValue where nobody said so."""
    if trial.given.price is None:
        raise NoValue("no price was given (`report --price`)")
    return trial.given.price
