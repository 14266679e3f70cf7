"""Memory of one rank over the measured loop: the allocator's peaks on a GPU, the resident set of the process."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from bench.record import Memory

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class MemoryWatch:
    """Peaks since `start`.

    Phases reset the allocator's peak (see `PhaseClock`), so `note` is called after every step report: the peak is the largest
    of all that were noted.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._phases: dict[str, int] = {}
        self._allocated = self._reserved = 0
        self._host_is_reset = False

    def start(self) -> None:
        """Forget what was before the loop."""
        self._phases, self._allocated, self._reserved = {}, 0, 0
        self._host_is_reset = _reset_host_peak()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def note(self, phase_peaks: dict[str, int] | None = None) -> None:
        """Take in the peaks of some phases, and the allocator's since its last reset."""
        for phase, peak in (phase_peaks or {}).items():
            self._phases[phase] = max(self._phases.get(phase, 0), peak)
        if self._device.type == "cuda":
            peaks = (torch.cuda.max_memory_allocated(self._device), *self._phases.values())
            self._allocated = max(self._allocated, *peaks)
            self._reserved = max(self._reserved, torch.cuda.max_memory_reserved(self._device))

    def read(self) -> Memory:
        """The memory of the loop so far."""
        notes = [] if self._host_is_reset else ["host_peak_bytes covers the whole process: its peak could not be reset before the loop"]
        if self._device.type != "cuda":
            notes.append("no allocator peaks: the device is a CPU")
            return Memory(host_peak_bytes=host_peak_bytes(), notes=notes)
        if not self._reserved:
            notes.append("no allocator peaks: no step was finished")
        return Memory(
            peak_allocated_bytes=self._allocated or None,
            peak_reserved_bytes=self._reserved or None,
            host_peak_bytes=host_peak_bytes(),
            phases_peak_allocated_bytes=dict(self._phases),
            notes=notes,
        )


def host_peak_bytes() -> int:
    """Largest resident set of this process since its peak was last reset, or since its start."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_host_peak() -> bool:
    """Set the kernel's peak of this process to its present size (Linux: `5` into clear_refs); whether that worked."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
