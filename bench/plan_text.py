"""A plan in words for a terminal, and the lines that a person would paste on each node. Torch-free."""

from __future__ import annotations

import io
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from bench.cell import Cell
from bench.data.sources import resolve
from bench.differences import settings_of, told_apart
from bench.layout import Layout
from bench.matrix import Plan, Skipped
from bench.measure.shape import shape_of
from bench.models.presets import parameter_count
from bench.needs import needs, weights_on_disk_bytes
from bench.peak_memory import peak_moment
from bench.stages.base import SPECS

MOST_ROWS = 100
"""Rows of one stage that are printed; the JSON form has all."""


def plan_text(plan: Plan, notes: Iterable[str] = ()) -> str:
    """The plan in words: what runs, in which blocks, what it needs, `notes` (claims and cost), and what is skipped and why."""
    console = Console(file=io.StringIO(), width=140, highlight=False)
    console.print(
        f"Suite {plan.suite}: {_count(len(plan.cells), 'cell')} x {_count(plan.trials, 'trial')} in {_count(len(plan.blocks), 'block')}; "
        f"{len(plan.skipped)} skipped."
    )
    for model in sorted({cell.model for cell in plan.cells.values()}):
        parameters = parameter_count(model)
        size = f"{parameters:,} parameters" if parameters else "size unknown before it is loaded"
        console.print(Text(f"Model {model}: {size}"))
    for stage in SPECS:
        cells = [cell for cell in plan.cells.values() if cell.stage == stage]
        if cells:
            console.print(_stage_table(stage, cells))
    _print_inputs(console, plan)
    for note in notes:
        console.print(Text(note))
    _print_skipped(console, plan.skipped)
    console.print("More: --format json (every cell and setting), --commands (the lines for each node).")
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _stage_table(stage: str, cells: list[Cell]) -> Table:
    """Cells that differ in the LoRA rank only share a row; beside the strategy stand the settings that tell rows apart which look alike."""
    table = Table(title=SPECS[stage].title, title_justify="left", box=None, pad_edge=False)
    for column in (
        "model",
        "strategy",
        "nodes x processes",
        "precision",
        "batch = micro x ranks x accumulation",
        "launcher",
        "LoRA: states (host's too) / device peak of fullest rank",
    ):
        table.add_column(column)
    looks = [_row(cell) for cell in cells]
    rows: dict[tuple[str, ...], list[str]] = {}
    for cell, look, told in zip(cells, looks, told_apart([settings_of(cell) for cell in cells], looks), strict=True):
        model, strategy, *rest = look
        rows.setdefault((model, f"{strategy} ({told})" if told else strategy, *rest), []).append(_state(cell))
    for row, states in list(rows.items())[:MOST_ROWS]:
        table.add_row(*row, "\n".join(states))
    if len(rows) > MOST_ROWS:
        table.add_row(f"... and {len(rows) - MOST_ROWS} more rows")
    return table


def _row(cell: Cell) -> tuple[str, ...]:
    settings = cell.settings
    batch = f"{cell.step_batch} = {settings.micro_batch} x {cell.data_parallel_size} x {cell.accumulation}"
    shape = f"{cell.nodes} x {cell.processes_per_node}"
    return (cell.model, cell.strategy, shape, settings.precision, batch, f"{settings.launcher}, {settings.device}")


def _state(cell: Cell) -> str:
    """Theory of memory; unknown only where the model's sizes are, which the line on that model says."""
    shape, states = shape_of(cell.model), needs(cell)
    peak = None if shape is None else peak_moment(cell, shape)
    if states is None or peak is None:
        return f"{cell.lora_rank}: unknown"
    return f"{cell.lora_rank}: {decimal(states.state_bytes)} / {decimal(round(peak.bytes))}"


def _print_inputs(console: Console, plan: Plan) -> None:
    for name in plan.data:
        source = resolve(name)
        size = decimal(source.bytes) if source.bytes else "size unknown before it is fetched"
        console.print(Text(f"Data {name}: {size}; licence: {source.licence}"))
    for warm in plan.warm:
        what = f"naive full {warm.cell.stage} run of {warm.cell.model}" if warm.cell else "tokenizer trained on the data"
        console.print(f"Made first: {warm.key} ({what})")
    if disk := weights_on_disk_bytes(plan):
        console.print(f"Disk for weights: {decimal(disk)}")
    on_cuda = [cell for cell in plan.cells.values() if cell.settings.device == "cuda"]
    if on_cuda:
        devices, nodes = max(cell.world_size for cell in on_cuda), max(cell.nodes for cell in on_cuda)
        console.print(
            f"Needs at the most: {_count(devices, 'CUDA device')} on {_count(nodes, 'node')}; `coati-bench doctor` says what is here."
        )


def _print_skipped(console: Console, skipped: Iterable[Skipped]) -> None:
    reasons = Counter((item.cell.stage, item.cell.strategy, item.reason) for item in skipped)
    for (stage, strategy, reason), count in reasons.items():
        console.print(Text(f"Skipped {stage} {strategy} x {count}: {reason}"))


def command_text(plan: Plan, results: Path) -> str:
    """What to type where there is no scheduler: what is made once, then for every cell a line for each node."""
    from bench.launch.command import command_lines

    layout = Layout(results / plan.suite)
    lines = [
        "# Once, on one node, in this folder, which all nodes must share:",
        f"coati-bench plan SUITE --write --results {shlex.quote(str(results))}",
        *(f"coati-bench data fetch {shlex.quote(name)} --manifest {shlex.quote(str(layout.data(name)))}" for name in plan.data),
        *(f"coati-bench warm {shlex.quote(str(layout.warm(warm.key) / 'done.json'))}" for warm in plan.warm),
        "# For each cell, trial 0 (--trial K: another one): a line on each node, in any order, with HEAD set to the address of node 0.",
        "# Node 0 waits for the others and leaves the record.",
    ]
    for cell_id, cell in plan.cells.items():
        counts = (f"{count} {name}{'s' * (count > 1)}" for count, name in ((cell.world_size, "rank"), (cell.nodes, "node")))
        lines.append(f"# {cell_id}: {' on '.join(counts)}")
        lines += command_lines(cell, layout.cell(cell_id))
    return "\n".join(lines)
