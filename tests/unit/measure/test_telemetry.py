"""Telemetry and device descriptions over a stand-in for the driver's library, the only thing that is replaced."""

from __future__ import annotations

import gzip
import os
import signal
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from bench.layout import telemetry_path
from bench.measure import nvml
from bench.measure.load import HostLoad, cgroup_memory_file
from bench.measure.nvml import IDLE_BYTES, Device, all_devices, describe_devices, describe_links
from bench.measure.telemetry import Telemetry
from bench.measure.timeline import Timeline, load_timeline
from tests.fake_nvml import GIB, FakeNvml


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


def test_signals_are_left_to_the_main_thread():
    with Ranks({1: 1}).telemetry():
        (there,) = (thread for thread in threading.enumerate() if thread.name == "telemetry")
        status = Path(f"/proc/self/task/{there.native_id}/status").read_text(encoding="utf-8")
    blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
    assert all(blocked >> number - 1 & 1 for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1))
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


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
    assert (telemetry.observed()["strangers"], telemetry.observed()["strangers_note"]) == ([99], None)


def test_process_numbers_of_another_namespace_are_no_strangers(driver):
    driver.pids = [4011, 4012]
    with Ranks({11: 1}).telemetry(all_devices()) as telemetry:
        read(telemetry, 20)
    assert telemetry.strangers() == []
    observed = telemetry.observed()
    assert observed["strangers"] is None
    assert observed["strangers_note"].startswith("the ranks' own processes were not seen on the devices")
    driver.broken = {"nvmlDeviceGetComputeRunningProcesses": "Insufficient Permissions"}
    with Ranks({11: 1}).telemetry(all_devices()) as telemetry:
        read(telemetry, 3)
    assert telemetry.observed()["strangers_note"] == "NVML: Insufficient Permissions"


def test_power_clocks_energy_and_throttling_are_kept_as_extremes(driver):
    driver.throttle = 0x44
    with Ranks({}).telemetry(all_devices()) as telemetry:
        read(telemetry)
        driver.energy = 8500
    assert telemetry.observed()["devices"]["GPU-x"] == {
        "power_watts_mean": 300.0, "power_watts_peak": 300.0, "sm_clock_megahertz_lowest": 1980, "sm_clock_megahertz_highest": 1980,
        "temperature_celsius_peak": 55, "utilization_percent_mean": 97.0, "pcie": ["4x16"], "throttles": ["hardware-thermal", "power-cap"],
        "energy_joules": 3.5, "unknown": {},
    }  # fmt: skip
    assert telemetry.throttles() == ["hardware-thermal"], "the power cap is normal"


QUERIES = {
    "energy_joules": "nvmlDeviceGetTotalEnergyConsumption",
    "power_watts": "nvmlDeviceGetPowerUsage",
    "sm_clock_megahertz": "nvmlDeviceGetClockInfo",
    "temperature_celsius": "nvmlDeviceGetTemperature",
    "utilization_percent": "nvmlDeviceGetUtilizationRates",
    "throttles": "nvmlDeviceGetCurrentClocksThrottleReasons",
    "pcie_width": "nvmlDeviceGetCurrPcieLinkWidth",
    "nvlink_sent_bytes": "nvmlDeviceGetFieldValues",
}


@pytest.mark.parametrize("column", QUERIES)
@pytest.mark.parametrize("text", ["Not Supported", "Insufficient Permissions"])
def test_a_value_that_the_driver_does_not_give_is_null_with_its_reason_and_the_others_stay(driver, tmp_path, column, text):
    driver.broken = {QUERIES[column]: text}
    with Ranks({}).telemetry(all_devices()) as telemetry:
        read(telemetry)
    telemetry.timeline.save(tmp_path / "t.json.gz")
    kept = load_timeline(tmp_path / "t.json.gz")
    columns = kept["devices"]["GPU-x"]
    assert set(columns[column]) == {None}
    assert f"NVML: {text}" in kept["unknown"]["GPU-x"].values()
    assert kept["unknown"]["GPU-x"] == telemetry.observed()["devices"]["GPU-x"]["unknown"]
    assert all(None not in columns[name] for name, query in QUERIES.items() if query != QUERIES[column])


def test_memory_that_cannot_be_read_leaves_no_peak_and_a_reason(driver):
    driver.broken = {"nvmlDeviceGetMemoryInfo": "Insufficient Permissions"}
    with Ranks({}).telemetry(all_devices()) as telemetry:
        read(telemetry)
    observed = telemetry.observed()
    assert observed["device_memory_peak_bytes"] == {}
    assert observed["device_memory_baseline_bytes"] == {"GPU-x": None}
    assert observed["devices"]["GPU-x"]["unknown"] == {"memory_used_bytes": "NVML: Insufficient Permissions"}


def test_an_older_binding_without_a_query_gives_null_with_that_reason(driver, monkeypatch):
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetFieldValues")
    (device,) = all_devices()
    assert device.sample()["nvlink_sent_bytes"] is None
    assert device.reasons == {"nvlink_bytes": "the NVML binding has no nvmlDeviceGetFieldValues"}


def test_instances_of_a_split_card_are_devices_and_the_card_s_energy_is_none_of_theirs(driver):
    driver.mig = 2
    devices = all_devices()
    assert [device.uuid for device in devices] == ["MIG-0", "MIG-1"]
    row = devices[0].sample()
    assert (row["energy_joules"], row["power_watts"], row["utilization_percent"]) == (None, None, None)
    assert (row["memory_used_bytes"], row["sm_clock_megahertz"], row["temperature_celsius"]) == (GIB, 1980, 55)
    assert devices[0].reasons["energy_joules"] == "a MIG instance has none of its own; the card's covers all its instances"
    assert devices[0].reasons["utilization_percent"] == "NVML: Not Supported (MIG instance)"
    described = describe_devices()[0]
    assert (described["mig_instance"], described["memory_bytes"], described["power_limit_watts"]) == (True, 10 * GIB, 650.0)
    driver.mig = 0
    assert [device.uuid for device in all_devices()] == ["GPU-x"]


def test_in_a_virtual_gpu_what_the_hypervisor_hides_is_null_with_a_reason(driver):
    driver.virtual = True
    driver.broken = dict.fromkeys(
        ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetTemperature", "nvmlDeviceGetEnforcedPowerLimit"),
        "Not Supported",
    )
    with Ranks({}).telemetry(all_devices()) as telemetry:
        read(telemetry)
    found = telemetry.observed()["devices"]["GPU-x"]
    assert (found["energy_joules"], found["power_watts_mean"], found["temperature_celsius_peak"]) == (None, None, None)
    assert found["unknown"].keys() == {"power_watts", "energy_joules", "temperature_celsius"}
    described = describe_devices()[0]
    assert described["virtual"] is True
    assert (described["power_limit_watts"], described["unknown"]["EnforcedPowerLimit"]) == (None, "NVML: Not Supported")


def test_a_device_is_described_by_what_stays_the_same(driver):
    assert describe_devices() == [
        {
            "uuid": "GPU-x", "name": "NVIDIA Test 80GB", "part_number": "900-21010-0000-000", "vbios": "96.00.1", "memory_bytes": 80 * GIB,
            "compute_capability": "9.0",
            "driver": "580.1", "power_limit_watts": 650.0, "power_default_limit_watts": 700.0, "highest_sm_clock_megahertz": 1980,
            "highest_memory_clock_megahertz": 2619, "application_sm_clock_megahertz": 1980, "ecc": True, "pci_bus": "0000:00:00.0",
            "pcie_generation": 5, "pcie_width": 16, "nvlinks": 4, "mig_instance": False, "virtual": False, "unknown": {},
        }
    ]  # fmt: skip


def test_each_pair_of_devices_is_told_with_its_path_and_direct_links(driver):
    driver.cards = 2
    assert describe_links() == [{"devices": ["GPU-x", "GPU-1"], "pcie": "switches", "nvlinks": 4}]
    driver.broken = {"nvmlDeviceGetTopologyCommonAncestor": "Not Supported"}
    assert describe_links()[0]["pcie"] is None


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


def test_the_file_holds_a_row_for_every_slow_reading_of_devices_and_host(driver, tmp_path):
    with Ranks({os.getpid(): 100}).telemetry(all_devices()) as telemetry:
        read(telemetry, 30)
    path = tmp_path / "telemetry" / "cell" / "0.json.gz"
    telemetry.timeline.save(path)
    kept = load_timeline(path)
    rows = len(kept["seconds"])
    assert rows > 5
    assert kept["seconds"] == sorted(kept["seconds"])
    assert {len(column) for group in (kept["host"], *kept["devices"].values()) for column in group.values()} == {rows}
    assert set(kept["host"]["ranks_resident_bytes"]) == {100}
    assert kept["host"]["ranks_cpu_seconds"][-1] > 0
    assert 0 < kept["host"]["memory_used_bytes"][0] < 1 << 50
    assert [path.name for path in path.parent.iterdir()] == ["0.json.gz"]


def test_device_state_is_read_at_least_once_a_second_and_memory_ten_times(driver, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(nvml, "load_nvml", lambda: (driver, None))
    with Ranks({1: 1}).telemetry(all_devices()) as telemetry:
        threading.Event().wait(2.0)
    seconds = telemetry.timeline.seconds
    assert len(seconds) >= 3
    assert max(after - before for before, after in pairwise(seconds)) <= 1.0
    assert telemetry.observed()["telemetry_samples"] >= 20


def test_processor_time_of_a_rank_that_ended_stays_counted(monkeypatch):
    spent = {1: 3.0, 2: 5.0}
    monkeypatch.setattr("bench.measure.load.cpu_seconds", lambda pid: spent.get(pid, 0.0))
    load = HostLoad()
    assert load.sample([1, 2], 0)["ranks_cpu_seconds"] == 8.0
    del spent[2]
    spent[1] = 4.0
    assert load.sample([1, 2], 0)["ranks_cpu_seconds"] == 9.0
    assert load.sample([1], 0)["ranks_cpu_seconds"] == 9.0


def test_another_file_is_no_telemetry(tmp_path):
    path = tmp_path / "x.json.gz"
    path.write_bytes(gzip.compress(b'{"schema": "other"}'))
    with pytest.raises(ValueError, match="not a telemetry file; seen: schema 'other'"):
        load_timeline(path)


@pytest.fixture
def counted():
    """A counter that rises by 100 J in the first second, 300 J in the second; seconds 1000 to 1002."""
    timeline = Timeline()
    timeline.started, timeline.seconds = 1000.0, [0.0, 1.0, 2.0]
    timeline.devices = {"GPU-x": {"energy_joules": [50.0, 150.0, 450.0]}}
    return timeline


def test_energy_of_a_lap_is_interpolated_between_readings_of_the_counter(counted):
    assert counted.energy_between("GPU-x", [(1000.0, 1001.0), (1000.5, 1001.5), (1001.25, 1001.5)]) == [100.0, 200.0, 75.0]


def test_laps_add_up_to_the_whole(counted):
    edges = [(1000.1 + 0.3 * lap, 1000.4 + 0.3 * lap) for lap in range(6)]
    assert sum(counted.energy_between("GPU-x", edges)) == pytest.approx(*counted.energy_between("GPU-x", [(1000.1, 1001.9)]))


def test_energy_outside_of_the_readings_is_null(counted):
    assert counted.energy_between("GPU-x", [(999.0, 1001.0), (1001.0, 1003.0)]) == [None, None]
    assert counted.energy_between("GPU-y", [(1000.0, 1001.0)]) == [None]
    counted.devices["GPU-x"]["energy_joules"] = [None, None, None]
    assert counted.energy_between("GPU-x", [(1000.0, 1001.0)]) == [None]


def test_a_file_lies_in_its_suite_or_beside_its_record():
    assert telemetry_path(Path("results/s/records/cell-1/3.json")) == Path("results/s/telemetry/cell-1/3.json.gz")
    assert telemetry_path(Path("results/s/warm/k/record.json")) == Path("results/s/warm/k/record.telemetry.json.gz")


def test_memory_of_the_control_group_is_found_in_either_version(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    assert cgroup_memory_file(tmp_path) is None
    current = tmp_path / "sys/fs/cgroup/job/step/memory.current"
    current.parent.mkdir(parents=True)
    current.write_text("1")
    assert cgroup_memory_file(tmp_path) == current
    (tmp_path / "proc/self/cgroup").write_text("11:cpu:/a\n7:memory:/job\n")
    older = tmp_path / "sys/fs/cgroup/memory/job/memory.usage_in_bytes"
    older.parent.mkdir(parents=True)
    older.write_text("1")
    assert cgroup_memory_file(tmp_path) == older
