"""The clocks of a rank: laps by the host's monotonic clock, phases by device events.

A lap's edges are the only places where the device is synchronised; phases are read from events once the device has passed
them (on the CPU: from the host's clock).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

OTHER = "other"
"""Phase of the time that no phase claims."""


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all work given to it; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class LapClock:
    """Seconds between two synchronised edges."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start: float | None = None
        self.opened = 0.0
        """When the lap was opened, in seconds since the epoch: tells which readings of the devices belong to it, times nothing."""

    def start(self) -> None:
        """Open a lap at a synchronised edge."""
        synchronise(self._device)
        self.opened = time.time()
        self._start = time.perf_counter()

    def stop(self) -> float:
        """Close the lap at a synchronised edge and return its seconds."""
        assert self._start is not None, "stop() without start()"
        synchronise(self._device)
        seconds = time.perf_counter() - self._start
        self._start = None
        return seconds


class PhaseClock:
    """Seconds and allocator peaks by phase between `start()` and `read()`.

    Phases do not nest; one that is entered again adds up. On a GPU `read` waits for the last event: call it where a
    synchronised edge follows anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any, Any]] = []
        self._open: str | None = None
        self._start: Any = None
        self.peaks: dict[str, int] = {}

    def start(self) -> None:
        """Begin anew."""
        self._marks, self.peaks = [], {}
        self._start = self._mark()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is inside as the phase `name`."""
        assert self._open is None, f"phase {name} inside phase {self._open}"
        self._open = name
        begin = self._mark()
        try:
            yield
        finally:
            self._open = None
        self._marks.append((name, begin, self._mark()))
        self._note_peak(name)

    def read(self) -> dict[str, float]:
        """Seconds by phase since `start`, the residual as `other`."""
        total = self._between(self._start, self._mark())
        seconds: dict[str, float] = {}
        for name, begin, end in self._marks:
            seconds[name] = seconds.get(name, 0.0) + self._between(begin, end)
        return {**seconds, OTHER: max(0.0, total - sum(seconds.values()))}

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, begin: Any, end: Any) -> float:
        if self._device.type != "cuda":
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000.0

    def _note_peak(self, name: str) -> None:
        """Peak of the allocator since the last phase ended (on a GPU); the allocator counts on the host, without waiting."""
        if self._device.type == "cuda":
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)
