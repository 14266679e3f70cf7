"""What the supervisor reads from outside while real rank processes run, and what of it reaches the record and the telemetry file."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from bench.launch import rank, readings
from bench.launch.readings import add_lap_energy
from bench.launch.supervise import run_trial
from bench.measure import build_locks, nvml
from bench.measure.timeline import Timeline, load_timeline
from bench.record import Lap, Part, load_record
from tests.fake_nvml import GIB, FakeNvml

PATIENT = {"heartbeat_seconds": 60.0, "timeout_seconds": 120.0}
"""A busy machine takes its time to start an agent."""


@pytest.fixture
def driver(monkeypatch):
    """A driver with one idle card."""
    fake = FakeNvml()
    monkeypatch.setattr(nvml, "load_nvml", lambda: (fake, None))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


@pytest.fixture
def on_device(fake_trial, agents, tmp_path):
    """Run a fake rank as a trial of one device and return the record as it was written."""

    def run(behaviour="slow_work"):
        made = fake_trial({0: behaviour}, ranks=1, launcher="torchrun", **PATIENT)
        trial = replace(made, cell={**made.cell, "device": "cuda"})
        path = tmp_path / "results" / "records" / "cell" / "0.json"
        run_trial(trial, path, agents=agents)
        return load_record(path)

    return run


def test_a_trial_on_the_cpu_has_a_telemetry_file_of_its_host(fake_trial, fork_parent, tmp_path):
    record = run_trial(fake_trial({0: "slow_work", 1: "slow_work"}), tmp_path / "record.json", parent=fork_parent)
    kept = load_timeline(tmp_path / "record.telemetry.json.gz")
    assert record.observed["telemetry_file"].endswith("record.telemetry.json.gz")
    assert kept["devices"] == {}
    assert len(kept["seconds"]) >= 2
    assert max(kept["host"]["ranks_resident_bytes"]) <= record.observed["host_peak_bytes"]
    assert max(kept["host"]["ranks_cpu_seconds"]) >= 0
    assert record.observed["device_memory_note"] == "the trial ran on the CPU"


def test_a_trial_on_a_device_has_its_readings_in_the_suite_s_telemetry_folder(driver, on_device, tmp_path):
    record = on_device()
    assert record.outcome == "ok", record.reason
    assert "foreign processes unknown" in record.flags, "the driver shows no process at all"
    assert record.observed["telemetry_file"] == "cell/0.json.gz"
    kept = load_timeline(tmp_path / "results" / "telemetry" / "cell" / "0.json.gz")
    assert set(kept["devices"]["GPU-x"]["power_watts"]) == {300.0}
    found = record.observed["devices"]["GPU-x"]
    assert (found["power_watts_mean"], found["energy_joules"], found["unknown"]) == (300.0, 0.0, {})
    assert record.observed["device_memory_baseline_bytes"] == {"GPU-x": GIB}


def test_without_an_energy_counter_the_record_says_why(driver, on_device):
    driver.broken = {"nvmlDeviceGetTotalEnergyConsumption": "Not Supported"}
    found = on_device().observed["devices"]["GPU-x"]
    assert (found["energy_joules"], found["laps_energy_joules"]) == (None, [])
    assert found["unknown"] == {"energy_joules": "NVML: Not Supported"}


def test_throttling_meanwhile_is_a_flag(driver, on_device):
    driver.throttle = 0x40
    assert "throttled: hardware-thermal" in on_device().flags


def test_a_telemetry_file_that_cannot_be_written_loses_no_record(driver, on_device, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "telemetry").write_text("in the way")
    record = on_device()
    assert record.outcome == "ok"
    assert record.observed["telemetry_file"] is None
    assert record.observed["telemetry_note"].startswith("the telemetry file could not be written: ")


def test_energy_of_laps_is_that_of_the_lowest_rank_s_laps():
    timeline = Timeline()
    timeline.started, timeline.seconds = 100.0, [0.0, 10.0]
    timeline.devices = {"GPU-x": {"energy_joules": [0.0, 1000.0]}}
    laps = [Lap(first_step=step, steps=1, seconds=2.0, counts={}, opened=101.0 + 2 * step) for step in range(3)]
    parts = [Part(rank=rank, local_rank=0, node=0, world_size=2, hostname="h", pid=1, outcome="ok", laps=laps[rank:]) for rank in (1, 0)]
    devices = {"GPU-x": {}}
    add_lap_energy(devices, timeline, parts)
    assert devices["GPU-x"]["laps_energy_joules"] == pytest.approx([200.0, 200.0, 200.0])
    add_lap_energy(devices, timeline, [])
    assert devices["GPU-x"]["laps_energy_joules"] == []


@pytest.fixture
def away(monkeypatch):
    """The supervisor takes itself to be on another host than the ranks, as under srun or on several hosts."""
    for module in (rank, readings):
        monkeypatch.setattr(module, "socket", SimpleNamespace(gethostname=lambda: "login"))


def test_nodes_that_the_supervisor_is_not_on_are_read_by_themselves(away, fake_trial, agents, tmp_path):
    trial = fake_trial({0: "slow_work", 1: "slow_work"}, nodes=2, launcher="torchrun", **PATIENT)
    record = run_trial(trial, tmp_path / "record.json", agents=agents)
    assert record.outcome == "ok", record.reason
    assert record.observed["nodes_without_telemetry"] == []
    assert record.observed["nodes"].keys() == {"0", "1"}
    for found in record.observed["nodes"].values():
        assert found["host_peak_bytes"] > 1 << 20
        assert found["telemetry_samples"] > 5
    kept = load_timeline(tmp_path / "record.telemetry.json.gz")
    assert kept["nodes"].keys() == {"0", "1"}
    for node in kept["nodes"].values():
        assert len(node["seconds"]) == len(node["host"]["ranks_cpu_seconds"]) >= 2


def test_a_node_that_was_killed_left_no_readings_and_is_named(away, fake_trial, agents, tmp_path):
    trial = fake_trial({0: "slow_work", 1: "kill_waiter"}, nodes=2, launcher="torchrun", **PATIENT)
    record = run_trial(trial, tmp_path / "record.json", agents=agents)
    assert 1 in record.observed["nodes_without_telemetry"]


def test_devices_of_all_nodes_stand_side_by_side_and_a_stranger_on_any_is_told(tmp_path):
    def of(uuid, strangers, throttles):
        timeline = Timeline()
        timeline.started, timeline.seconds = 100.0, [0.0, 10.0]
        timeline.devices = {uuid: {"energy_joules": [0.0, 500.0]}}
        nothing = dict.fromkeys(("strangers_note", "host_peak_proportional_bytes", "cgroup_peak_bytes", "cgroup_baseline_bytes"))
        observed = {
            **nothing, "devices": {uuid: {"energy_joules": 500.0}}, "device_memory_peak_bytes": {uuid: 7}, "strangers": strangers,
            "device_memory_baseline_bytes": {uuid: 1}, "host_peak_bytes": 3, "telemetry_samples": 9,
        }  # fmt: skip
        return readings.Readings(observed, throttles, timeline)

    def part(number, opened):
        laps = [Lap(first_step=0, steps=1, seconds=2.0, counts={}, opened=opened)]
        return Part(rank=number, local_rank=0, node=number, world_size=3, hostname="h", pid=1, outcome="ok", laps=laps)

    own, others = of("GPU-a", [], ["hardware-thermal"]), {1: of("GPU-b", [77], ["power-brake"]), 2: None}
    found = readings.observe(own, others, {0: part(0, 101.0), 1: part(1, 102.0)}, tmp_path / "t.json.gz")
    assert found["device_memory_peak_bytes"] == {"GPU-a": 7, "GPU-b": 7}
    assert {uuid: device["laps_energy_joules"] for uuid, device in found["devices"].items()} == {"GPU-a": [100.0], "GPU-b": [100.0]}
    assert (found["nodes"]["1"]["host_peak_bytes"], found["nodes_without_telemetry"]) == (3, [2])
    assert readings.foreign_processes(own, others) == ["77 of node 1"]
    assert readings.flags(own, others) == ["throttled: hardware-thermal", "throttled: power-brake"]
    assert load_timeline(tmp_path / "t.json.gz")["nodes"]["1"]["devices"]["GPU-b"]["energy_joules"] == [0.0, 500.0]


def test_the_build_lock_of_a_dead_builder_is_broken_before_ranks_start_and_the_record_says_so(on_device, driver, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(build_locks, "builders_are_in_sight", lambda _: True)
    lock = tmp_path / "home/.cache/colossalai/torch_extensions/torch2.11_cuda-13.0-abc/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    record = on_device()
    assert not lock.exists()
    assert "stale build lock broken" in record.flags
