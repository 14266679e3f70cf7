"""Whole process trees on Linux: who belongs to one, and its end. Torch-free; standard library only, since every rank imports it.

Two nets catch what a process group misses. *Descendants*: a subreaper (`become_subreaper`) inherits orphans, so a process that
was forked twice, started a session of its own or dropped its environment is still found below it. *Marker*: a variable in the
environment, which forked children share, finds what is left when the subreaper itself is gone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

MARKER = "COATI_BENCH_MARKER"
"""Environment variable whose value all processes of one launch share."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def become_subreaper() -> None:
    """Orphans below this process become its children rather than init's (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Get signal `number` when the thread that started this process ends; at once if `parent` is not its parent any more."""
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def process_table() -> dict[int, int]:
    """Every live process (zombies left out) and its parent."""
    table = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 (ten times a second)
        if name.isdigit() and (fields := _stat(int(name))) and fields[0] not in "ZX":
            table[int(name)] = int(fields[1])
    return table


def descendants(roots: Iterable[int]) -> list[int]:
    """Live processes below `roots`, the roots left out."""
    children = defaultdict(list)
    for pid, parent in process_table().items():
        children[parent].append(pid)
    found: list[int] = []
    queue = list(roots)
    while queue:
        below = children.pop(queue.pop(), [])
        found += below
        queue += below
    return found


def marked(marker: str) -> list[int]:
    """Live processes, this one left out, that were started with `marker` in their environment, and forks of such."""
    wanted = f"{MARKER}={marker}".encode()
    found = []
    for pid in process_table():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if pid != os.getpid() and wanted in environment.split(b"\0"):
            found.append(pid)
    return found


def alive(pid: int) -> bool:
    """Whether `pid` runs (a zombie does not)."""
    fields = _stat(pid)
    return fields is not None and fields[0] not in "ZX"


def resident_bytes(pid: int) -> int:
    """Resident set of a process, shared pages included; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def proportional_bytes(pid: int) -> int | None:
    """Resident set with shared pages divided among those that share them (PSS); None if it cannot be read."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_bytes().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(b"Pss:")), None)


def end_processes(find: Callable[[], list[int]], grace: float, patience: float = 10.0) -> list[int]:
    """End all that `find` returns: SIGTERM, `grace` seconds, then SIGKILL until a search comes back empty.

    Returns who had to be killed. Gives up after `patience` seconds more (a process in an uninterruptible sleep).
    """
    send(find(), signal.SIGTERM)
    _wait_until(lambda: not find(), grace)
    killed: set[int] = set()
    deadline = time.monotonic() + patience
    while (found := find()) and time.monotonic() < deadline:
        killed.update(found)
        send(found, signal.SIGKILL)
        time.sleep(0.02)
    return sorted(killed)


def send(pids: Iterable[int], number: int) -> None:
    """Send a signal to processes; those that are gone already are no error."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def reap_children() -> dict[int, int]:
    """Collect every child that has ended, orphans that came here included; pid -> exit code (negative for a signal)."""
    codes: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return codes
        if pid == 0:
            return codes
        codes[pid] = os.waitstatus_to_exitcode(status)


def signal_name(code: int) -> str:
    """An exit code for people: `exit code 3`, or the signal's name where it is negative.

    >>> signal_name(3), signal_name(-9)
    ('exit code 3', 'SIGKILL')
    """
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _stat(pid: int) -> list[str] | None:
    """State, parent and what follows in /proc/PID/stat, after the name (which may hold anything)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True
