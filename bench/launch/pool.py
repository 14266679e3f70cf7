"""Devices of this machine as a pool: handed out by UUID, one trial at a time on each, and only when idle. Torch-free.

Trials that claim no times may share devices with their like (`shared`), never with a trial that is measured.
"""

from __future__ import annotations

import fcntl
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.measure.nvml import Device, all_devices, load_nvml, visible

IDLE_SECONDS = 600.0
"""Longest wait for idle devices."""


class BusyError(Exception):
    """No idle devices in time; says which and why."""


class LackingError(Exception):
    """The machine has fewer devices than the trial needs, so that waiting is no use."""


@contextmanager
def hold_devices(
    count: int, *, shared: bool = False, seconds: float = IDLE_SECONDS, stopped: Callable[[float], bool] | None = None,
    devices: Callable[[], list[Device]] = all_devices, folder: Path | None = None,
) -> Iterator[list[Device]]:  # fmt: skip
    """Lock `count` idle devices for the context, waiting for them. `stopped(pause)` sleeps and says whether to give up.
    `shared`: others that share may hold them too, and they need not be idle; those with least memory in use are taken.
    Raises BusyError or LackingError.

    The lock is an flock on a file for each device, shared by all users of the machine; it goes when this process ends.
    """
    pause = stopped or _sleep
    deadline = time.monotonic() + seconds
    folder = folder or Path(tempfile.gettempdir())
    while True:
        with ExitStack() as locks:
            held, problem = _take(count, visible(devices()), folder, locks, shared=shared)
            if problem is None:
                yield held
                return
        if time.monotonic() >= deadline or pause(1.0):
            raise BusyError(f"{problem}; waited {seconds:g} s")


def _take(count: int, devices: list[Device], folder: Path, locks: ExitStack, *, shared: bool) -> tuple[list[Device], str | None]:
    """Locked devices, idle unless `shared`, or what stands in the way."""
    if len(devices) < count:
        _, reason = load_nvml()
        raise LackingError(f"{count} devices are needed on this machine; seen: {len(devices)}" + (f" ({reason})" if reason else ""))
    held: list[Device] = []
    problems: list[str] = []
    for device in _emptiest_first(devices) if shared else devices:
        if len(held) < count and (problem := _lock(device, folder, locks, shared=shared) or (None if shared else device.busy())):
            problems.append(problem)
        elif len(held) < count:
            held.append(device)
    return held, None if len(held) == count else "; ".join(problems)


def _emptiest_first(devices: list[Device]) -> list[Device]:
    """By whole GiB in use, and at random among equals: trials that begin at once should not all take the same."""
    return sorted(devices, key=lambda device: ((device.used_bytes() or 0) >> 30, random.random()))


def _lock(device: Device, folder: Path, locks: ExitStack, *, shared: bool) -> str | None:
    path = folder / f"coati-bench-{device.uuid}.lock"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # without O_CREAT: another user's file in a sticky folder refuses it
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    locks.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"device {device.uuid} is held by another trial"
    return None


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False
