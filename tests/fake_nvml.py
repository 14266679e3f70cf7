"""A stand-in for the NVIDIA driver's library (NVML), the only thing that tests of telemetry replace."""

from __future__ import annotations

from types import SimpleNamespace

GIB = 1 << 30


class NvmlError(Exception):
    """What the binding raises."""


class FakeNvml:
    """One card with 80 GiB; `used`, `pids`, `throttle` and `energy` may change; what is in `broken` raises, with its text.

    `driver` and `capability` are the driver's version and the card's compute capability. `mig` splits the card into as many instances;
    `virtual` makes it a share that a hypervisor gives. Handles are the card's index, or ("mig", place).
    """

    NVMLError = NvmlError
    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 1, 2
    NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX = 138, 139
    nvmlClocksThrottleReasonHwThermalSlowdown = 0x40
    nvmlClocksThrottleReasonSwPowerCap = 0x4

    def __init__(self) -> None:
        self.used, self.pids, self.throttle, self.energy = GIB, [], 0, 5000
        self.mig, self.virtual, self.cards = 0, False, 1
        self.driver, self.capability = "580.1", (9, 0)
        self.broken: dict[str, str] = {}

    def __getattribute__(self, name):
        ask = object.__getattribute__(self, name)
        if not name.startswith("nvmlDevice"):
            return ask

        def answer(handle, *arguments):
            if name in self.broken:
                raise NvmlError(self.broken[name])
            if isinstance(handle, tuple) and name in _NOT_OF_AN_INSTANCE:
                raise NvmlError("Not Supported")
            return ask(handle, *arguments)

        return ask if name == "nvmlDeviceGetCount" else answer

    def nvmlDeviceGetCount(self):
        return self.cards

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetMigMode(self, handle):
        return [int(self.mig > 0), int(self.mig > 0)]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle):
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle, place):
        if place >= self.mig:
            raise NvmlError("Not Found")
        return ("mig", place)

    def nvmlDeviceGetVirtualizationMode(self, handle):
        return 2 if self.virtual else 0

    def nvmlDeviceGetUUID(self, handle):
        return f"MIG-{handle[1]}" if isinstance(handle, tuple) else "GPU-x" if handle == 0 else f"GPU-{handle}"

    def nvmlDeviceGetName(self, handle):
        return b"NVIDIA Test 80GB"

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return list(self.capability)

    def nvmlDeviceGetBoardPartNumber(self, handle):
        return "900-21010-0000-000"

    def nvmlDeviceGetVbiosVersion(self, handle):
        return "96.00.1"

    def nvmlSystemGetDriverVersion(self):
        return self.driver

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=self.used, total=(10 if isinstance(handle, tuple) else 80) * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=pid) for pid in self.pids]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self.energy

    def nvmlDeviceGetPowerUsage(self, handle):
        return 300_000

    def nvmlDeviceGetPowerManagementDefaultLimit(self, handle):
        return 700_000

    def nvmlDeviceGetTemperature(self, handle, kind):
        return 55

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=97, memory=40)

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetApplicationsClock(self, handle, kind):
        return 1980

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self.throttle

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return 650_000

    def nvmlDeviceGetMaxClockInfo(self, handle, kind):
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetEccMode(self, handle):
        return [1, 1]

    def nvmlDeviceGetPciInfo(self, handle):
        return SimpleNamespace(busId=f"0000:0{handle}:00.0".encode())

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle):
        return 5

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle):
        return 16

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle):
        return 4

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle):
        return 16

    def nvmlDeviceGetNvLinkState(self, handle, link):
        return int(link < 4)

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle, link):
        if link >= 4:
            raise NvmlError("Not Supported")
        return SimpleNamespace(busId=b"0000:01:00.0" if handle == 0 else b"0000:00:00.0")

    def nvmlDeviceGetTopologyCommonAncestor(self, handle, other):
        return 20

    def nvmlDeviceGetFieldValues(self, handle, wanted):
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(ullVal=field)) for field, _ in wanted]


_NOT_OF_AN_INSTANCE = {
    "nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetClockInfo",
    "nvmlDeviceGetTemperature", "nvmlDeviceGetCurrentClocksThrottleReasons", "nvmlDeviceGetEnforcedPowerLimit",
    "nvmlDeviceGetCurrPcieLinkGeneration", "nvmlDeviceGetNvLinkState", "nvmlDeviceGetFieldValues", "nvmlDeviceGetBoardPartNumber",
}  # fmt: skip
"""What the driver refuses for a MIG instance (NVML API reference, Multi Instance GPU Management)."""
