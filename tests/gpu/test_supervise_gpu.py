"""Supervision on a real device: its memory as the driver sees it, who else is on it, and running out of it."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from bench.cell import cell_from_json
from bench.launch import supervise
from bench.launch.command import Agents
from bench.launch.pool import hold_devices
from bench.measure.nvml import Device, all_devices
from bench.record import Input, load_record
from bench.suite import Limits
from bench.trial import make_trial

pytestmark = [pytest.mark.gpu, pytest.mark.alone, pytest.mark.skipif(not all_devices(), reason="needs an NVIDIA device")]

FAKES = (str(Path(__file__).parents[1] / "faults"),)
GIB = 1 << 30
OCCUPY = """
import sys, time, torch
from pathlib import Path
print("imported", flush=True)
while not Path(sys.argv[1]).exists():
    time.sleep(0.05)
held = torch.ones(1 << 28, device="cuda")
torch.cuda.synchronize()
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def but_for_this_run(monkeypatch):
    """Processes of pytest that have used the device keep a context and memory there: what each device shows is without them."""
    pytests, processes, used_bytes = this_run(), Device.processes, Device.used_bytes
    held = {device.uuid: used_bytes(device) for device in all_devices()}
    monkeypatch.setattr(Device, "processes", lambda device: [pid for pid in processes(device) if pid not in pytests])
    monkeypatch.setattr(Device, "used_bytes", lambda device: used_bytes(device) - held[device.uuid])


def this_run():
    """This process; under pytest-xdist also its parent, and the workers beside it."""
    own = psutil.Process()
    beside = [own.parent(), *own.parent().children()] if "PYTEST_XDIST_WORKER" in os.environ else [own]
    return {process.pid for process in beside}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run one rank that behaves so on a device, and return the record as it was written."""

    def run(behaviour, idle_seconds=5.0):
        monkeypatch.setattr(supervise, "hold_devices", lambda count, **more: hold_devices(count, seconds=idle_seconds, **more))
        cell = {"stage": "sft", "model": "bloom-tiny", "strategy": "naive", "steps": 10, "device": "cuda", "launcher": "torchrun"}
        data = [Input(name="synthetic-instruct", path="nowhere", sha256="0" * 64, facts={"behaviour": {"0": behaviour}})]
        limits = Limits(timeout_seconds=90.0, heartbeat_seconds=60.0)
        trial = make_trial(cell_from_json(cell), 0, data=data, work=str(tmp_path / "work"), limits=limits)
        supervise.run_trial(trial, tmp_path / "record.json", agents=Agents(program="fake_rank", search_path=FAKES))
        return load_record(tmp_path / "record.json")

    return run


@contextmanager
def stranger(sign):
    """A process that takes memory of the device as soon as the file `sign` exists."""
    process = subprocess.Popen([sys.executable, "-c", OCCUPY, sign], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "imported"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_memory_power_and_energy_of_the_device_are_seen_from_outside(run):
    record = run("cuda_work")
    assert (record.outcome, record.reason) == ("ok", None)
    (peak,) = record.observed["device_memory_peak_bytes"].values()
    assert 2 * GIB < peak < 6 * GIB
    (device,) = record.observed["devices"].values()
    assert device["power_watts_peak"] > 100
    assert device["energy_joules"] > 100
    (described,) = record.provenance["machines"][0]["devices"]
    assert described["name"].startswith("NVIDIA")
    assert described["memory_bytes"] > 10 * GIB
    assert record.observed["telemetry_samples"] / record.observed["seconds"] >= 10


def test_more_memory_than_the_device_has_is_out_of_memory(run, tmp_path):
    record = run("cuda_exhaust")
    earlier = "\n".join(f"{log}:\n{log.read_text()}" for log in tmp_path.glob("work/attempt*/*.log"))
    assert (record.outcome, record.attempt) == ("oom", 1), f"an earlier try was an incident\n{earlier}"
    assert "CUDA out of memory" in record.reason


def test_a_device_that_somebody_else_uses_is_busy(run):
    with stranger("/") as process:
        assert process.stdout.readline().strip() == "ready"
        record = run("cuda_work", idle_seconds=1.0)
    assert record.outcome == "busy"
    assert str(process.pid) in record.reason
    assert "waited 1 s" in record.reason


def test_a_stranger_on_the_device_meanwhile_makes_the_trial_invalid(run, tmp_path):
    with stranger(tmp_path / "work" / "heartbeat0.json") as process:
        record = run("cuda_work")
    assert record.outcome == "invalid"
    assert str(process.pid) in record.reason
