"""Blocks: one repetition of a comparison set, in its order, on one allocation; and single trials by hand. Torch-free.

A block can be killed at any point and run again: finished trials are kept, and the block's own file comes last.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bench.errors import UserError
from bench.launch.alone import alone
from bench.launch.command import PROGRAM, Agents
from bench.launch.inputs import data_inputs, forget_weights, image_input, kept_record, leave_failed_start, start_inputs
from bench.launch.parent import PRELOAD, ForkParent
from bench.launch.progress import Line, describe
from bench.launch.supervise import run_trial
from bench.launch.warm import run_warm
from bench.launch.watch import Stop, listening
from bench.layout import Layout
from bench.matrix import Block, Plan, load_plan
from bench.record import Record, write_json
from bench.trial import Trial, load_trial, make_trial

__all__ = ["BLOCK_SCHEMA", "INTERRUPTED", "run_block", "run_single", "run_warm"]

BLOCK_SCHEMA = "coati-bench/block/1"
INTERRUPTED = 130


def run_block(
    target: Path, *, program: str = PROGRAM, search_path: tuple[str, ...] = (), preload: tuple[str, ...] = PRELOAD, stop: Stop | None = None
) -> int:
    """Make results/<suite>/blocks/<block>.json: run every trial of the block that has no valid record yet.

    Returns 0 when every trial has left a record, 130 when interrupted. Raises UserError if the plan has no such block or
    something was not made yet, MachineError if records cannot be written.
    """
    target = target.absolute()
    layout = Layout(target.parent.parent)
    plan = load_plan(layout.plan)
    block = next((block for block in plan.blocks if block.block_id == target.stem), None)
    if block is None:
        raise UserError(f"{target}: the plan has no such block; seen: {target.stem}; one of {', '.join(it.block_id for it in plan.blocks)}")
    with ExitStack() as stack:
        lock = stack.enter_context(alone(target))
        heard = stop or stack.enter_context(listening())
        log = layout.root / "logs" / f"{block.block_id}-parent.log"
        parent = stack.enter_context(ForkParent(log, program=program, preload=preload, search_path=search_path, keep=(lock,)))
        agents = Agents(program=program, search_path=search_path, keep=(lock,))
        records = []
        for number, cell_id in enumerate(block.cells, 1):
            title = f"[{number}/{len(block.cells)}] {describe(plan.cells[cell_id])}"
            record = _run_one(plan, block, layout, cell_id, title, parent=parent, agents=agents, stop=heard)
            if heard.asked:
                print(f"interrupted by {heard.asked}; run it again to go on", flush=True)
                return INTERRUPTED
            path = layout.record(cell_id, block.trial).relative_to(layout.root)
            records.append({"cell_id": cell_id, "trial": block.trial, "outcome": record.outcome, "path": str(path)})
    write_json({"schema": BLOCK_SCHEMA, "block_id": block.block_id, "records": records}, target)
    return 0


def _run_one(plan: Plan, block: Block, layout: Layout, cell_id: str, title: str, **launch: Any) -> Record:
    """The record of one trial of the block: the kept one, that of a failed start, or a new one."""
    cell, number = plan.cells[cell_id], block.trial
    starts = start_inputs(layout, block.starts.get(cell_id, {}), number)
    saved = layout.chained(cell_id, number) if cell_id in block.saves else None
    trial = make_trial(
        cell, number, data=data_inputs(layout, cell), starts=starts.inputs, image=image_input(cell),
        save_to=None if saved is None else str(saved), work=str(layout.logs(cell_id, number)), limits=plan.limits,
    )  # fmt: skip
    path = layout.record(cell_id, number)
    with Line(title) as line:
        record = kept = kept_record(path, trial, saved)
        if record is None:
            if saved is not None:
                forget_weights(saved)
            record = leave_failed_start(trial, path, starts.problem) if starts.problem else run_trial(trial, path, **launch)
        line.end(record.outcome, record.reason, kept=kept is not None)
    return record


def run_single(trial_file: Path, record_path: Path, *, program: str = PROGRAM, search_path: tuple[str, ...] = ()) -> int:
    """Run the trial in a file by hand; logs, parts and weights go beside its record. Returns 0, or 130 when interrupted.

    Raises UserError if the file is no trial, RecordError if there is a record already.
    """
    trial = _read_trial(trial_file)
    record_path = record_path.absolute()
    beside = record_path.with_suffix("")
    weights = None if trial.save_to is None else f"{beside}-weights"
    trial = dataclasses.replace(trial, work=f"{beside}-logs", save_to=weights)
    with alone(record_path) as lock, Line(describe(trial.parsed_cell)) as line:
        agents = Agents(program=program, search_path=search_path, keep=(lock,))
        if trial.parsed_cell.settings.launcher == "fork":
            log = Path(f"{beside}-parent.log")
            with ForkParent(log, program=program, preload=(), search_path=search_path, keep=(lock,)) as parent:
                record = run_trial(trial, record_path, parent=parent, agents=agents)
        else:
            record = run_trial(trial, record_path, agents=agents)
        line.end(record.outcome, record.reason)
    return INTERRUPTED if record.outcome == "cancelled" else 0


def _read_trial(path: Path) -> Trial:
    try:
        return load_trial(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; a trial file lies in results/SUITE/logs/CELL/TRIAL/") from None
    except (ValidationError, ValueError) as error:
        raise UserError(f"{path}: not a trial file: {error}") from None
