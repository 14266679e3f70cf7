"""How busy the host is while a trial runs: processors, memory, its control group. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

_CGROUP_FILES = (
    ("sys/fs/cgroup", "memory.current", ""),
    ("sys/fs/cgroup/memory", "memory.usage_in_bytes", "memory"),
)
"""Mount, file and controller of the memory in use: version 2 (one hierarchy), version 1 (cgroup-v2.rst, memory.rst of the kernel)."""


def cgroup_memory_file(root: Path = Path("/")) -> Path | None:
    """The file that counts the memory of this process's control group, caches included; None where there is none.

    Inside a container with a cgroup namespace that is the container's.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    own = {controller: path.lstrip("/") for line in lines for _, names, path in [line.split(":", 2)] for controller in names.split(",")}
    for mount, name, controller in _CGROUP_FILES:
        for place in filter(None, (own.get(controller), ".")):
            if (found := root / mount / place / name).is_file():
                return found
    return None


class HostLoad:
    """Readings of this host."""

    def __init__(self) -> None:
        self._cgroup = cgroup_memory_file()
        self._spent: dict[int, float] = {}
        """Processor time of every process of the ranks when it was last seen."""
        psutil.cpu_percent()  # the next call counts from here

    def cgroup_bytes(self) -> int | None:
        """Memory of this control group now."""
        if self._cgroup is None:
            return None
        try:
            return int(self._cgroup.read_bytes())
        except (OSError, ValueError):
            return None

    def sample(self, pids: Iterable[int], resident_bytes: int) -> dict[str, Any]:
        """A row of the telemetry file; `pids` are the ranks' processes, `resident_bytes` what they hold together."""
        memory = psutil.virtual_memory()
        self._spent.update({pid: spent for pid in pids if (spent := cpu_seconds(pid)) > 0})
        return {
            "cpu_percent": psutil.cpu_percent(),
            "memory_used_bytes": memory.total - memory.available,
            "cgroup_memory_bytes": self.cgroup_bytes(),
            "ranks_cpu_seconds": sum(self._spent.values()),
            "ranks_resident_bytes": resident_bytes,
        }


def cpu_seconds(pid: int) -> float:
    """Processor time of a live process so far, user and system; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
