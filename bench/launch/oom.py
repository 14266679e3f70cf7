"""Evidence that the kernel killed a process for want of host memory. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path("/")


def oom_kills(root: Path = ROOT) -> int | None:
    """How many processes the kernel has killed for want of memory, as far as it says so; None if it does not.

    The counter of this process's memory cgroup (v2: memory.events, v1: memory.oom_control, Linux documentation
    cgroup-v2.rst and memory.txt) and that of the whole kernel (/proc/vmstat, oom_kill) are added: only a rise counts.
    """
    found = [_count(path, r"^oom_kill (\d+)$") for path in (*_cgroup_files(root), root / "proc/vmstat")]
    counts = [count for count in found if count is not None]
    return sum(counts) if counts else None


def _cgroup_files(root: Path) -> list[Path]:
    files = []
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files.append(root / "sys/fs/cgroup" / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            files.append(root / "sys/fs/cgroup/memory" / path.lstrip("/") / "memory.oom_control")
    return files


def _count(path: Path, pattern: str) -> int | None:
    try:
        found = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) if found else None
