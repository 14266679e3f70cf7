"""One trial by hand: of a plan's cell or of a trial file, on this machine or, typed on each of them, on several nodes. Torch-free."""

from __future__ import annotations

import dataclasses
import os
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from bench.cell import cell_to_json
from bench.errors import RecordError, UserError
from bench.launch.alone import alone
from bench.launch.block import INTERRUPTED, planned_trial
from bench.launch.command import PROGRAM
from bench.launch.inputs import forget_weights, kept_record, leave_failed_start
from bench.launch.manual import ManualNodes, Over, Program, Rendezvous, follow, meeting_folder
from bench.launch.parent import ForkParent
from bench.launch.progress import Line, describe
from bench.launch.srun import agents_here
from bench.launch.supervise import run_trial
from bench.launch.watch import Stop, listening
from bench.layout import Layout
from bench.matrix import load_plan, read_cell
from bench.record import Record, first_problem, load_record
from bench.trial import Trial, load_trial

PATIENCE_SECONDS = 300.0
"""Longest wait for other nodes."""
_WHERE = "a trial file lies in results/SUITE/logs/CELL/TRIAL/"


class Wanted(NamedTuple):
    """A trial that somebody asked for."""

    trial: Trial
    record: Path
    of_plan: bool
    problem: str | None = None
    """Why it cannot begin."""


def run_single(
    target: Path, record: Path | None = None, *, number: int = 0, rendezvous: Rendezvous | None = None,
    patience: float = PATIENCE_SECONDS, program: str = PROGRAM, search_path: tuple[str, ...] = (),
) -> int:  # fmt: skip
    """Run one trial. `target` is results/SUITE/cells/CELL.json, whose trial `number` gets its record in the suite; or a trial file, whose
    record goes to `record`, with logs, parts and weights beside it.

    With a `rendezvous` this is one of several nodes, and all of them run this. Returns 0, or 130 when interrupted. Raises UserError for a
    target that is none, RecordError if there is a record already (of a trial file), MachineError if node 0 does not come.
    """
    wanted = _of_plan(target.absolute(), number, record) if target.parent.name == "cells" else _of_file(target, record)
    ranks = Program(program, search_path)
    if rendezvous is not None:
        _check(wanted.trial, rendezvous)
    if not wanted.of_plan and (rendezvous is None or rendezvous.node == 0):
        _check_place(wanted.record)
    with listening() as stop:
        if rendezvous is not None and rendezvous.node > 0:
            return _follow(wanted, rendezvous, stop, patience, ranks)
        return _lead(wanted, rendezvous, stop, patience, ranks)


def read_rendezvous(nodes: int | None, node: int | None, place: str | None) -> Rendezvous | None:
    """Three options as one value; None if none is given. Raises UserError.

    >>> read_rendezvous(3, 1, "n1:29500")
    Rendezvous(nodes=3, node=1, address='n1', port=29500)
    """
    if nodes is None and node is None and place is None:
        return None
    if nodes is None or node is None or place is None:
        seen = ", ".join(
            f"{name} {value}" for name, value in (("--nodes", nodes), ("--node-rank", node), ("--rendezvous", place)) if value is not None
        )
        raise UserError(f"a trial on several nodes needs --nodes, --node-rank and --rendezvous; seen: {seen}")
    address, _, port = place.rpartition(":")
    if not address or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 1 << 16:
        raise UserError(f"--rendezvous {place}: HOST:PORT of node 0 would be right, for example n1:29500")
    if not 0 <= node < nodes:
        raise UserError(f"--node-rank {node}: nodes are counted from 0; 0 to {nodes - 1} would be right with --nodes {nodes}")
    return Rendezvous(nodes, node, address.strip("[]"), int(port))


def _of_plan(target: Path, number: int, record: Path | None) -> Wanted:
    layout = Layout(target.parent.parent)
    plan = load_plan(layout.plan)
    block = next((block for block in plan.blocks if target.stem in block.cells and block.trial == number), None)
    if block is None:
        raise UserError(f"{target}: the plan has no trial {number} of such a cell; `coati-bench plan SUITE --format json` lists the cells")
    if record is not None:
        raise UserError(
            f"--record {record}: the record of a plan's cell has its place in the suite; leave --record away, or name a trial file"
        )
    trial, problem = planned_trial(plan, block, layout, target.stem)
    return Wanted(trial, layout.record(target.stem, number), True, problem)


def _of_file(target: Path, record: Path | None) -> Wanted:
    trial = _read_trial(target)
    if record is None:
        raise UserError(f"{target}: --record says where the record of a trial file goes; seen: no --record")
    record = record.absolute()
    if record.is_dir():
        raise UserError(f"--record {record}: a record is a file; seen: a folder; a path that does not exist yet would be right")
    beside = record.with_suffix("")
    weights = None if trial.save_to is None else f"{beside}-weights"
    return Wanted(dataclasses.replace(trial, work=f"{beside}-logs", save_to=weights), record, False)


def _read_trial(path: Path) -> Trial:
    try:
        trial = load_trial(path)
        return dataclasses.replace(trial, cell=cell_to_json(read_cell(trial.cell)))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {_WHERE}") from None
    except ValidationError as error:
        if any(item["loc"] == ("schema",) for item in error.errors()):
            raise UserError(f"{path}: not a trial file; seen: a record, or a plan; {_WHERE}; `reproduce` takes a record") from None
        raise UserError(f"{path}: not a trial file: {first_problem(error)}; {_WHERE}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a trial file: {error}; {_WHERE}") from None


def _check(trial: Trial, rendezvous: Rendezvous) -> None:
    cell = trial.parsed_cell
    if cell.nodes != rendezvous.nodes:
        raise UserError(f"--nodes {rendezvous.nodes}: the cell {cell.cell_id} is one of {cell.nodes} nodes")
    if cell.settings.launcher == "fork":
        raise UserError(
            f"the cell {cell.cell_id} has `launcher: fork`, whose ranks are all on one machine; `launcher: torchrun` would be right for "
            "several, or no --nodes"
        )


def _check_place(record: Path) -> None:
    """Raises RecordError if there is a record already, UserError if its folder is none or cannot be written."""
    if os.path.lexists(record):
        raise RecordError(f"--record {record}: a record is never rewritten; seen: a file; a path that does not exist yet would be right")
    folder = next(each for each in record.parents if os.path.lexists(each))
    if not folder.is_dir():
        raise UserError(f"--record {record}: its folder cannot be made; seen: the file {folder}; another folder would be right")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--record {record}: nothing can be written to {folder}; a folder that you may write would be right")


def _lead(wanted: Wanted, rendezvous: Rendezvous | None, stop: Stop, patience: float, ranks: Program) -> int:
    """Run the trial, alone or as node 0."""
    trial, path, title = wanted.trial, wanted.record, describe(wanted.trial.parsed_cell)
    with alone(path) as lock, Line(title) as line, ExitStack() as stack:
        if not wanted.of_plan:
            _check_place(path)  # again: another process may have left it while this one waited for the lock
        saved = None if trial.save_to is None else Path(trial.save_to)
        if wanted.of_plan and (kept := kept_record(path, trial, saved)):
            line.end(kept.outcome, kept.reason, kept=True)
            return 0
        if wanted.of_plan and saved is not None:
            forget_weights(saved)
        if rendezvous is not None:
            nodes = stack.enter_context(ManualNodes(trial, rendezvous, stop, patience=patience, program=ranks, keep=(lock,)))
            record = _record(wanted, stop, agents=nodes)
            nodes.conclude(record.outcome, record.reason)
        elif trial.parsed_cell.settings.launcher == "fork":
            log = path.with_name(f"{path.stem}-parent.log") if not wanted.of_plan else Path(f"{trial.work}-parent.log")
            parent = ForkParent(log, program=ranks.name, preload=(), search_path=ranks.search_path, keep=(lock,))
            record = _record(wanted, stop, parent=stack.enter_context(parent))
        else:
            agents = agents_here(trial.parsed_cell.nodes, program=ranks.name, search_path=ranks.search_path, keep=(lock,))
            record = _record(wanted, stop, agents=agents)
        line.end(record.outcome, record.reason)
    return INTERRUPTED if record.outcome == "cancelled" else 0


def _record(wanted: Wanted, stop: Stop, **launch: object) -> Record:
    if wanted.problem:
        return leave_failed_start(wanted.trial, wanted.record, wanted.problem)
    return run_trial(wanted.trial, wanted.record, stop=stop, **launch)  # type: ignore[arg-type]


def _follow(wanted: Wanted, rendezvous: Rendezvous, stop: Stop, patience: float, ranks: Program) -> int:
    """Be one of the other nodes."""

    def finished() -> Over | None:
        try:
            record = load_record(wanted.record)
        except RecordError:
            return None
        return Over(record.outcome, record.reason) if record.fingerprint == wanted.trial.fingerprint else None

    title = f"{describe(wanted.trial.parsed_cell)} node {rendezvous.node}"
    with alone(meeting_folder(Path(wanted.trial.work)) / f"node{rendezvous.node}") as lock, Line(title) as line:
        over = follow(wanted.trial, rendezvous, stop, patience=patience, finished=finished, program=ranks, keep=(lock,))
        line.end(over.outcome, over.reason)
    return INTERRUPTED if over.outcome == "cancelled" else 0
