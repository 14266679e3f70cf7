"""Locks of kernel builds whose builder died: found, and broken before they hang the next start. Torch-free.

torch compiles an extension under a lock, a file named `lock` in the build's folder that is made exclusively and removed at the end
(torch/utils/file_baton.py). A builder that is killed leaves it, and whoever needs the extension next waits for ever, without a word.

A builder has the lock open until it removes it, and its ninja works in the folder; a lock with neither has no builder on this
machine. That is proof where all builders are in sight. Where they may not be (a shared file system, a process namespace of our own,
another user's lock), a lock is taken to be left only when nothing in its folder has changed for `QUIET_SECONDS`.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.layout import cache_folder

QUIET_SECONDS = 900.0
"""No compiler works on one file for so long (ColossalAI's kernels take about 2 minutes in all)."""
OWN_FILE_SYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs"})
"""Of one machine: whoever writes there is a process of it."""
COMPILERS = ("ninja", "nvcc", "cicc", "cudafe++", "ptxas", "fatbinary", "nvlink", "c++", "cc1plus", "g++", "ld", "as")
"""Programs that work on a build, by the beginnings of their names. A killed builder's may go on for a while."""
PRIVATE_FILE_SYSTEMS = frozenset({"overlay", "tmpfs", "ramfs"})
"""Of one container: whoever writes there is a process in it."""
FIRST_PROCESS_NAMESPACE = 0xEFFFFFFC
"""Number of the machine's own process namespace (linux/proc_ns.h, PROC_PID_INIT_INO)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildLock:
    """A build's lock, as it was seen."""

    path: Path
    inode: int
    age_seconds: float
    builder: int | None
    """A process that builds there, as far as one can be seen."""
    stale: bool
    """Whether its builder is dead."""

    def __str__(self) -> str:
        if self.builder is not None:
            state = f"process {self.builder} is building"
        elif self.stale:
            state = "its build died, and the next start would wait for it for ever; the next trial on a device breaks it"
        else:
            state = f"no builder is seen from here; taken to be dead {QUIET_SECONDS / 60:.0f} minutes after the last change in its folder"
        return f"build lock {self.path}, {self.age_seconds:.0f} s old: {state}"


def build_folders() -> list[Path]:
    """Where extensions are built: by ColossalAI and by torch, for this user and in the home folder of images."""
    homes = [Path.home(), cache_folder() / "home"]
    found = [home / ".cache" / name for home in homes for name in ("colossalai/torch_extensions", "torch_extensions")]
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    return [*found, *([Path(named)] if named else [])]


def find_locks(folders: Iterable[Path] | None = None) -> list[BuildLock]:
    """Every build lock below the folders (by default `build_folders`)."""
    paths = {path for folder in (build_folders() if folders is None else folders) for path in folder.glob("**/lock") if path.is_file()}
    return [lock for path in sorted(paths) if (lock := look_at(path))]


def look_at(path: Path) -> BuildLock | None:
    """The state of one lock, or None where it has gone."""
    now = time.time()
    try:
        seen, builder = path.stat(), find_builder(path)
        gone = builder is None and (builders_are_in_sight(path) or now - last_change(path.parent) > QUIET_SECONDS)
    except FileNotFoundError:
        return None
    return BuildLock(path=path, inode=seen.st_ino, age_seconds=max(0.0, now - seen.st_mtime), builder=builder, stale=gone)


def break_stale_locks(folders: Iterable[Path] | None = None) -> list[BuildLock]:
    """Remove the locks whose builders are dead, and return them. One that may not be removed stays."""
    broken = []
    for lock in find_locks(folders):
        with suppress(OSError):
            if lock.stale and _remove(lock):
                broken.append(lock)
    return broken


def _remove(lock: BuildLock) -> bool:
    """Remove `lock` if it is still the one that was seen. The folder is held meanwhile, so that of two only one removes it: else the
    second could take the lock of a build that began in between.
    """
    with _held(lock.path.parent):
        now = look_at(lock.path)
        if now is None or now.inode != lock.inode or not now.stale:
            return False
        lock.path.unlink()
        return True


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def find_builder(path: Path) -> int | None:
    """A process that has the lock open, or a compiler in its folder, or None. Those of other users cannot be looked into."""
    wanted, folder = path.stat(), path.parent.resolve()
    for process in psutil.process_iter():
        root = Path(f"/proc/{process.pid}")
        with suppress(OSError):
            if (root / "cwd").readlink() == folder and (root / "comm").read_text(encoding="utf-8").startswith(COMPILERS):
                return process.pid
            if any(_is(wanted, descriptor) for descriptor in (root / "fd").iterdir()):
                return process.pid
    return None


def _is(wanted: os.stat_result, descriptor: Path) -> bool:
    try:
        seen = descriptor.stat()
    except OSError:
        return False
    return (seen.st_dev, seen.st_ino) == (wanted.st_dev, wanted.st_ino)


def builders_are_in_sight(path: Path) -> bool:
    """Whether every process that could hold the lock can be looked into from here."""
    if os.geteuid() not in (0, path.stat().st_uid):
        return False
    kind = file_system(path)
    return kind in PRIVATE_FILE_SYSTEMS or (kind in OWN_FILE_SYSTEMS and _sees_all_processes())


def _sees_all_processes() -> bool:
    return Path("/proc/self/ns/pid").stat().st_ino == FIRST_PROCESS_NAMESPACE


def file_system(path: Path) -> str:
    """The kind of file system that `path` lies on, as the kernel calls it; empty where it is unknown."""
    real = path.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if real.is_relative_to(mount.mountpoint)]
    return str(max(mounts, key=lambda mount: len(mount.mountpoint)).fstype) if mounts else ""


def last_change(folder: Path) -> float:
    """Time of the last change of anything in `folder`, in seconds since 1970."""
    times = [folder.stat().st_mtime]
    for path in folder.rglob("*"):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)
