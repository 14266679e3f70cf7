"""Memory, power and strangers, watched from outside the ranks while a trial runs. Torch-free.

The driver sees 1.5 to 4 GiB of context and communication buffers that torch's allocator does not, and only while they are
there: so the supervisor polls, and keeps peaks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from bench.measure.nvml import Device

FAST_SECONDS, SLOW_SECONDS = 0.05, 1.0
"""Between two readings of memory, and of what is dearer to read: shared pages, power, clocks, processes."""

SEARCH_SHARE = 0.05
"""Largest share of the thread's time for finding the ranks' processes: on a node with thousands of others that is slow."""

WALK_SHARE = 0.01
"""Largest share for shared pages: the kernel walks a rank's whole memory for it, and holds up the rank's own mapping meanwhile."""


class Telemetry:
    """A thread that polls from `__enter__` to `__exit__`.

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
        self._peak: dict[str, int] = {}
        self._slow: dict[str, _Slow] = {device.uuid: _Slow() for device in devices}
        self._host_peak = self._host_shared_peak = self._samples = 0
        self._found: list[int] = []
        self._search_due = self._walk_due = 0.0
        self._ours: set[int] = set()
        self._strangers: dict[int, int] = {}
        self._sees_ours = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="telemetry", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
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
        return sorted({reason for slow in self._slow.values() for reason in slow.throttles} - {"power-cap"})

    def observed(self) -> dict[str, Any]:
        """Peaks in bytes, for `Record.observed`."""
        return {
            "host_peak_bytes": self._host_peak or None,
            "host_peak_proportional_bytes": self._host_shared_peak or None,
            "device_memory_peak_bytes": self._peak if self._devices else None,
            "device_memory_baseline_bytes": self._baseline if self._devices else None,
            "device_memory_note": None if self._devices else self._no_devices,
            "devices": {device.uuid: self._device(device) for device in self._devices},
            "telemetry_samples": self._samples,
        }

    def _device(self, device: Device) -> dict[str, Any]:
        before, after = self._energy[device.uuid], device.energy_joules()
        energy = None if before is None or after is None else after - before
        return {**self._slow[device.uuid].summary(), "energy_joules": energy}

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
        if slow:
            self._sample_slow()
        self._host_peak = max(self._host_peak, sum(map(self._resident, self._search())))
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

    def _sample_slow(self) -> None:
        seen = {pid for device in self._devices for pid in device.processes()}
        pids = self._search(now=True)
        self._sees_ours |= bool(seen & self._ours)
        for pid in seen - self._ours:
            self._strangers[pid] = self._strangers.get(pid, 0) + 1
        self._walk(pids)
        for device in self._devices:
            self._slow[device.uuid].add(device)


class _Slow:
    """Extremes of one device's slow readings."""

    def __init__(self) -> None:
        self._values: tuple[list[float], ...] = ([], [], [])
        self.throttles: set[str] = set()

    def add(self, device: Device) -> None:
        for values, value in zip(self._values, (device.power_watts(), device.clock_megahertz(), device.temperature_celsius()), strict=True):
            if value is not None:
                values.append(value)
        self.throttles.update(device.throttles())

    def summary(self) -> dict[str, Any]:
        power, clock, temperature = self._values
        return {
            "power_watts_mean": sum(power) / len(power) if power else None,
            "power_watts_peak": max(power, default=None),
            "sm_clock_megahertz_lowest": min(clock, default=None),
            "sm_clock_megahertz_highest": max(clock, default=None),
            "temperature_celsius_peak": max(temperature, default=None),
            "throttles": sorted(self.throttles),
        }
