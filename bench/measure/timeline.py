"""What was read of a trial's devices and host over time: one compact file per trial, and the figures that its record keeps. Torch-free.

The file is gzipped JSON by columns: {schema, started_unix_seconds, seconds: [...], host: {column: [...]}, devices: {uuid: {column: [...]}},
unknown: {uuid: {column: why it is null}}, nodes: {number: the same of every other node}}. `seconds` count from
`started_unix_seconds`; a column's name ends in its unit. Columns that count up (energy, bytes over links, processor time) are as the system
counts them; their differences mean something.
"""

from __future__ import annotations

import gzip
import json
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SCHEMA = "coati-bench/telemetry/1"

Columns = dict[str, list[Any]]


class Timeline:
    """Rows of readings, kept by column."""

    def __init__(self) -> None:
        self.started, self._since = time.time(), time.monotonic()
        self.seconds: list[float] = []
        self.host: Columns = {}
        self.devices: dict[str, Columns] = {}
        self.unknown: dict[str, dict[str, str]] = {}

    def add(self, host: Mapping[str, Any], devices: Mapping[str, Mapping[str, Any]]) -> None:
        """Take in one row; every row has the same columns."""
        self.seconds.append(round(time.monotonic() - self._since, 3))
        _append(self.host, host)
        for uuid, row in devices.items():
            _append(self.devices.setdefault(uuid, {}), row)

    def summary(self, uuid: str) -> dict[str, Any]:
        """Extremes and means of one device; null where nothing was read."""
        columns = self.devices.get(uuid, {})
        power, clock, use = (_known(columns, name) for name in ("power_watts", "sm_clock_megahertz", "utilization_percent"))
        return {
            "power_watts_mean": _mean(power),
            "power_watts_peak": max(power, default=None),
            "sm_clock_megahertz_lowest": min(clock, default=None),
            "sm_clock_megahertz_highest": max(clock, default=None),
            "temperature_celsius_peak": max(_known(columns, "temperature_celsius"), default=None),
            "utilization_percent_mean": _mean(use),
            "pcie": sorted({f"{one}x{other}" for one, other in zip(*_links(columns), strict=True)}),
            "throttles": sorted({reason for text in _known(columns, "throttles") for reason in text.split("+") if reason}),
        }

    def energy_between(self, uuid: str, edges: Sequence[tuple[float, float]]) -> list[float | None]:
        """Joules of one device between pairs of times (seconds since the epoch), interpolated between readings of its counter.

        Null where the counter was not read on both sides of an edge.
        """
        counter = self.devices.get(uuid, {}).get("energy_joules", [])
        known = [(self.started + at, value) for at, value in zip(self.seconds, counter, strict=False) if value is not None]
        values = [(_interpolate(known, begin), _interpolate(known, end)) for begin, end in edges]
        return [None if first is None or last is None else last - first for first, last in values]

    def content(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {
            "started_unix_seconds": self.started, "seconds": self.seconds, "host": self.host, "devices": self.devices,
            "unknown": self.unknown,
        }  # fmt: skip

    @staticmethod
    def of(content: Mapping[str, Any]) -> Timeline:
        """The timeline with this content. Raises KeyError."""
        made = Timeline()
        made.started, made.seconds = content["started_unix_seconds"], content["seconds"]
        made.host, made.devices, made.unknown = content["host"], content["devices"], content["unknown"]
        return made

    def save(self, path: Path, nodes: Mapping[int, Timeline] | None = None) -> None:
        """Write the file, at once; `nodes` are the timelines of other nodes. Raises OSError."""
        content = {"schema": SCHEMA, **self.content()}
        if nodes:
            content["nodes"] = {str(node): timeline.content() for node, timeline in nodes.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.draft")
        try:
            draft.write_bytes(gzip.compress(json.dumps(content, separators=(",", ":")).encode(), mtime=0))
            draft.replace(path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise


def load_timeline(path: Path) -> dict[str, Any]:
    """The content of a telemetry file. Raises OSError, ValueError if it is none."""
    content = json.loads(gzip.decompress(path.read_bytes()))
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: not a telemetry file; seen: schema {content.get('schema')!r}; {SCHEMA!r} would be right")
    return dict(content)


def _append(columns: Columns, row: Mapping[str, Any]) -> None:
    for name, value in row.items():
        columns.setdefault(name, []).append(round(value, 3) if isinstance(value, float) else value)


def _known(columns: Columns, name: str) -> list[Any]:
    return [value for value in columns.get(name, []) if value is not None]


def _links(columns: Columns) -> tuple[list[Any], list[Any]]:
    pairs = zip(columns.get("pcie_generation", []), columns.get("pcie_width", []), strict=True)
    known = [pair for pair in pairs if None not in pair]
    return [pair[0] for pair in known], [pair[1] for pair in known]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _interpolate(known: Sequence[tuple[float, float]], at: float) -> float | None:
    """Value at a time between two readings; None outside of them."""
    place = bisect_left(known, at, key=lambda reading: reading[0])
    if place == len(known) or (place == 0 and known[0][0] != at):
        return None
    if place == 0:
        return known[0][1]
    (before, low), (after, high) = known[place - 1], known[place]
    return low + (high - low) * (at - before) / (after - before)
