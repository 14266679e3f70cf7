"""Telemetry and device descriptions over a stand-in for the driver's library, the only thing that is replaced."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.measure import nvml
from bench.measure.nvml import IDLE_BYTES, Device, all_devices, describe_devices
from bench.measure.telemetry import Telemetry

GIB = 1 << 30


class NvmlError(Exception):
    pass


class FakeNvml:
    """One device with 80 GiB; `used`, `pids`, `throttle` and `energy` may change; what is in `broken` raises."""

    NVMLError = NvmlError
    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 1, 2
    nvmlClocksThrottleReasonHwThermalSlowdown = 0x40
    nvmlClocksThrottleReasonSwPowerCap = 0x4

    def __init__(self) -> None:
        self.used, self.pids, self.throttle, self.energy = GIB, [], 0, 5000
        self.broken: set[str] = set()

    def __getattribute__(self, name):
        if name.startswith("nvmlDevice") and name in object.__getattribute__(self, "broken"):
            raise_it = NvmlError("not supported")

            def fail(*_):
                raise raise_it

            return fail
        return object.__getattribute__(self, name)

    def nvmlDeviceGetCount(self):
        return 1

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetUUID(self, handle):
        return "GPU-x"

    def nvmlDeviceGetName(self, handle):
        return b"NVIDIA Test 80GB"

    def nvmlSystemGetDriverVersion(self):
        return "580.1"

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=self.used, total=80 * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=pid) for pid in self.pids]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self.energy

    def nvmlDeviceGetPowerUsage(self, handle):
        return 300_000

    def nvmlDeviceGetTemperature(self, handle, kind):
        return 55

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return 1980

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self.throttle

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return 700_000

    def nvmlDeviceGetMaxClockInfo(self, handle, kind):
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetEccMode(self, handle):
        return [1, 1]

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle):
        return 5

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle):
        return 16

    def nvmlDeviceGetNvLinkState(self, handle, link):
        return int(link < 4)


@pytest.fixture
def driver(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setattr(nvml, "load_nvml", lambda: (fake, None))
    monkeypatch.setattr("bench.measure.telemetry.FAST_SECONDS", 0.005)
    monkeypatch.setattr("bench.measure.telemetry.SLOW_SECONDS", 0.01)
    return fake


class Ranks:
    """The trial's processes, whose sizes the tests set; `seen` is set after each reading."""

    def __init__(self, sizes):
        self.sizes = sizes

    def telemetry(self, devices=()):
        return Telemetry(
            lambda: list(self.sizes), resident=self.sizes.__getitem__, proportional=lambda pid: self.sizes[pid] // 2, devices=devices
        )


def read(telemetry, times=3):
    """Wait until so many more readings were made."""
    wanted = telemetry.observed()["telemetry_samples"] + times
    for _ in range(2000):
        if telemetry.observed()["telemetry_samples"] >= wanted:
            return
        threading.Event().wait(0.002)
    raise AssertionError("the thread does not read")


def test_device_memory_is_the_peak_over_the_idle_baseline(driver):
    with Ranks({}).telemetry(all_devices()) as telemetry:
        driver.used = 9 * GIB
        read(telemetry)
        driver.used = 3 * GIB
        read(telemetry)
    observed = telemetry.observed()
    assert observed["device_memory_peak_bytes"] == {"GPU-x": 8 * GIB}
    assert observed["device_memory_baseline_bytes"] == {"GPU-x": GIB}
    assert observed["device_memory_note"] is None


def test_host_memory_is_the_largest_sum_over_the_processes_of_the_ranks():
    ranks = Ranks({1: 100, 2: 50})
    with ranks.telemetry() as telemetry:
        read(telemetry)
        ranks.sizes[1] = 10
        read(telemetry)
    observed = telemetry.observed()
    assert (observed["host_peak_bytes"], observed["host_peak_proportional_bytes"]) == (150, 75)


@pytest.mark.parametrize(("what", "slow_seconds"), [("walk", 0.002), ("search", 60.0)])
def test_a_reading_that_is_dear_is_taken_seldom(monkeypatch, what, slow_seconds):
    monkeypatch.setattr("bench.measure.telemetry.FAST_SECONDS", 0.001)
    monkeypatch.setattr("bench.measure.telemetry.SLOW_SECONDS", slow_seconds)
    calls = {"walk": 0, "search": 0}

    def reading(name, result):
        calls[name] += 1
        if name == what:
            threading.Event().wait(0.05)
        return result

    with Telemetry(lambda: reading("search", [1]), resident=lambda _: 1, proportional=lambda _: reading("walk", 1)) as telemetry:
        read(telemetry, 40)
    assert calls[what] <= 2 < telemetry.observed()["telemetry_samples"] / 10


def test_without_a_device_its_memory_is_null_with_a_reason():
    with Ranks({1: 1}).telemetry() as telemetry:
        read(telemetry, 1)
    observed = telemetry.observed()
    assert observed["device_memory_peak_bytes"] is None
    assert observed["device_memory_note"] == "the trial ran on the CPU"


def test_a_stranger_on_the_device_is_told_once_ours_were_seen_there_too(driver):
    driver.pids = [11, 99]
    with Ranks({11: 1}).telemetry(all_devices()) as telemetry:
        read(telemetry, 20)
    assert telemetry.strangers() == [99]


def test_process_numbers_of_another_namespace_are_no_strangers(driver):
    driver.pids = [4011, 4012]
    with Ranks({11: 1}).telemetry(all_devices()) as telemetry:
        read(telemetry, 20)
    assert telemetry.strangers() == []


def test_power_clocks_energy_and_throttling_are_kept_as_extremes(driver):
    driver.throttle = 0x44
    with Ranks({}).telemetry(all_devices()) as telemetry:
        read(telemetry)
        driver.energy = 8500
    assert telemetry.observed()["devices"]["GPU-x"] == {
        "power_watts_mean": 300.0, "power_watts_peak": 300.0, "sm_clock_megahertz_lowest": 1980, "sm_clock_megahertz_highest": 1980,
        "temperature_celsius_peak": 55, "throttles": ["hardware-thermal", "power-cap"], "energy_joules": 3.5,
    }  # fmt: skip
    assert telemetry.throttles() == ["hardware-thermal"], "the power cap is normal"


def test_a_value_that_the_driver_does_not_give_is_null_and_the_others_stay(driver):
    driver.broken = {"nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"}
    with Ranks({}).telemetry(all_devices()) as telemetry:
        read(telemetry)
    found = telemetry.observed()["devices"]["GPU-x"]
    assert (found["energy_joules"], found["power_watts_peak"], found["temperature_celsius_peak"]) == (None, None, 55)


def test_a_device_is_described_by_what_stays_the_same(driver):
    assert describe_devices() == [
        {
            "uuid": "GPU-x", "name": "NVIDIA Test 80GB", "memory_bytes": 80 * GIB, "driver": "580.1", "power_limit_watts": 700.0,
            "highest_sm_clock_megahertz": 1980, "highest_memory_clock_megahertz": 2619, "ecc": True, "pcie_generation": 5, "pcie_width": 16,
            "nvlinks": 4,
        }
    ]  # fmt: skip


def test_a_device_is_busy_with_processes_or_with_memory_that_nobody_here_owns(driver):
    (device,) = all_devices()
    assert device.busy() is None
    driver.pids = [17, 18]
    assert device.busy() == "device GPU-x is in use by process 17, 18"
    driver.pids, driver.used = [], IDLE_BYTES + 1
    assert "cannot be seen from here" in device.busy()


def test_without_a_driver_there_are_no_devices_and_a_reason():
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has NVIDIA devices")
    nvml.load_nvml.cache_clear()
    module, reason = nvml.load_nvml()
    assert module is None
    assert reason.startswith("NVML: ")
    assert describe_devices() == []


def test_a_device_answers_by_its_own_handle(driver):
    assert Device(driver, 0).uuid == "GPU-x"
