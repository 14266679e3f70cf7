"""A small disk that all hosts see under one path, and that fills up or turns read-only. Needs root."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster_hosts import run_here

FILLER = "filler"
PIECE = 1 << 16


class SharedFolder:
    """A folder whose mounts appear on every host that is started while the context lasts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Path:
        self.path.mkdir(parents=True)
        run_here("mount", "--bind", str(self.path), str(self.path))
        run_here("mount", "--make-shared", str(self.path))
        return self.path

    def __exit__(self, *_: object) -> None:
        unmount(self.path)


class SmallDisk:
    """Mounted below a `SharedFolder`."""

    def __init__(self, path: Path, stage: Path) -> None:
        self.path, self._stage = path, stage

    def fill(self) -> None:
        """Write until the disk takes nothing more."""
        with suppress(OSError), (self.path / FILLER).open("ab", buffering=0) as file:
            while file.write(bytes(PIECE)):
                continue
        with suppress(OSError), (self.path / FILLER).open("ab", buffering=0) as file:
            while file.write(bytes(1)):
                continue

    def free(self) -> None:
        """Give the room back."""
        (self.path / FILLER).unlink()

    def turn_read_only(self) -> None:
        """From now on no file can be opened for writing; what is open already stays so."""
        self._stage.mkdir()
        run_here("mount", "--bind", str(self.path), str(self._stage))
        run_here("mount", "-o", "remount,bind,ro", str(self._stage))
        run_here("mount", "--bind", str(self._stage), str(self.path))  # a copy of a read-only mount is read-only, on every host

    def turn_writable(self) -> None:
        """Take that back."""
        run_here("umount", str(self.path))
        run_here("umount", str(self._stage))
        self._stage.rmdir()


@contextmanager
def small_disk(shared: Path, name: str, megabytes: int) -> Iterator[SmallDisk]:
    """A disk of so many MiB at `shared`/`name`, gone afterwards."""
    path, stage = shared / name, shared.with_name(f"{name}-read-only")
    path.mkdir()
    run_here("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "cbn-disk", str(path))
    try:
        yield SmallDisk(path, stage)
    finally:
        unmount(stage)
        unmount(path)
        shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(stage, ignore_errors=True)


def unmount(path: Path) -> None:
    """Take away everything that is mounted at `path` and below, whoever uses it."""
    for target in _mounts_at(path):
        subprocess.run(["umount", "--lazy", target], capture_output=True, check=False)


def _mounts_at(path: Path) -> list[str]:
    """The mounts at and below `path`, the last one first."""
    targets = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()]
    return [target for target in reversed(targets) if Path(target).is_relative_to(path)]
