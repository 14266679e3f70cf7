"""From a plan's names to files: the data and starts of a trial, and what to do about records that are there already. Torch-free."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from bench.cell import Cell
from bench.checkpoint import checkpoint_sha256
from bench.container.runtime import find_image
from bench.data.manifest import load_manifest
from bench.errors import CheckpointError, RecordError, UserError
from bench.launch.assemble import assemble, make_provenance
from bench.launch.classify import Verdict
from bench.launch.environment import rank_environment
from bench.launch.supervise import leave
from bench.layout import Layout
from bench.matrix import cell_data
from bench.measure.provenance import utc_now
from bench.record import Input, Record, load_record
from bench.trial import Trial

IMAGE = "container"
"""The name of the image among a record's inputs."""


class Starts(NamedTuple):
    """What a trial begins from, and why it cannot begin, if so."""

    inputs: list[Input]
    problem: str | None = None


def data_inputs(layout: Layout, cell: Cell) -> list[Input]:
    """The data that `cell` reads, by its manifests. Raises DataError if one is not there."""
    return [load_manifest(layout.data(name)).as_input() for name in cell_data(cell)]


def image_input(cell: Cell) -> Input | None:
    """The image that the cell's ranks run in, or None. Raises UserError for one that is not there or was changed."""
    setting = cell.settings.container
    if setting == "none":
        return None
    found = find_image(setting)
    facts = {
        "digest": found.digest, "environment_digest": found.environment_digest, "environment_committed": found.committed,
        "package_sha256": found.package, **({"kernels_sha256": found.kernels.removeprefix("sha256:")} if found.kernels else {}),
    }  # fmt: skip
    return Input(name=IMAGE, path=str(found.file), sha256=found.digest.removeprefix("sha256:"), facts=facts)


def start_inputs(layout: Layout, starts: dict[str, str], trial: int) -> Starts:
    """What `starts` (role -> warm start's key, `cell:<cell id>` or `path:<folder>`) stands for.

    A failed one is told as a problem. Raises UserError for one that was not made yet, CheckpointError for a folder without weights.
    """
    inputs, problems = [], []
    for role, name in starts.items():
        kind, _, rest = name.partition(":")
        if kind == "path" and rest:
            folder, problem = Path(rest), None
        elif kind == "cell" and rest:
            folder, problem = layout.chained(rest, trial), _chained_problem(layout, rest, trial)
        else:
            folder, problem = layout.warm(name) / "weights", _warm_problem(layout, name)
        if problem:
            problems.append(f"{role}: {problem}")
        else:
            inputs.append(Input(name=role, path=str(folder), sha256=checkpoint_sha256(folder), facts={"made_by": rest or name}))
    return Starts(inputs, f"what it starts from failed: {'; '.join(problems)}" if problems else None)


def _warm_problem(layout: Layout, key: str) -> str | None:
    done = read_done(layout.warm(key) / "done.json")
    if done is None:
        target = layout.warm(key) / "done.json"
        raise UserError(f"{target}: the warm start {key} was not made yet; `coati-bench warm {target}` makes it")
    return None if done["outcome"] == "ok" else f"the warm start {key} ended as {done['outcome']}: {done.get('reason')}"


def _chained_problem(layout: Layout, cell_id: str, trial: int) -> str | None:
    try:
        record = load_record(layout.record(cell_id, trial))
    except RecordError as error:
        raise UserError(f"trial {trial} of {cell_id}, whose weights are continued, has no record: {error}; run its block first") from None
    return None if record.outcome == "ok" else f"trial {trial} of {cell_id}, whose weights it continues, ended as {record.outcome}"


def read_done(path: Path) -> dict[str, Any] | None:
    """The content of a done.json, or None where there is none, or none that can be used."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "outcome" in content else None


def kept_record(path: Path, trial: Trial, saved: Path | None) -> Record | None:
    """The record of this very trial, if it is there and, where the trial saves weights (`saved`), those are too.

    Any other file in its place is moved into the trial's work folder (never rewritten, never deleted).
    """
    if not path.exists():
        return None
    try:
        record = load_record(path)
    except RecordError:
        record = None
    if record and record.fingerprint == trial.fingerprint and (saved is None or record.outcome != "ok" or has_weights(saved)):
        return record
    set_aside(path, Path(trial.work))
    return None


def set_aside(path: Path, folder: Path) -> None:
    """Move a record out of the way, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path.rename(folder / f"set-aside{1 + len(list(folder.glob('set-aside*.json')))}.json")


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds a complete checkpoint; it comes into being at once, so a folder is a complete one."""
    try:
        checkpoint_sha256(folder)
    except (CheckpointError, OSError):
        return False
    return True


def forget_weights(folder: Path) -> None:
    """Remove the weights that an earlier run of the same trial left, so that nothing continues them by mistake."""
    shutil.rmtree(folder, ignore_errors=True)


def leave_failed_start(trial: Trial, path: Path, problem: str) -> Record:
    """Write the record of a trial that could not begin."""
    now, settings = utc_now(), trial.parsed_cell.settings
    provenance = make_provenance(trial, command=[], variables=rank_environment(), started=now, ended=now)
    nodes = trial.parsed_cell.nodes > 1
    record = assemble(trial, Verdict("error", problem), launcher=settings.launcher, simulated_nodes=nodes, attempt=1, provenance=provenance)
    leave(record, path, Path(trial.work))
    return record
