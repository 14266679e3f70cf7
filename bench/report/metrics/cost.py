"""Cost: energy and money for a unit of work."""

from __future__ import annotations

from bench.report.metrics.speed import WINDOW
from bench.report.registry import NoValue, Trial, metric
from bench.report.windows import counting_parts

LOSS_STAGES = ("sft", "rm")
WHOLE = "energy of the whole trial over all its laps, warm-up included"
PRICE = "device-hours x `report --price`"


@metric(title="energy", unit="J", direction="lower", source="NVML total energy counter, one reader per node", clocked=True)
def energy_joules(trial: Trial) -> float:
    """Energy that the devices used over the whole trial, start and evaluation included."""
    devices = trial.record.observed.get("devices")
    found = [device.get("energy_joules") for device in devices.values() if isinstance(device, dict)] if isinstance(devices, dict) else []
    values = [float(value) for value in found if isinstance(value, (int, float))]
    if not values or len(values) < len(found):
        raise NoValue("no device counts its energy" if not values else "not every device counts its energy")
    return sum(values)


def _counted(trial: Trial, unit: str) -> int:
    """Units of all laps of the trial and its data-parallel ranks; NoValue if there are none."""
    found = sum(lap.counts.get(unit, 0) for part in counting_parts(trial.record.parts) for lap in part.laps)
    if not found:
        raise NoValue(f"the trial counted no {unit}")
    return found


@metric(title="energy per 1,000 loss tokens", unit="J", direction="lower", source=WHOLE, stages=LOSS_STAGES, clocked=True)
def energy_per_1000_loss_tokens(trial: Trial) -> float:
    """Energy over thousands of loss tokens. The counter runs from start to end, so loading and evaluation are in it, and short trials look
    dearer than long ones.
    """
    return energy_joules(trial) / _counted(trial, "loss_tokens") * 1000


@metric(title="energy per iteration", unit="J", direction="lower", source=WHOLE, stages=("ppo",), clocked=True)
def energy_per_iteration(trial: Trial) -> float:
    """Energy over iterations. The counter runs from start to end, so loading and evaluation are in it, and short trials look dearer than
    long ones.
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
