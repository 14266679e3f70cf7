"""One run of a suite at a time. Torch-free.

The lock is the kernel's (flock), so it cannot outlive those who hold it; the file says who that is. The guard of the run holds
it too: after a driver was killed it is free only when the last process of its run is gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from bench.errors import MachineError

CLEANING_SECONDS = 60.0
"""How long the guard of a killed driver may take to end what it had started."""


class Held(NamedTuple):
    """The lock, held by this process."""

    descriptor: int
    was_killed: bool
    """Whether the last holder ended without giving it back."""


@contextmanager
def hold(root: Path, patience: float = CLEANING_SECONDS) -> Iterator[Held]:
    """Hold the lock of the suite's folder `root`. Raises MachineError while a living process holds it."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / ".run.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _take(descriptor, path, patience)
        left = _read(descriptor)
        _write(descriptor, json.dumps(_me()))
        yield Held(descriptor, left is not None)
        _write(descriptor, "")
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        owner = _read(descriptor) or {}
        if _lives(owner) or time.monotonic() > deadline:
            who = f"process {owner.get('pid', '(unknown)')} on {owner.get('host', 'this machine')}, since {owner.get('since', '(unknown)')}"
            gone = "" if owner.get("host") == socket.gethostname() else f"; if that host is gone for good, remove {path}"
            raise MachineError(f"{path.parent}: this suite is being run already; seen: {who}; wait for it to end, or end it{gone}")
        time.sleep(0.2)


def _me() -> dict[str, Any]:
    started = psutil.Process().create_time()
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started))
    return {"pid": os.getpid(), "started": started, "host": socket.gethostname(), "since": since}


def _lives(owner: dict[str, Any]) -> bool:
    """Whether the process that wrote the lock is there; one on another host is taken to be."""
    if owner.get("host") != socket.gethostname():
        return bool(owner)
    try:
        process = psutil.Process(owner["pid"])
        return process.create_time() == owner["started"] and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError):
        return False


def _read(descriptor: int) -> dict[str, Any] | None:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)
