"""Blocks: one repetition of a comparison set, in its order, on one allocation. Torch-free.

A block can be killed at any point and run again: finished trials are kept, and the block's own file comes last. Its trials run one
after the other, or in as many lanes as `limits.side_by_side` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path

from bench.container.overlay import overlay_input
from bench.errors import UserError
from bench.launch.allotment import Allotment
from bench.launch.alone import alone
from bench.launch.command import PROGRAM
from bench.launch.inputs import data_inputs, forget_weights, image_input, kept_record, leave_failed_start, start_inputs
from bench.launch.job import Launcher
from bench.launch.lanes import in_lanes
from bench.launch.parent import PRELOAD, ForkParent
from bench.launch.progress import Line, titles
from bench.launch.srun import agents_here
from bench.launch.supervise import run_trial
from bench.launch.warm import run_warm
from bench.launch.watch import Stop, listening
from bench.layout import Layout
from bench.matrix import Block, Plan, load_plan
from bench.measure.allocations import allocations
from bench.record import Record, write_json
from bench.shared_disk import patiently
from bench.trial import Trial, make_trial

__all__ = ["BLOCK_SCHEMA", "INTERRUPTED", "planned_trial", "run_block", "run_warm"]

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
        logs = [layout.root / "logs" / f"{block.block_id}-parent{lane or ''}.log" for lane in range(plan.limits.side_by_side)]
        parents = [
            stack.enter_context(ForkParent(log, program=program, preload=preload, search_path=search_path, keep=(lock,))) for log in logs
        ]
        names = titles(plan)
        allotments = repeat(Allotment.here(), plan.limits.side_by_side)
        agents = agents_here(block.nodes, program=program, search_path=search_path, keep=(lock,))

        def run(number: int, parent: ForkParent) -> Record:
            cell_id = block.cells[number]
            title = f"[{number + 1}/{len(block.cells)}] {names[cell_id]}"
            return _run_one(plan, block, layout, cell_id, title, parent=parent, agents=agents, stop=heard, allotments=allotments)

        seen = in_lanes(range(len(block.cells)), parents, run, heard)
        if heard.asked:
            print(f"interrupted by {heard.asked}; run it again to go on", flush=True)
            return INTERRUPTED
        content = {
            "schema": BLOCK_SCHEMA, "block_id": block.block_id, "records": [_entry(record, block, layout) for record in seen],
            "allocations": [found.as_json() for found in allocations(seen)],
        }  # fmt: skip
        patiently(lambda: write_json(content, target), target, "the list of its records", heard.wait)
    return 0


def _entry(record: Record, block: Block, layout: Layout) -> dict[str, object]:
    path = layout.record(record.cell_id, block.trial).relative_to(layout.root)
    return {"cell_id": record.cell_id, "trial": block.trial, "outcome": record.outcome, "path": str(path)}


def _run_one(
    plan: Plan,
    block: Block,
    layout: Layout,
    cell_id: str,
    title: str,
    *,
    parent: ForkParent,
    agents: Launcher,
    stop: Stop,
    allotments: Iterator[Allotment | None],
) -> Record:
    """The record of one trial of the block: the kept one, that of a failed start, or a new one.

    `allotments`: the allocation's, for the trials that begin first and so have all of it; each takes one.
    """
    trial, problem = planned_trial(plan, block, layout, cell_id)
    saved = None if trial.save_to is None else Path(trial.save_to)
    path = layout.record(cell_id, block.trial)
    with Line(title, alone=not plan.limits.shares_devices) as line:
        record = kept = kept_record(path, trial, saved)
        if record is None:
            if saved is not None:
                forget_weights(saved)
            if problem:
                record = leave_failed_start(trial, path, problem)
            else:
                allotment = next(allotments, None)
                resumes = trial.parsed_cell.settings.save_every is not None
                record = run_trial(trial, path, parent=parent, agents=agents, stop=stop, allotment=None if resumes else allotment)
        line.end(record.outcome, record.reason, kept=kept is not None)
    return record


def planned_trial(plan: Plan, block: Block, layout: Layout, cell_id: str) -> tuple[Trial, str | None]:
    """The block's trial of a cell, and why it cannot begin, if so. Raises UserError for what was not made yet."""
    cell, number = plan.cells[cell_id], block.trial
    starts = start_inputs(layout, block.starts.get(cell_id, {}), number)
    saved = layout.chained(cell_id, number) if cell_id in block.saves else None
    trial = make_trial(
        cell, number, data=data_inputs(layout, cell), starts=starts.inputs, image=image_input(cell), overlay=overlay_input(cell),
        save_to=None if saved is None else str(saved), work=str(layout.logs(cell_id, number)), limits=plan.limits,
    )  # fmt: skip
    return trial, starts.problem
