"""What is read of devices and hosts while a trial runs, on every node, and what of it the record keeps. Torch-free.

The supervisor reads the node that it is on. On any other node the process that waits for the node's first rank does, and leaves
`readings<node>.json` in the work folder, which all nodes share.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from bench.launch.processes import descendants, proportional_bytes, resident_bytes
from bench.launch.rank import read_process
from bench.measure.nvml import all_devices, visible
from bench.measure.telemetry import Telemetry
from bench.measure.timeline import Timeline
from bench.record import Part, write_json
from bench.trial import Trial, load_trial

_OF_A_NODE = (
    "host_peak_bytes", "host_peak_proportional_bytes", "cgroup_peak_bytes", "cgroup_baseline_bytes", "strangers", "strangers_note",
    "telemetry_samples",
)  # fmt: skip


class Readings(NamedTuple):
    """Of one node."""

    observed: dict[str, Any]
    throttles: list[str]
    timeline: Timeline

    @staticmethod
    def of(telemetry: Telemetry) -> Readings:
        """What a telemetry that has ended gives."""
        return Readings(telemetry.observed(), telemetry.throttles(), telemetry.timeline)


def readings_path(work: Path, node: int) -> Path:
    """Where another node than the supervisor's leaves its readings."""
    return work / f"readings{node}.json"


@contextmanager
def reading_node(trial_file: Path, node: int) -> Iterator[None]:
    """Read this node while the context lasts, and leave the readings; for the process that waits for the node's first rank.

    What cannot be written is no reason to end a rank.
    """
    cell = load_trial(trial_file).parsed_cell
    agent, devices = os.getppid(), visible(all_devices()) if cell.settings.device == "cuda" else []
    with Telemetry(lambda: descendants([agent]), resident=resident_bytes, proportional=proportional_bytes, devices=devices) as telemetry:
        yield
    found = Readings.of(telemetry)
    content = {"observed": found.observed, "throttles": found.throttles, "timeline": found.timeline.content()}
    with suppress(OSError):
        write_json(content, readings_path(trial_file.parent, node))


def other_nodes(trial: Trial) -> dict[int, Readings | None]:
    """Readings of the nodes whose ranks ran on another host, None where a node left none."""
    work, cell, here = Path(trial.work), trial.parsed_cell, socket.gethostname()
    notes = {rank: read_process(work, rank) for rank in range(cell.world_size)}
    nodes = sorted({rank // cell.processes_per_node for rank, note in notes.items() if note and note.hostname != here})
    return {node: _load(readings_path(work, node)) for node in nodes}


def _load(path: Path) -> Readings | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Readings(content["observed"], content["throttles"], Timeline.of(content["timeline"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def observe(own: Readings, others: dict[int, Readings | None], parts: dict[int, Part], path: Path) -> dict[str, Any]:
    """What the record keeps of all nodes' readings; the telemetry file is written to `path`.

    Devices of all nodes stand side by side; host figures are those of the supervisor's node, the others' are under `nodes`.
    """
    there = {node: found for node, found in others.items() if found is not None}
    observed = dict(own.observed)
    add_lap_energy(observed["devices"], own.timeline, [part for part in parts.values() if part.node not in others])
    for node, found in there.items():
        add_lap_energy(found.observed["devices"], found.timeline, [part for part in parts.values() if part.node == node])
        for name in ("devices", "device_memory_peak_bytes", "device_memory_baseline_bytes"):
            if found.observed[name] is not None:
                observed[name] = {**(observed[name] or {}), **found.observed[name]}
    if others:
        observed["nodes"] = {str(node): {name: found.observed[name] for name in _OF_A_NODE} for node, found in there.items()}
        observed["nodes_without_telemetry"] = [node for node, found in others.items() if found is None]
    return observed | _keep(own.timeline, {node: found.timeline for node, found in there.items()}, path)


def add_lap_energy(devices: dict[str, dict[str, Any]], timeline: Timeline, parts: list[Part]) -> None:
    """Add the energy of every lap to what was observed of a node's devices; laps begin and end as its lowest rank's did."""
    lead = min(parts, key=lambda part: part.rank, default=None)
    edges = [(lap.opened, lap.opened + lap.seconds) for lap in lead.laps if lap.opened is not None] if lead else []
    for uuid, found in devices.items():
        found["laps_energy_joules"] = timeline.energy_between(uuid, edges)


def foreign_processes(own: Readings, others: dict[int, Readings | None]) -> list[str]:
    """Processes of somebody else that computed on the trial's devices meanwhile."""
    there = {f"{pid} of node {node}" for node, found in others.items() if found for pid in found.observed["strangers"] or []}
    return [*map(str, own.observed["strangers"] or []), *sorted(there)]


def flags(own: Readings, others: dict[int, Readings | None]) -> list[str]:
    """What a reader must know of the conditions: throttling, and where foreign processes could not be told."""
    known = [own, *(found for found in others.values() if found)]
    found = [f"throttled: {reason}" for reason in sorted({reason for one in known for reason in one.throttles})]
    blind = any(one.observed["devices"] and one.observed["strangers"] is None for one in known)
    return found + ["foreign processes unknown"] * blind


def _keep(own: Timeline, others: dict[int, Timeline], path: Path) -> dict[str, Any]:
    """Write the telemetry file; a full disk is no reason to lose the record."""
    try:
        own.save(path, others)
    except OSError as error:
        return {"telemetry_file": None, "telemetry_note": f"the telemetry file could not be written: {error.strerror}"}
    return {"telemetry_file": f"{path.parent.name}/{path.name}"}
