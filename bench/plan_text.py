"""A plan in words for a terminal, and the lines that a person would paste on each node. Torch-free."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.cell import Cell
from bench.data.sources import resolve
from bench.layout import Layout
from bench.matrix import Plan, Skipped
from bench.needs import needs, weights_on_disk_bytes
from bench.stages.base import SPECS

GIB = 1 << 30


def plan_text(plan: Plan) -> str:
    """The plan in words: what runs, in which blocks, what it needs, and what is skipped and why."""
    console = Console(file=io.StringIO(), width=120, highlight=False, soft_wrap=True)
    trials = len(plan.cells) * plan.trials
    console.print(f"Suite {plan.suite}: {len(plan.cells)} cells x {plan.trials} trials = {trials} trials in {len(plan.blocks)} blocks; "
                  f"{len(plan.skipped)} skipped.")  # fmt: skip
    for stage in SPECS:
        cells = [cell for cell in plan.cells.values() if cell.stage == stage]
        if cells:
            console.print(_stage_table(stage, cells))
    _print_inputs(console, plan)
    _print_skipped(console, plan.skipped)
    console.print("More: --format json (every cell and setting), --commands (the lines for each node).")
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _stage_table(stage: str, cells: list[Cell]) -> Table:
    table = Table(title=SPECS[stage].title, title_justify="left", box=None, pad_edge=False)
    for column in ("model", "strategy", "LoRA", "nodes x processes", "precision", "batch", "launcher", "state per rank"):
        table.add_column(column)
    rows = Counter(_row(cell) for cell in cells)
    for row, count in rows.items():
        table.add_row(*row, "" if count == 1 else f"x{count}")
    return table


def _row(cell: Cell) -> tuple[str, ...]:
    settings, theory = cell.settings, needs(cell)
    batch = f"{cell.step_batch} = {settings.micro_batch} x {cell.world_size} ranks x {cell.accumulation}"
    state = f"{theory.state_bytes / GIB:.2f} GiB ({theory.parameters / 1e6:,.0f} M parameters)" if theory else "unknown"
    shape = f"{cell.nodes} x {cell.processes_per_node}"
    return (cell.model, cell.strategy, str(cell.lora_rank), shape, settings.precision, batch, f"{settings.launcher}, {settings.device}", state)


def _print_inputs(console: Console, plan: Plan) -> None:
    for name in plan.data:
        source = resolve(name)
        size = f"{source.bytes / 1e6:,.1f} MB" if source.bytes else "size unknown before it is fetched"
        console.print(Text(f"Data {name}: {size}; licence: {source.licence}"))
    for warm in plan.warm:
        what = f"naive full {warm.cell.stage} run of {warm.cell.model}" if warm.cell else "tokenizer trained on the data"
        console.print(f"Made first: {warm.key} ({what})")
    if disk := weights_on_disk_bytes(plan):
        console.print(f"Disk for weights: {disk / GIB:.2f} GiB")
    devices = max(cell.world_size for cell in plan.cells.values())
    if any(cell.settings.device == "cuda" for cell in plan.cells.values()):
        nodes = max(cell.nodes for cell in plan.cells.values())
        console.print(f"Needs: {devices} CUDA device{'s' * (devices > 1)} on {nodes} node{'s' * (nodes > 1)} at the most; see `coati-bench doctor`.")


def _print_skipped(console: Console, skipped: Iterable[Skipped]) -> None:
    reasons = Counter((item.cell.stage, item.cell.strategy, item.reason) for item in skipped)
    for (stage, strategy, reason), count in reasons.items():
        console.print(Text(f"Skipped {stage} {strategy} x {count}: {reason}"))


def command_text(plan: Plan, results: Path) -> str:
    """For every cell, the lines to paste on each node, one node a line."""
    from bench.launch.command import command_lines

    layout = Layout(results / plan.suite)
    lines = []
    for cell_id, cell in plan.cells.items():
        lines.append(f"# {cell_id}: {cell.world_size} ranks on {cell.nodes} node{'s' * (cell.nodes > 1)}")
        lines += command_lines(cell, layout.logs(cell_id, 0) / "trial.json")
    return "\n".join(lines)
