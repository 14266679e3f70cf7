"""NVIDIA devices as their driver sees them (NVML). Torch-free; what cannot be read is null, with the reason in `Device.reasons`."""

from __future__ import annotations

import os
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

_ALL_LINKS = 0xFFFFFFFF
"""Scope of an NVLink counter that adds up all links (nvml.h, nvmlFieldValue_t.scopeId)."""

MOST_NVLINKS = 18


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
    """One device, or one MIG instance of `card`. Values that its driver does not give are None; `reasons` says why, by name."""

    def __init__(self, nvml: Any, handle: Any, card: Any = None) -> None:
        self._nvml, self._handle = nvml, handle
        self._card = handle if card is None else card
        self.is_mig = card is not None
        self.reasons: dict[str, str] = {}
        self.uuid: str = _text(nvml.nvmlDeviceGetUUID(handle))

    # -- now ---------------------------------------------------------------------------------------------------------

    def used_bytes(self) -> int | None:
        """Memory in use by anyone, the driver's own included."""
        info = self._ask("memory_used_bytes", "nvmlDeviceGetMemoryInfo")
        return None if info is None else int(info.used)

    def processes(self) -> list[int]:
        """Processes that compute on it, as far as they can be seen from here."""
        return [int(process.pid) for process in self._ask("processes", "nvmlDeviceGetComputeRunningProcesses") or []]

    def energy_joules(self) -> float | None:
        """The device's own counter since the driver was loaded; that of a whole card says nothing of one MIG instance."""
        if self._whole_card_only("energy_joules"):
            return None
        value = self._ask("energy_joules", "nvmlDeviceGetTotalEnergyConsumption")
        return None if value is None else value / 1000

    def power_watts(self) -> float | None:
        """Power drawn now."""
        if self._whole_card_only("power_watts"):
            return None
        value = self._ask("power_watts", "nvmlDeviceGetPowerUsage")
        return None if value is None else value / 1000

    def throttles(self) -> list[str] | None:
        """Why the clock is held down now."""
        reasons = self._ask("throttles", "nvmlDeviceGetCurrentClocksThrottleReasons", of_card=True)
        if reasons is None:
            return None
        return [name for constant, name in _THROTTLES.items() if reasons & getattr(self._nvml, constant, 0)]

    def sample(self) -> dict[str, Any]:
        """All that changes over a trial: a row of the telemetry file. Clocks, temperature and links of a MIG instance are its card's."""
        nvml = self._nvml
        use = self._ask("utilization_percent", "nvmlDeviceGetUtilizationRates")
        throttles = self.throttles()
        sent, received = self._nvlink_bytes()
        return {
            "memory_used_bytes": self.used_bytes(),
            "power_watts": self.power_watts(),
            "energy_joules": self.energy_joules(),
            "sm_clock_megahertz": self._ask("sm_clock_megahertz", "nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM, of_card=True),
            "memory_clock_megahertz": self._ask("memory_clock_megahertz", "nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM, of_card=True),
            "temperature_celsius": self._ask("temperature_celsius", "nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU, of_card=True),
            "utilization_percent": None if use is None else int(use.gpu),
            "memory_utilization_percent": None if use is None else int(use.memory),
            "throttles": None if throttles is None else "+".join(throttles),
            "pcie_generation": self._ask("pcie_generation", "nvmlDeviceGetCurrPcieLinkGeneration", of_card=True),
            "pcie_width": self._ask("pcie_width", "nvmlDeviceGetCurrPcieLinkWidth", of_card=True),
            "nvlink_sent_bytes": sent,
            "nvlink_received_bytes": received,
        }

    def busy(self) -> str | None:
        """Why it is not idle, or None."""
        if processes := self.processes():
            return f"device {self.uuid} is in use by process {', '.join(map(str, processes))}"
        used = self.used_bytes() or 0
        return f"device {self.uuid} has {used} bytes in use by processes that cannot be seen from here" if used > IDLE_BYTES else None

    # -- what stays the same -----------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What stays the same over a trial: name, SKU, memory, capability, driver, power limit, clocks, ECC, links; null with a reason."""
        nvml, ask = self._nvml, self._ask
        total, limit = ask("memory_bytes", "nvmlDeviceGetMemoryInfo"), self._power("nvmlDeviceGetEnforcedPowerLimit")
        ecc, pci = ask("ecc", "nvmlDeviceGetEccMode", of_card=True), ask("pci_bus", "nvmlDeviceGetPciInfo", of_card=True)
        return {
            "uuid": self.uuid,
            "name": _text(ask("name", "nvmlDeviceGetName")),
            "part_number": _text(ask("part_number", "nvmlDeviceGetBoardPartNumber", of_card=True)),
            "vbios": _text(ask("vbios", "nvmlDeviceGetVbiosVersion", of_card=True)),
            "memory_bytes": None if total is None else int(total.total),
            "compute_capability": self._capability(),
            "driver": _text(nvml.nvmlSystemGetDriverVersion()),
            "power_limit_watts": limit,
            "power_default_limit_watts": self._power("nvmlDeviceGetPowerManagementDefaultLimit"),
            "highest_sm_clock_megahertz": ask("highest_clocks", "nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM, of_card=True),
            "highest_memory_clock_megahertz": ask("highest_clocks", "nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_MEM, of_card=True),
            "application_sm_clock_megahertz": ask("application_clock", "nvmlDeviceGetApplicationsClock", nvml.NVML_CLOCK_SM, of_card=True),
            "ecc": None if ecc is None else bool(ecc[0]),
            "pci_bus": None if pci is None else _text(pci.busId),
            "pcie_generation": ask("pcie", "nvmlDeviceGetMaxPcieLinkGeneration", of_card=True),
            "pcie_width": ask("pcie", "nvmlDeviceGetMaxPcieLinkWidth", of_card=True),
            "nvlinks": self._nvlinks(),
            "mig_instance": self.is_mig,
            "virtual": self.is_virtual(),
        }

    def _capability(self) -> str | None:
        found = self._ask("compute_capability", "nvmlDeviceGetCudaComputeCapability", of_card=True)
        return None if found is None else ".".join(map(str, found))

    def is_virtual(self) -> bool | None:
        """Whether it is a virtual GPU, a share of a card that a hypervisor hands out (pass-through of a whole card is none)."""
        mode = self._ask("virtual", "nvmlDeviceGetVirtualizationMode", of_card=True)
        return None if mode is None else mode == getattr(self._nvml, "NVML_GPU_VIRTUALIZATION_MODE_VGPU", 2)

    def common_ancestor(self, other: Device) -> str | None:
        """What the PCIe paths of two devices have in common, nearest first: board, switch, switches, host-bridge, numa-node, system."""
        names = {0: "board", 10: "switch", 20: "switches", 30: "host-bridge", 40: "numa-node", 50: "system"}
        try:
            return names.get(self._nvml.nvmlDeviceGetTopologyCommonAncestor(self._card, other._card))
        except (self._nvml.NVMLError, AttributeError):
            return None

    def nvlinks_to(self, other_bus: str | None) -> int:
        """NVLinks that lead straight to the device at `other_bus` (links through a switch lead to the switch)."""
        ends = (self._quietly("nvmlDeviceGetNvLinkRemotePciInfo", link) for link in range(MOST_NVLINKS))
        return sum(end is not None and _text(end.busId) == other_bus for end in ends)

    def _power(self, query: str) -> float | None:
        value = self._ask(query.removeprefix("nvmlDeviceGet"), query, of_card=True)
        return None if value is None else value / 1000

    def _nvlinks(self) -> int:
        return sum(bool(self._quietly("nvmlDeviceGetNvLinkState", link)) for link in range(MOST_NVLINKS))

    # -- asking ------------------------------------------------------------------------------------------------------

    def _whole_card_only(self, name: str) -> bool:
        if self.is_mig:
            self.reasons[name] = "a MIG instance has none of its own; the card's covers all its instances"
        return self.is_mig

    def _nvlink_bytes(self) -> tuple[int | None, int | None]:
        """Bytes sent and received over all NVLinks since the driver was loaded (the driver counts KiB)."""
        names = ("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX", "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX")
        wanted = [(field, _ALL_LINKS) for name in names if (field := getattr(self._nvml, name, None)) is not None]
        values = self._ask("nvlink_bytes", "nvmlDeviceGetFieldValues", wanted, of_card=True) if len(wanted) == 2 else None
        if values is None:
            return None, None
        if any(value.nvmlReturn for value in values):
            self.reasons["nvlink_bytes"] = f"NVML: error {values[0].nvmlReturn}"
            return None, None
        return values[0].value.ullVal << 10, values[1].value.ullVal << 10

    def _ask(self, name: str, query: str, *arguments: Any, of_card: bool = False) -> Any:
        """Answer to an NVML query, or None with the reason noted under `name`."""
        try:
            return getattr(self._nvml, query)(self._card if of_card else self._handle, *arguments)
        except self._nvml.NVMLError as error:
            self.reasons[name] = f"NVML: {error}{' (MIG instance)' if self.is_mig else ''}"
        except AttributeError:
            self.reasons[name] = f"the NVML binding has no {query}"
        return None

    def _quietly(self, query: str, *arguments: Any) -> Any:
        """As `_ask`, where an error is an answer too: such a link is not there."""
        try:
            return getattr(self._nvml, query)(self._card, *arguments)
        except (self._nvml.NVMLError, AttributeError):
            return None


def all_devices() -> list[Device]:
    """Every device of this node, the instances of a card that is split (MIG) in its place; none without NVML."""
    nvml, _ = load_nvml()
    if nvml is None:
        return []
    cards = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    return [device for card in cards for device in _instances(nvml, card) or [Device(nvml, card)]]


def visible(devices: list[Device]) -> list[Device]:
    """Those of `devices` that CUDA_VISIBLE_DEVICES names (by index or UUID), in its order; all of them if it is not set."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return devices
    found = []
    for name in filter(None, (word.strip() for word in chosen.split(","))):
        by_index = devices[int(name) : int(name) + 1] if name.isdigit() else []
        found += by_index or [device for device in devices if device.uuid.startswith(name)][:1]
    return found


def _instances(nvml: Any, card: Any) -> list[Device]:
    """The MIG instances of `card`; none where it is whole."""
    try:
        if not nvml.nvmlDeviceGetMigMode(card)[0]:
            return []
        places = range(nvml.nvmlDeviceGetMaxMigDeviceCount(card))
    except (nvml.NVMLError, AttributeError):
        return []
    found = []
    for place in places:
        try:
            found.append(Device(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, place), card))
        except nvml.NVMLError:
            continue  # no instance in this place
    return found


def describe_devices() -> list[dict[str, Any]]:
    """`Device.describe` of every device of this node, with what could not be read and why."""
    return [{**device.describe(), "unknown": dict(device.reasons)} for device in all_devices()]


def describe_links() -> list[dict[str, Any]]:
    """How each pair of this node's devices is connected: what their PCIe paths share, and direct NVLinks."""
    devices = all_devices()
    buses = [device.describe()["pci_bus"] for device in devices]
    return [
        {"devices": [one.uuid, other.uuid], "pcie": one.common_ancestor(other), "nvlinks": one.nvlinks_to(buses[second])}
        for first, one in enumerate(devices)
        for second, other in enumerate(devices)
        if first < second
    ]


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
