"""NVIDIA devices as their driver sees them (NVML). Torch-free; everything is null with a reason where there is no driver."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

IDLE_BYTES = 2 << 30
"""A device with more memory in use is taken to be busy, even if its processes cannot be seen (another container's)."""

_THROTTLES = {
    "nvmlClocksThrottleReasonHwSlowdown": "hardware-slowdown",
    "nvmlClocksThrottleReasonHwThermalSlowdown": "hardware-thermal",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": "power-brake",
    "nvmlClocksThrottleReasonSwThermalSlowdown": "software-thermal",
    "nvmlClocksThrottleReasonSwPowerCap": "power-cap",
}


@cache
def load_nvml() -> tuple[ModuleType | None, str | None]:
    """The initialised NVML binding, or None and why there is none."""
    try:
        import pynvml
    except ImportError:
        return None, "the NVML binding (nvidia-ml-py) is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, f"NVML: {error}"
    return pynvml, None


class Device:
    """One device. Values that its driver does not give are None."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self.uuid: str = _text(nvml.nvmlDeviceGetUUID(handle))

    def used_bytes(self) -> int | None:
        """Memory in use by anyone, the driver's own included."""
        info = self._ask(self._nvml.nvmlDeviceGetMemoryInfo)
        return None if info is None else int(info.used)

    def processes(self) -> list[int]:
        """Processes that compute on it, as far as they can be seen from here."""
        return [int(process.pid) for process in self._ask(self._nvml.nvmlDeviceGetComputeRunningProcesses) or []]

    def energy_joules(self) -> float | None:
        """The device's own counter since the driver was loaded."""
        value = self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption)
        return None if value is None else value / 1000

    def power_watts(self) -> float | None:
        """Power drawn now."""
        value = self._ask(self._nvml.nvmlDeviceGetPowerUsage)
        return None if value is None else value / 1000

    def temperature_celsius(self) -> int | None:
        """Temperature of the chip."""
        return self._ask(self._nvml.nvmlDeviceGetTemperature, self._nvml.NVML_TEMPERATURE_GPU)

    def clock_megahertz(self) -> int | None:
        """Clock of the multiprocessors."""
        return self._ask(self._nvml.nvmlDeviceGetClockInfo, self._nvml.NVML_CLOCK_SM)

    def throttles(self) -> list[str]:
        """Why the clock is held down now."""
        reasons = self._ask(self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons) or 0
        return [name for constant, name in _THROTTLES.items() if reasons & getattr(self._nvml, constant, 0)]

    def busy(self) -> str | None:
        """Why it is not idle, or None."""
        if processes := self.processes():
            return f"device {self.uuid} is in use by process {', '.join(map(str, processes))}"
        used = self.used_bytes() or 0
        return f"device {self.uuid} has {used} bytes in use by processes that cannot be seen from here" if used > IDLE_BYTES else None

    def describe(self) -> dict[str, Any]:
        """What stays the same over a trial: name, memory, driver, power limit, highest clocks, ECC, links."""
        nvml, ask = self._nvml, self._ask
        total, limit = ask(nvml.nvmlDeviceGetMemoryInfo), ask(nvml.nvmlDeviceGetEnforcedPowerLimit)
        ecc = ask(nvml.nvmlDeviceGetEccMode)
        return {
            "uuid": self.uuid,
            "name": _text(ask(nvml.nvmlDeviceGetName)),
            "memory_bytes": None if total is None else int(total.total),
            "driver": _text(nvml.nvmlSystemGetDriverVersion()),
            "power_limit_watts": None if limit is None else limit / 1000,
            "highest_sm_clock_megahertz": ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
            "highest_memory_clock_megahertz": ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_MEM),
            "ecc": None if ecc is None else bool(ecc[0]),
            "pcie_generation": ask(nvml.nvmlDeviceGetMaxPcieLinkGeneration),
            "pcie_width": ask(nvml.nvmlDeviceGetMaxPcieLinkWidth),
            "nvlinks": self._nvlinks(),
        }

    def _nvlinks(self) -> int:
        return sum(bool(self._ask(self._nvml.nvmlDeviceGetNvLinkState, link)) for link in range(18))

    def _ask(self, query: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return query(self._handle, *arguments)
        except self._nvml.NVMLError:
            return None


def all_devices() -> list[Device]:
    """Every device of this node; none without NVML."""
    nvml, _ = load_nvml()
    if nvml is None:
        return []
    return [Device(nvml, nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(nvml.nvmlDeviceGetCount())]


def describe_devices() -> list[dict[str, Any]]:
    """`Device.describe` of every device of this node."""
    return [device.describe() for device in all_devices()]


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
