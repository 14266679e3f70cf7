"""From what was seen of a try to its outcome. Pure: no clock, no processes, no files. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from bench.launch.processes import signal_name
from bench.launch.rank import RankProcess
from bench.launch.watch import Place, Watched
from bench.record import Outcome, Part
from bench.suite import Limits

OOM_EXIT_CODE = 75
SIGKILL, SIGTERM = -9, -15

NETWORK = re.compile(
    r"address already in use|EADDRINUSE|connection (reset|refused|closed|timed out|aborted)|broken pipe|connectFullMesh|no route to host"
    r"|network is unreachable|RendezvousConnectionError|RendezvousTimeoutError|DistNetworkError|DistStoreError|TCPStore"
    r"|timed out waiting for clients|failed to connect to|ncclSystemError|ncclRemoteError|NCCL.*(socket|remote process|connect)"
    r"|could not resolve|Name or service not known|Temporary failure in name resolution",
    re.IGNORECASE,
)
"""What logs of a broken launch or link say: torch's TCPStore and rendezvous, gloo, NCCL, the C library."""

HOST_MEMORY = re.compile(r"^MemoryError|can't allocate memory|Cannot allocate memory|std::bad_alloc", re.MULTILINE)
DEVICE_MEMORY = re.compile(r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory", re.MULTILINE)


class Verdict(NamedTuple):
    """How a try ended; `incident` if it should be tried again."""

    outcome: Outcome
    reason: str | None = None
    incident: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """All that is known of one try, after its end."""

    world_size: int
    limits: Limits
    watched: Watched
    cancelled: str | None = None
    """The signal by which somebody asked to stop."""
    parts: dict[int, Part] = field(default_factory=dict)
    logs: dict[int, str] = field(default_factory=dict)
    """Rank -> the last lines of its log."""
    trouble: str | None = None
    """What went wrong in the launcher itself."""
    launcher_log: str = ""
    oom_kills: int = 0
    """Processes that the kernel killed for want of memory meanwhile."""
    space: str | None = None
    """That the disk of the work folder is full or read-only."""

    @property
    def failures(self) -> list[RankProcess]:
        """Ranks that failed before anything was ended by us, the first first."""
        failed = [process for process in self.watched.processes.values() if process.code]
        return sorted(failed, key=lambda process: process.ended or float("inf"))

    @property
    def missing(self) -> list[int]:
        """Ranks without a part."""
        return [rank for rank in range(self.world_size) if rank not in self.parts]

    def place(self, rank: int) -> Place:
        """Where a rank was last, by its part or its last heartbeat."""
        part = self.parts.get(rank)
        return Place(part.phase, part.step) if part else self.watched.places.get(rank, Place())

    def told(self, rank: int) -> str:
        """What a rank's part gives as reason, else the last lines of its log."""
        part = self.parts.get(rank)
        return (part.reason if part and part.reason else None) or self.logs.get(rank, "")


def classify(seen: Seen) -> Verdict:
    """The outcome, by the first of these that holds: what was asked, what ranks know, what the kernel did, what was watched."""
    if seen.cancelled:
        return Verdict("cancelled", f"the supervisor got {seen.cancelled}")
    for rule in (_said, _device_memory, _host_memory, _overdue, _failure, _trouble, _incomplete):
        if verdict := rule(seen):
            return verdict
    return Verdict("ok")


def _said(seen: Seen) -> Verdict | None:
    """Outcomes that a rank states itself; the gravest first."""
    for outcome in ("invalid", "oom", "diverged"):
        for rank, part in sorted(seen.parts.items()):
            if part.outcome == outcome:
                return Verdict(part.outcome, f"rank {rank}, {seen.place(rank)}: {part.reason or outcome}")
    return None


def _device_memory(seen: Seen) -> Verdict | None:
    for failure in seen.failures:
        if failure.code == OOM_EXIT_CODE or (failure.rank not in seen.parts and DEVICE_MEMORY.search(seen.logs.get(failure.rank, ""))):
            return Verdict("oom", _failed(seen, failure))
    return None


def _host_memory(seen: Seen) -> Verdict | None:
    for failure in seen.failures:
        if failure.code == SIGKILL and seen.oom_kills:
            return Verdict("oom", f"host memory: the kernel killed rank {failure.rank} ({seen.place(failure.rank)})")
        if failure.rank not in seen.parts and HOST_MEMORY.search(seen.logs.get(failure.rank, "")):
            return Verdict("oom", f"host memory: {_failed(seen, failure)}")
    if seen.oom_kills and seen.trouble and seen.watched.end == "ended":
        return Verdict("oom", f"host memory: {seen.trouble} while the kernel was killing for want of memory")
    return None


def _overdue(seen: Seen) -> Verdict | None:
    watched = seen.watched
    if watched.end == "silent" and watched.silent_rank is not None:
        silent = f"rank {watched.silent_rank} was silent for more than {seen.limits.heartbeat_seconds:g} s"
        return Verdict("timeout", f"{silent} ({seen.place(watched.silent_rank)}){_without_space(seen)}")
    if watched.end == "timeout":
        running = [rank for rank in range(seen.world_size) if rank not in watched.processes or watched.processes[rank].code is None]
        where = "; ".join(f"rank {rank}: {seen.place(rank)}" for rank in running[:4])
        return Verdict("timeout", f"longer than {seen.limits.timeout_seconds:g} s ({where})")
    return None


def _failure(seen: Seen) -> Verdict | None:
    if not seen.failures:
        return None
    texts = [f"{seen.told(failure.rank)}\n{seen.logs.get(failure.rank, '')}" for failure in seen.failures if failure.code != SIGTERM]
    broken_link = bool(texts) and all(NETWORK.search(text) for text in texts)
    return Verdict("error", _failed(seen, seen.failures[0]) + _without_space(seen), broken_link and not _stepped(seen))


def _trouble(seen: Seen) -> Verdict | None:
    if not seen.trouble:
        return None
    log = f":\n{seen.launcher_log}" if seen.launcher_log else ""
    return Verdict("error", f"{seen.trouble}{_without_space(seen)}{log}", incident=not _stepped(seen))


def _incomplete(seen: Seen) -> Verdict | None:
    for rank, part in sorted(seen.parts.items()):
        if part.outcome != "ok":
            return Verdict("error", f"rank {rank}, {seen.place(rank)}: {part.reason or part.outcome}")
    if seen.missing:
        ranks = ", ".join(map(str, seen.missing))
        return Verdict("error", f"no part was left by rank {ranks}{_without_space(seen)}")
    return None


def _failed(seen: Seen, failure: RankProcess) -> str:
    assert failure.code is not None
    told = seen.told(failure.rank)
    return f"rank {failure.rank} ended with {signal_name(failure.code)} ({seen.place(failure.rank)})" + (f":\n{told}" if told else "")


def _stepped(seen: Seen) -> bool:
    """Whether any rank has finished a step: from then on, a broken link is the trial's own end."""
    return any(seen.place(rank).step > 0 for rank in range(seen.world_size))


def _without_space(seen: Seen) -> str:
    return f"; {seen.space}" if seen.space else ""
