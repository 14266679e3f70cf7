"""Writes that wait for a disk which is full, read-only or away: what a trial measured is worth a minute. Torch-free."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bench.errors import MachineError

PATIENCE_SECONDS = 60.0
"""How long a write is tried again."""
AGAIN_SECONDS = 1.0

PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE})
"""What a shared disk says while somebody may be mending it; anything else does not pass by itself."""


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def patiently(write: Callable[[], None], target: Path, what: str, wait: Callable[[float], bool] = _sleep) -> None:
    """Call `write`, which leaves `target` whole or not at all, until it succeeds, for at most `PATIENCE_SECONDS`.

    `what` names the content in messages; `wait` sleeps so many seconds and says whether to stop trying. Raises MachineError if the disk
    still refuses then, or refuses for a reason that does not pass by itself.
    """
    deadline, told = time.monotonic() + PATIENCE_SECONDS, False
    while True:
        try:
            return write()
        except OSError as error:
            if error.errno not in PASSING or time.monotonic() > deadline or (told and wait(AGAIN_SECONDS)):
                raise MachineError(
                    f"{target}: {what} cannot be written: {error.strerror}; free space or rights are needed there"
                ) from error
            if not told:
                _say(f"{target}: {what} cannot be written: {error.strerror}; tried again for {PATIENCE_SECONDS:g} s")
            told = True


def _say(text: str) -> None:
    with suppress(OSError):  # where output goes may be on the same disk
        print(text, flush=True)


def refusal(folder: Path) -> str | None:
    """Why the disk that `folder` is on takes nothing more, as far as it says so itself; None where it does not."""
    try:
        space = os.statvfs(folder)
    except OSError:
        return None
    if space.f_flag & os.ST_RDONLY:
        return f"the disk of {folder} is read-only"
    if space.f_bavail == 0 or (space.f_files and space.f_favail == 0):
        return f"no space is left for {folder}"
    return None
