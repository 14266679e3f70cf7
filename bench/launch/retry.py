"""Set finished records aside, so that the next run repeats their trials. Nothing is deleted."""

from __future__ import annotations

from pathlib import Path

from bench.errors import RecordError, UserError
from bench.layout import Layout
from bench.matrix import make_plan
from bench.record import OUTCOMES, load_record


def set_aside(suite: Path, outcomes: set[str], results: Path) -> int:
    """Move the records of `suite` with one of `outcomes` into their trial's log folder; return how many.

    The blocks that list them are removed, so that Snakemake runs those blocks again (finished trials are skipped there).
    Raises UserError for an unknown outcome.
    """
    if unknown := sorted(outcomes - set(OUTCOMES)):
        raise UserError(f"--outcome {','.join(unknown)}: no such outcome; choose among {', '.join(OUTCOMES)}")
    made = make_plan(suite)
    layout = Layout(results / made.suite)
    count = 0
    for block in made.blocks:
        moved = sum(_set_aside(layout, cell_id, block.trial, outcomes) for cell_id in block.cells)
        if moved:
            layout.block(block.block_id).unlink(missing_ok=True)
        count += moved
    return count


def _set_aside(layout: Layout, cell_id: str, trial: int, outcomes: set[str]) -> bool:
    path = layout.record(cell_id, trial)
    try:
        outcome = load_record(path).outcome if path.exists() else None
    except RecordError:
        return False
    if outcome not in outcomes:
        return False
    folder = layout.logs(cell_id, trial)
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + len(list(folder.glob("set-aside*.json")))
    path.rename(folder / f"set-aside{number}.json")
    return True
