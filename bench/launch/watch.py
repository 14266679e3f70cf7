"""Watching one try at a trial from outside: exit codes, heartbeats, the clock and interrupts. Torch-free."""

from __future__ import annotations

import json
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal, NamedTuple

from bench.launch.job import LINGER_SECONDS, Job
from bench.launch.processes import send
from bench.launch.rank import DUMP_SIGNAL, RankProcess, read_process
from bench.trial import Trial

POLL_SECONDS = 0.1
CANCELLING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a trial as `cancelled`; a scheduler that preempts sends SIGTERM."""

_DUMP_SECONDS = 0.3


class Stop:
    """Whether somebody wants the supervisor to stop, and by which signal."""

    def __init__(self) -> None:
        # no Event: its lock is taken again by a handler that interrupts `wait`, which then hangs; this queue is reentrant
        self._asks: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.asked: str | None = None
        self.asked_at: float | None = None
        """When, on the monotonic clock."""

    def ask(self, reason: str) -> None:
        """Want it to stop; a signal handler may call this."""
        self.asked_at = self.asked_at or time.monotonic()
        self.asked = self.asked or reason
        self._asks.put(None)

    def wait(self, seconds: float) -> bool:
        """Sleep, at most until somebody asks; whether somebody has."""
        if self.asked:
            return True
        try:
            self._asks.get(timeout=seconds)
        except queue.Empty:
            return False
        self._asks.put(None)  # for whoever else waits
        return True


@contextmanager
def listening() -> Iterator[Stop]:
    """Turn the cancelling signals into a `Stop` while the context lasts (in the main thread; elsewhere nothing is caught)."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _: FrameType | None) -> None:
        stop.ask(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in CANCELLING}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Place(NamedTuple):
    """Where a rank said it was, by its last heartbeat."""

    phase: str = "start"
    step: int = 0

    def __str__(self) -> str:
        return f"phase {self.phase}, step {self.step}"


End = Literal["ended", "failed", "timeout", "silent", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """How the watching of one try came to its end, before anything was killed."""

    end: End
    """All ranks ended; one failed; the time was over; a rank was silent; somebody asked."""
    seconds: float
    """From the start to the decision."""
    detection_seconds: float | None = None
    """From the first sign (end of the failed rank or agent, last beat of the silent rank or node, limit, signal) to the decision."""
    silent_rank: int | None = None
    places: dict[int, Place] = field(default_factory=dict)
    """Rank -> where it was."""
    processes: dict[int, RankProcess] = field(default_factory=dict)
    """Rank -> its process at the decision: who has ended by now has done so by itself."""


class Heartbeats:
    """Beats of all ranks. Silence is timed on this machine's monotonic clock, so that a file server's clock does not matter."""

    def __init__(self, trial: Trial, now: float) -> None:
        self._paths = {rank: trial.heartbeat_path(rank) for rank in range(trial.parsed_cell.world_size)}
        self._beats: dict[int, tuple[float, int]] = dict.fromkeys(self._paths, (now, 0))

    def silent(self, now: float, without: set[int]) -> tuple[int, float]:
        """The rank (those in `without` left out) that has been silent longest, and for how long; (-1, 0) if none is left."""
        for rank, path in self._paths.items():
            if (beat := _modified(path)) != self._beats[rank][1]:
                self._beats[rank] = (now, beat)
        silences = {rank: now - since for rank, (since, _) in self._beats.items() if rank not in without}
        return max(silences.items(), key=lambda item: item[1], default=(-1, 0.0))

    def places(self) -> dict[int, Place]:
        """Where each rank that ever beat said it was."""
        return {rank: place for rank, path in self._paths.items() if (place := _place(path))}


def watch(job: Job, trial: Trial, stop: Stop) -> Watched:
    """Wait until the ranks have ended, or until they should be ended."""
    started = time.monotonic()
    beats = Heartbeats(trial, started)
    failed_at: float | None = None
    while True:
        ended = job.wait(POLL_SECONDS)
        now = time.monotonic()
        processes = {rank: note for rank in range(trial.parsed_cell.world_size) if (note := read_process(Path(trial.work), rank))}
        failures = [note.ended for note in processes.values() if note.code and note.ended]
        if failures and failed_at is None:
            failed_at = now
        silent, silence = beats.silent(now, {rank for rank, note in processes.items() if note.code is not None})
        end: End | None = "ended" if ended else "cancelled" if stop.asked else None
        sign = job.first_sign()
        detection = max(0.0, time.time() - min(failures)) if failures else None if sign is None else now - sign
        if end == "cancelled" and stop.asked_at is not None:
            detection = now - stop.asked_at
        elif end is None and failed_at is not None:
            end = "failed" if now > failed_at + LINGER_SECONDS else None
        elif end is None and now - started > trial.limits.timeout_seconds:
            end, detection = "timeout", now - started - trial.limits.timeout_seconds
        elif end is None and silence > trial.limits.heartbeat_seconds:
            end, detection = "silent", silence
        if end is not None:
            return Watched(
                end=end, seconds=now - started, detection_seconds=detection, silent_rank=silent if end == "silent" else None,
                places=beats.places(), processes=processes,
            )  # fmt: skip


def dump_stacks(processes: dict[int, RankProcess]) -> None:
    """Have the ranks that still run on this machine write their stacks into their logs."""
    here = socket.gethostname()
    pids = [note.pid for note in processes.values() if note.code is None and note.hostname == here]
    send(pids, DUMP_SIGNAL)
    if pids:
        time.sleep(_DUMP_SECONDS)


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _place(path: Path) -> Place | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Place(str(content.get("phase", "start")), int(content.get("step", 0)))
    except (OSError, ValueError, TypeError, AttributeError):
        return None
