"""One process at a time for one target. Torch-free."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.errors import MachineError

PATIENCE_SECONDS = 60.0


@contextmanager
def alone(target: Path, patience: float = PATIENCE_SECONDS) -> Iterator[int]:
    """Hold the lock of `target` and yield its descriptor.

    Guards get that descriptor too (`keep`), so that after a supervisor was killed the lock is free only when the last of its
    ranks is gone. Raises MachineError if another process still holds it after `patience` seconds.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.parent / f".{target.name}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + patience
    try:
        while not _locked(descriptor):
            if time.monotonic() > deadline:
                raise MachineError(
                    f"{target}: another process is making it; seen: its lock is held; wait for that process, or end it; if it was on a "
                    f"host that is gone for good, remove {path}"
                )
            time.sleep(0.2)
        yield descriptor
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
