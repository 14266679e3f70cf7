"""Known allocations on a device come out within 1 %: by torch's allocator, and by the driver, from outside the process."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from bench.launch.processes import proportional_bytes, resident_bytes
from bench.measure.nvml import all_devices, visible
from bench.measure.telemetry import Telemetry

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not all_devices(), reason="needs an NVIDIA device")]

SIZE = 2 << 30
ALLOCATE = """
import sys, torch
held = torch.ones(1, device="cuda")
print("ready", flush=True)
for line in sys.stdin:
    held = torch.ones(int(line), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    print("done", flush=True)
"""


@pytest.fixture
def cuda():
    """An allocator without a cache of earlier tests, which leaves none to others on the device."""
    torch = pytest.importorskip("torch")
    torch.cuda.empty_cache()
    yield torch.device("cuda")
    torch.cuda.empty_cache()


def test_the_allocator_s_peak_is_what_was_allocated(cuda):
    import torch

    from bench.measure.memory import MemoryWatch

    watch, before = MemoryWatch(cuda), torch.cuda.memory_allocated(cuda)
    watch.start()
    held = torch.empty(SIZE, dtype=torch.uint8, device=cuda)
    del held
    watch.note()
    memory = watch.read()
    assert memory.peak_allocated_bytes - before == pytest.approx(SIZE, rel=0.01)
    assert memory.peak_reserved_bytes >= memory.peak_allocated_bytes


def test_each_phase_has_the_peak_of_its_own_allocations(cuda):
    import torch

    from bench.measure.clock import PhaseClock
    from bench.measure.memory import MemoryWatch

    sizes = {"rollout": SIZE, "policy_learn": SIZE // 2, "critic_learn": SIZE // 4}
    clock, watch, before = PhaseClock(cuda), MemoryWatch(cuda), torch.cuda.memory_allocated(cuda)
    watch.start()
    clock.start()
    for name, size in sizes.items():
        with clock.phase(name):
            held = torch.empty(size, dtype=torch.uint8, device=cuda)
            del held
    clock.read()
    watch.note(clock.peaks)
    memory = watch.read()
    found = {name: peak - before for name, peak in memory.phases_peak_allocated_bytes.items()}
    assert found == {name: pytest.approx(size, rel=0.01) for name, size in sizes.items()}
    assert memory.peak_allocated_bytes - before == pytest.approx(SIZE, rel=0.01)


@pytest.mark.alone
def test_phases_by_device_events_add_up_to_the_lap(cuda):
    """Work of known length on the device (spins of its own clock): phases and residual within 3 % of the lap."""
    import torch

    from bench.measure.clock import OTHER, LapClock, PhaseClock

    spin = getattr(torch.cuda, "_sleep", None)
    if spin is None:
        pytest.skip("this torch cannot have the device wait")
    clock, lap = PhaseClock(cuda), LapClock(cuda)
    spin(10_000_000)
    lap.start()
    clock.start()
    for name, cycles in (("one", 100_000_000), ("two", 200_000_000)):
        with clock.phase(name):
            spin(cycles)
    phases, seconds = clock.read(), lap.stop()
    assert sum(phases.values()) == pytest.approx(seconds, rel=0.03)
    assert phases["two"] == pytest.approx(2 * phases["one"], rel=0.03)
    assert phases[OTHER] < 0.03 * seconds


@pytest.mark.alone
def test_the_driver_s_peak_rises_by_what_another_process_allocates():
    """The context of CUDA is in the driver's figure, so the rise from a process with a context counts."""
    device = visible(all_devices())[0]
    process = subprocess.Popen([sys.executable, "-c", ALLOCATE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        with Telemetry(lambda: [process.pid], resident=resident_bytes, proportional=proportional_bytes, devices=[device]) as telemetry:
            process.stdin.write(f"{SIZE}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"
            time.sleep(0.5)
    finally:
        process.kill()
        process.communicate()
    observed = telemetry.observed()
    assert observed["device_memory_peak_bytes"][device.uuid] == pytest.approx(SIZE, rel=0.01)
    assert telemetry.timeline.devices[device.uuid]["memory_used_bytes"][-1] > SIZE


def test_a_device_gives_its_state_or_a_reason_for_each_value():
    for device in all_devices():
        row = device.sample()
        assert row["memory_used_bytes"] > 0
        assert row["sm_clock_megahertz"] > 100
        assert 10 < row["temperature_celsius"] < 110
        unknown = {name for name, value in row.items() if value is None}
        assert unknown <= {*device.reasons, *(f"nvlink_{way}_bytes" for way in ("sent", "received")), "memory_utilization_percent"}
        described = device.describe()
        assert described["name"].startswith("NVIDIA")
        assert described["driver"].split(".")[0].isdigit()


@pytest.mark.alone
def test_doctor_measures_the_ceilings_of_a_device(tmp_path):
    import json
    import os

    line = [sys.executable, "-m", "bench.measure.ceilings", "--json"]
    done = subprocess.run(
        line, check=True, capture_output=True, text=True, timeout=300, env={**os.environ, "COATI_BENCH_CACHE": str(tmp_path)}
    )
    found = json.loads(done.stdout)
    assert found["matrix_flops_per_second"]["bf16"] > 10 * found["matrix_flops_per_second"]["fp32"] / 4
    assert found["host_to_device_bytes_per_second"] > 1e9
    (kept,) = (tmp_path / "ceilings").iterdir()
    assert kept.stem == visible(all_devices())[0].uuid
