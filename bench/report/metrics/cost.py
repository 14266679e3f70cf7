"""Cost: energy and money for a unit of work."""

from __future__ import annotations

from bench.report.registry import NoValue, Trial, metric


@metric(title="energy", unit="J", direction="lower", source="NVML total energy counter, one reader per node", clocked=True)
def energy_joules(trial: Trial) -> float:
    """Energy that the devices used over the whole trial, start and evaluation included."""
    devices = trial.record.observed.get("devices")
    found = [device.get("energy_joules") for device in devices.values() if isinstance(device, dict)] if isinstance(devices, dict) else []
    values = [float(value) for value in found if isinstance(value, (int, float))]
    if not values or len(values) < len(found):
        raise NoValue("no device counts its energy" if not values else "not every device counts its energy")
    return sum(values)
