"""Memory, power and strangers, watched from outside the ranks while a trial runs. Torch-free.

The driver sees 1.5 to 4 GiB of context and communication buffers that torch's allocator does not, and only while they are
there: so the supervisor polls, and keeps peaks. What changes slowly goes into a `Timeline`.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from bench.measure.load import HostLoad
from bench.measure.nvml import Device
from bench.measure.timeline import Timeline

FAST_SECONDS, SLOW_SECONDS = 0.05, 0.5
"""Between two readings of memory, and of what is dearer to read: shared pages, power, clocks, processes, the host."""

SEARCH_SHARE = 0.05
"""Largest share of the thread's time for finding the ranks' processes: on a node with thousands of others that is slow."""

WALK_SHARE = 0.01
"""Largest share for shared pages: the kernel walks a rank's whole memory for it, and holds up the rank's own mapping meanwhile."""


class Telemetry:
    """A thread that polls from `__enter__` to `__exit__`. It takes no signals: one would not wake the main thread from a system call.

    `pids` gives the live processes of the ranks; `resident` and `proportional` their sizes. `devices` are those of the trial,
    idle when this is made: their memory in use then is the baseline.
    """

    def __init__(
        self, pids: Callable[[], list[int]], *, resident: Callable[[int], int], proportional: Callable[[int], int | None],
        devices: Sequence[Device] = (), no_devices: str = "the trial ran on the CPU",
    ) -> None:  # fmt: skip
        self._pids, self._resident, self._proportional = pids, resident, proportional
        self._devices, self._no_devices = tuple(devices), no_devices
        self._baseline = {device.uuid: device.used_bytes() for device in devices}
        self._energy = {device.uuid: device.energy_joules() for device in devices}
        self._load, self.timeline = HostLoad(), Timeline()
        self._cgroup_baseline = self._cgroup_peak = self._load.cgroup_bytes()
        self._peak: dict[str, int] = {}
        self._host_peak = self._host_shared_peak = self._samples = 0
        self._found: list[int] = []
        self._search_due = self._walk_due = 0.0
        self._ours: set[int] = set()
        self._strangers: dict[int, int] = {}
        self._sees_ours = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="telemetry", daemon=True)

    def __enter__(self) -> Self:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # which the thread inherits
        try:
            self._thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def strangers(self) -> list[int]:
        """Processes of others that computed on the devices meanwhile.

        Empty where ours were not seen there either: then process numbers of this place and the driver's differ.
        """
        return sorted(pid for pid, seen in self._strangers.items() if seen > 1) if self._sees_ours else []

    def throttles(self) -> list[str]:
        """Why clocks were held down, except by the power cap, which is normal."""
        found = {reason for device in self._devices for reason in self.timeline.summary(device.uuid)["throttles"]}
        return sorted(found - {"power-cap"})

    def observed(self) -> dict[str, Any]:
        """Peaks in bytes and what summarises the timeline, for `Record.observed`; what is null has its reason beside it."""
        return {
            "host_peak_bytes": self._host_peak or None,
            "host_peak_proportional_bytes": self._host_shared_peak or None,
            "cgroup_peak_bytes": self._cgroup_peak,
            "cgroup_baseline_bytes": self._cgroup_baseline,
            "device_memory_peak_bytes": self._peak if self._devices else None,
            "device_memory_baseline_bytes": self._baseline if self._devices else None,
            "device_memory_note": None if self._devices else self._no_devices,
            "devices": {device.uuid: self._device(device) for device in self._devices},
            "strangers": self.strangers() if self._sees_ours else None,
            "strangers_note": self._why_strangers_are_unknown(),
            "telemetry_samples": self._samples,
        }

    def _why_strangers_are_unknown(self) -> str | None:
        if self._sees_ours:
            return None
        if not self._devices:
            return self._no_devices
        refused = next((device.reasons["processes"] for device in self._devices if "processes" in device.reasons), None)
        return refused or "the ranks' own processes were not seen on the devices (another namespace of process numbers, or none came)"

    def _device(self, device: Device) -> dict[str, Any]:
        before, after = self._energy[device.uuid], device.energy_joules()
        energy = None if before is None or after is None else after - before
        return {**self.timeline.summary(device.uuid), "energy_joules": energy, "unknown": dict(device.reasons)}

    def _poll(self) -> None:
        due = 0.0
        while True:
            if slow := time.monotonic() >= due:
                due = time.monotonic() + SLOW_SECONDS
            self._sample(slow)
            if self._stop.wait(FAST_SECONDS):
                return

    def _sample(self, slow: bool) -> None:
        for device in self._devices:
            used, idle = device.used_bytes(), self._baseline[device.uuid]
            if used is not None and idle is not None:
                self._peak[device.uuid] = max(self._peak.get(device.uuid, 0), used - idle)
        resident = sum(map(self._resident, self._search()))
        self._host_peak = max(self._host_peak, resident)
        if (group := self._load.cgroup_bytes()) is not None:
            self._cgroup_peak = max(self._cgroup_peak or 0, group)
        if slow:
            self._sample_slow(resident)
        self._samples += 1

    def _search(self, now: bool = False) -> list[int]:
        """The ranks' processes, looked for anew if that is due."""
        begin = time.monotonic()
        if now or begin >= self._search_due:
            self._found = self._pids()
            self._ours.update(self._found)
            end = time.monotonic()
            self._search_due = end + (end - begin) / SEARCH_SHARE
        return self._found

    def _walk(self, pids: list[int]) -> None:
        begin = time.monotonic()
        if begin >= self._walk_due:
            self._host_shared_peak = max(self._host_shared_peak, sum(self._proportional(pid) or 0 for pid in pids))
            end = time.monotonic()
            self._walk_due = end + (end - begin) / WALK_SHARE

    def _sample_slow(self, resident: int) -> None:
        seen = {pid for device in self._devices for pid in device.processes()}
        pids = self._search(now=True)
        self._sees_ours |= bool(seen & self._ours)
        for pid in seen - self._ours:
            self._strangers[pid] = self._strangers.get(pid, 0) + 1
        self._walk(pids)
        self.timeline.add(self._load.sample(pids, resident), {device.uuid: device.sample() for device in self._devices})
        self.timeline.unknown = {device.uuid: dict(device.reasons) for device in self._devices}
