"""From parts to a record. Torch-free."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bench.cell import Cell
from bench.launch.classify import Verdict
from bench.launch.rank import node_path
from bench.measure.node import scheduler_job
from bench.measure.provenance import environment, image_flags, machine, source, versions
from bench.models.presets import PRESETS
from bench.record import SIDE_BY_SIDE, Part, Record
from bench.strategies.base import all_strategies
from bench.strategies.locked import not_locked
from bench.trial import Trial

WARM_UP_LAPS = {"ppo": 2}
"""Laps that the report drops at least: iterations of PPO; 5 of the other stages."""

LEAST_STEPS, LEAST_SECONDS = {"ppo": 5}, {"ppo": 120.0}
"""Shortest window that may be published; 30 steps and 60 s for the other stages."""


def assemble(
    trial: Trial,
    verdict: Verdict,
    *,
    launcher: str,
    simulated_nodes: bool,
    attempt: int = 1,
    parts: list[Part] | None = None,
    observed: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    more_flags: list[str] | None = None,
) -> Record:
    """The record of a trial; `parts` may lack ranks, which are then named in its flags."""
    cell, parts = trial.parsed_cell, sorted(parts or [], key=lambda part: part.rank)
    strategy = all_strategies()[cell.strategy]
    return Record(
        cell=trial.cell,
        cell_id=cell.cell_id,
        fingerprint=trial.fingerprint,
        trial=trial.trial,
        seed=trial.seed,
        attempt=attempt,
        launcher=launcher,
        emulated=strategy.emulated(cell),
        simulated_nodes=simulated_nodes,
        resumed_step=resumed_step(parts),
        outcome=verdict.outcome,
        reason=verdict.reason,
        flags=[*flags(trial, parts), *image_flags(provenance or {}), *(more_flags or [])],
        inputs=[*trial.data, *trial.starts],
        parts=parts,
        observed=observed or {},
        provenance=provenance or {},
    )


def flags(trial: Trial, parts: list[Part]) -> list[str]:
    """What a reader must know: old semantics, forced settings, other trials beside it, missing ranks, too short a window."""
    cell = trial.parsed_cell
    found = [f"semantics: {switch}" for switch in cell.semantics_switches]
    if trial.overlay is not None:
        found.append(f"modified: {trial.overlay.facts['package']} {trial.overlay.sha256[:12]}")
    if (step := resumed_step(parts)) is not None:
        found.append(f"resumed: step {step}")
    found += [f"forced: {key}={value}" for key, value in sorted(all_strategies()[cell.strategy].forced_settings(cell).items())]
    if trial.limits.shares_devices:
        found.append(SIDE_BY_SIDE)
    missing = sorted(set(range(cell.world_size)) - {part.rank for part in parts})
    if missing:
        found.append(f"missing ranks: {', '.join(map(str, missing))}")
    if parts and is_indicative(cell.stage, parts):
        found.append("indicative")
    return found


def resumed_step(parts: list[Part]) -> int | None:
    """Step that a stopped trial went on from; None for one that ran in one go."""
    return max((part.resumed_step for part in parts if part.resumed_step is not None), default=None)


def is_indicative(stage: str, parts: list[Part]) -> bool:
    """Whether the window after the warm-up is too short to be published (steps of the shortest rank, seconds of the slowest)."""
    skip = WARM_UP_LAPS.get(stage, 5)
    steps = min(sum(lap.steps for lap in part.laps[skip:]) for part in parts)
    seconds = max(sum(lap.seconds for lap in part.laps[skip:]) for part in parts)
    return steps < LEAST_STEPS.get(stage, 30) or seconds < LEAST_SECONDS.get(stage, 60.0)


def make_provenance(trial: Trial, *, command: list[str], variables: dict[str, str], started: str, ended: str) -> dict[str, Any]:
    """Versions and which are not the locks', source, every node, image, command, environment, model, scheduler's job, UTC start and end.

    Nodes tell of themselves; where none did (ranks that were forked here, or never started), this machine is described.
    """
    notes = {node: note for node in range(trial.parsed_cell.nodes) if (note := _node(Path(trial.work), node))}
    first: dict[str, Any] = notes[min(notes)] if notes else {"versions": versions(), "environment": environment(variables)}
    return {
        "versions": first["versions"],
        "not_locked": not_locked(first["versions"]),
        "source": source(),
        "machines": [{"node": node, **note["machine"]} for node, note in notes.items()] or [{"node": 0, **machine()}],
        "missing_nodes": [node for node in range(trial.parsed_cell.nodes) if notes and node not in notes],
        "node_differences": node_differences(notes),
        "image": None if trial.image is None else {"file": Path(trial.image.path).name, **trial.image.facts},
        "overlay": None if trial.overlay is None else {**trial.overlay.facts, "tree_sha256": trial.overlay.sha256},
        "command": command,
        "environment": first["environment"],
        "model": _model(trial.parsed_cell),
        "scheduler": scheduler_job(os.environ),
        "started": started,
        "ended": ended,
    }


def node_differences(notes: dict[int, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Versions and recorded variables of a node that are not those of the first one, by the node's number; nothing differs: {}.

    Which devices a node sees is its own affair.
    """
    found: dict[str, dict[str, Any]] = {}
    first = notes[min(notes)] if notes else {}
    for node, note in notes.items():
        for kind in ("versions", "environment"):
            names = (first[kind].keys() | note[kind].keys()) - {"CUDA_VISIBLE_DEVICES"}
            if other := {name: note[kind].get(name) for name in sorted(names) if note[kind].get(name) != first[kind].get(name)}:
                found.setdefault(str(node), {})[kind] = other
    return found


def share_a_machine(trial: Trial) -> bool:
    """Whether two of the trial's nodes run on one kernel by what they noted of themselves: then they are no nodes to be timed."""
    notes = (_node(Path(trial.work), node) for node in range(trial.parsed_cell.nodes))
    boots = [boot for note in notes if note and (boot := note["machine"].get("boot_id"))]
    return len(set(boots)) < len(boots)


def _model(cell: Cell) -> dict[str, str | None]:
    """Where the model's shape and weights come from: name, `weights`, and the pinned repository of published ones."""
    preset = PRESETS.get(cell.model) if cell.settings.weights == "pretrained" else None
    return {
        "name": cell.model,
        "weights": cell.settings.weights,
        "hub_id": preset.hub_id if preset else None,
        "revision": preset.revision if preset else None,
    }


def _node(work: Path, node: int) -> dict[str, Any] | None:
    try:
        note = json.loads(node_path(work, node).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) and {"machine", "versions", "environment"} <= note.keys() else None
