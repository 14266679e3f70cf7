"""Scratch folders of builds: held while the builder lives, removed by the next build when it was killed. Torch-free.

A builder holds a lock on its folder, which ends with the process, however that ends. A folder is made, locked and, where it is left,
removed under a lock that all builders of one cache share: so none is taken for left before it is held.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.container.tools import as_root

PREFIX = ".build-"


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A folder of this build's own in `folder`, gone at the end; those that dead builders left go first."""
    with _held(folder / ".builds.lock"):
        remove_left(folder)
        path = Path(tempfile.mkdtemp(dir=folder, prefix=PREFIX))
        held = _lock(path)
    try:
        yield path
    finally:
        remove(path)
        os.close(held)


def remove_left(folder: Path) -> list[Path]:
    """Remove the scratch folders in `folder` whose builders are dead, and return them."""
    removed = []
    for path in sorted(folder.glob(f"{PREFIX}*")):
        try:
            held = _lock(path)
        except OSError:
            continue  # its builder lives, or has just removed it
        print(f"  {path}: left by a build that was killed; removed", flush=True)
        remove(path)
        os.close(held)
        removed.append(path)
    return removed


def remove(path: Path) -> None:
    """Remove a scratch folder with the image store in it, which another user id may own where buildah runs without root."""
    for mounted in reversed(_mounts_below(path)):
        subprocess.run(["umount", "--lazy", mounted], check=False, capture_output=True)
    begin = time.monotonic()
    command = ["rm", "-rf", "--one-file-system", str(path)]
    try:
        subprocess.run(as_root(*command), check=False)
    except FileNotFoundError:  # without buildah there are no files of another user id
        subprocess.run(command, check=False)
    if (seconds := time.monotonic() - begin) >= 1:
        print(f"  tidying up: {seconds:.0f} s", flush=True)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _lock(path: Path) -> int:
    """A descriptor of the folder that holds its lock. Raises OSError where somebody else has it."""
    held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise
    return held


def _mounts_below(path: Path) -> list[str]:
    """What a killed build left mounted in its folder, in the order of mounting (man 5 proc, /proc/self/mounts)."""
    lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    return [place for line in lines if Path(place := line.split()[1]).is_relative_to(path.resolve())]
