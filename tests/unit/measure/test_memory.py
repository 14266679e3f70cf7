"""Known allocations come out within 1 %: of this process, and of another one that is watched from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from bench.launch.processes import descendants, proportional_bytes, resident_bytes
from bench.measure.memory import MemoryWatch, host_peak_bytes
from bench.measure.telemetry import Telemetry

SIZE = 256 << 20
ONE_PERCENT = pytest.approx(SIZE, rel=0.01)

HOARD = """
import mmap, sys
def hold(size):
    memory = mmap.mmap(-1, size)
    for page in range(0, size, 4096):
        memory[page] = 1
    return memory
print("ready", flush=True)
held = None
for line in sys.stdin:
    held = hold(int(line)) if int(line) else held.close()
    print("done", flush=True)
"""


@contextmanager
def hoard() -> Iterator[subprocess.Popen[str]]:
    """A process that holds so many touched bytes as it is told (0: lets go)."""
    process = subprocess.Popen([sys.executable, "-c", HOARD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str], size: int) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{size}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"


def test_memory_that_another_process_held_for_a_moment_is_seen_from_outside() -> None:
    with hoard() as process:
        before = resident_bytes(process.pid)
        with Telemetry(lambda: [process.pid], resident=resident_bytes, proportional=proportional_bytes) as telemetry:
            tell(process, SIZE)
            time.sleep(0.25)
            tell(process, 0)
            time.sleep(0.15)
            after = resident_bytes(process.pid)
        observed = telemetry.observed()
    assert observed["host_peak_bytes"] - before == ONE_PERCENT
    assert after - before < 0.01 * SIZE, "it was let go again"


def test_processes_of_a_tree_are_added_up() -> None:
    with hoard() as first, hoard() as second:
        before = sum(map(resident_bytes, (first.pid, second.pid)))
        mine = {first.pid, second.pid}
        ranks = lambda: [pid for pid in descendants([os.getpid()]) if pid in mine]  # noqa: E731
        with Telemetry(ranks, resident=resident_bytes, proportional=proportional_bytes) as telemetry:
            for process in (first, second):
                tell(process, SIZE // 2)
            time.sleep(0.3)
        observed = telemetry.observed()
    assert observed["host_peak_bytes"] - before == ONE_PERCENT
    assert 0 < max(telemetry.timeline.host["ranks_resident_bytes"]) <= observed["host_peak_bytes"]


def test_the_peak_of_this_process_is_that_of_the_loop_and_not_of_what_was_before() -> None:
    larger = torch.ones(2 * SIZE, dtype=torch.uint8)
    del larger
    watch = MemoryWatch(torch.device("cpu"))
    watch.start()
    before = host_peak_bytes()
    held = torch.ones(SIZE, dtype=torch.uint8)
    del held
    memory = watch.read()
    assert memory.host_peak_bytes is not None
    if any("could not be reset" in note for note in memory.notes):
        pytest.skip("this kernel does not let a process reset its peak")
    assert memory.host_peak_bytes - before == ONE_PERCENT


def test_a_cpu_has_no_allocator_peaks_and_says_so() -> None:
    watch = MemoryWatch(torch.device("cpu"))
    watch.start()
    memory = watch.read()
    assert (memory.peak_allocated_bytes, memory.peak_reserved_bytes) == (None, None)
    assert "no allocator peaks: the device is a CPU" in memory.notes
