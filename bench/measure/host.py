"""What this machine offers: software, processors, memory, disk, devices, compilers, schedulers. Torch-free and quick."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure.build_locks import BuildLock, find_locks
from bench.measure.kernels import kernels_here
from bench.measure.nvml import describe_devices, load_nvml
from bench.measure.provenance import versions

PROGRAMS = {"chromium": ("chromium", "chromium-browser", "google-chrome"), "slurm": ("sbatch",), "apptainer": ("apptainer", "singularity"),
            "podman": ("podman",), "c++ compiler": ("c++", "g++"), "ninja": ("ninja",)}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One look at this machine. Null is "not there"."""

    versions: dict[str, str | None]
    """Of Python and the packages that decide numbers; `cuda` is what torch was built with."""
    cores: int
    """Cores that this process may use."""
    memory_bytes: int
    """Memory of the machine, or of this control group if that is less."""
    memory_available_bytes: int
    shared_memory_free_bytes: int
    """Of /dev/shm, through which ranks of one machine talk."""
    disk_free_bytes: int
    """At `folder` of `look`."""
    devices: list[dict[str, Any]]
    """CUDA devices by NVML: name, memory_bytes, driver, ..."""
    no_devices: str | None
    """Why NVML gives none."""
    nvcc: str | None
    """Release of the CUDA compiler."""
    kernels: list[str]
    """ColossalAI's kernels that are there ready, prebuilt or compiled by this user for this torch."""
    build_locks: list[BuildLock]
    """Locks of kernel builds, those of dead builders among them."""
    programs: dict[str, str | None]
    """Path of each program of `PROGRAMS`."""

    @property
    def builds_kernels(self) -> bool:
        """Whether ColossalAI's CUDA kernels (HybridAdam, FusedAdam) can be compiled here."""
        return None not in (self.nvcc, self.programs["c++ compiler"], self.programs["ninja"])


def look(folder: Path) -> Host:
    """Look at this machine; `folder` is where results would go (its nearest parent that exists is measured)."""
    _, problem = load_nvml()
    memory, available = _memory()
    return Host(
        versions=versions(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=memory,
        memory_available_bytes=available,
        shared_memory_free_bytes=_free("/dev/shm"),  # noqa: S108 (measured, not written)
        disk_free_bytes=_free(nearest(folder)),
        devices=describe_devices(),
        no_devices=problem,
        nvcc=_nvcc(),
        kernels=kernels_here(),
        build_locks=find_locks(),
        programs={name: _which(*choices) for name, choices in PROGRAMS.items()},
    )


def nearest(folder: Path) -> Path:
    """`folder`, or its nearest parent that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _memory() -> tuple[int, int]:
    import psutil

    seen = psutil.virtual_memory()
    limit = next((int(text) for path in _CGROUP_LIMITS if (text := _read(path)) and text.isdigit()), seen.total)
    return min(seen.total, limit), min(seen.available, limit)


_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _free(path: str | Path) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0


def _which(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    program = shutil.which("nvcc", path=f"{home}/bin") if home else None
    program = program or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if program is None:
        return None
    try:
        text = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release ([0-9.]+)", text)
    return found.group(1) if found else None
