"""What there is to report on: records, what the plan expects beside them, and files that are no records. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from bench.cell import SETTINGS, Cell, canonical_json, cell_from_json
from bench.errors import RecordError, UserError
from bench.matrix import Plan, load_plan
from bench.measure.conditions import conditions
from bench.record import Record, load_record
from bench.strategies.base import all_strategies

STAGE_ORDER = {stage: index for index, stage in enumerate(SETTINGS)}
BASELINE = "naive"
"""The strategy that every other one is compared with."""


ODD = (TypeError, AttributeError, LookupError, ValueError, ArithmeticError)
"""What code meets in a record whose free fields are of other forms than this version writes."""
LARGEST = 2**63


@dataclass(frozen=True, slots=True)
class Row:
    """A valid record, its cell as a value, and where it lies below the records folder."""

    record: Record
    cell: Cell
    file: str


@dataclass(frozen=True, slots=True)
class BadFile:
    """A JSON file that cannot be reported on, and why."""

    file: str
    problem: str


@dataclass(frozen=True, slots=True)
class Missing:
    """A trial that the plan has and the records lack."""

    cell: Cell
    trial: int


@dataclass(frozen=True, slots=True)
class Inventory:
    """Everything that the report shows is drawn from here."""

    rows: tuple[Row, ...]
    bad_files: tuple[BadFile, ...]
    plan: Plan | None

    @property
    def missing(self) -> tuple[Missing, ...]:
        """Planned trials without a record, in the order of the tables."""
        if self.plan is None:
            return ()
        there = {(row.record.cell_id, row.record.trial) for row in self.rows}
        cells = sorted(self.plan.cells.items(), key=lambda item: cell_order(item[1]))
        return tuple(Missing(cell, trial) for key, cell in cells for trial in range(self.plan.trials) if (key, trial) not in there)

    @property
    def title(self) -> str:
        """Name of the suite, as far as it is known."""
        return self.plan.suite if self.plan else "records"


def cell_order(cell: Cell) -> tuple[object, ...]:
    """Sort key of tables and figures: stage, model, LoRA rank, ranks, then `naive` before the other strategies."""
    return (
        STAGE_ORDER[cell.stage],
        cell.model,
        cell.lora_rank,
        cell.nodes,
        cell.processes_per_node,
        cell.strategy != BASELINE,
        cell.strategy,
        cell.cell_id,
    )


def trial_of(row: Row) -> Hashable:
    """What may be there once: a trial of a cell."""
    return row.record.cell_id, row.record.trial


def read_inventory(
    records: Path, plan: Path | None = None, keep: Callable[[Row], Row] = lambda row: row, once: Callable[[Row], Hashable] = trial_of
) -> Inventory:
    """Read every `*.json` below `records`. Raises UserError if the folder is missing or holds no JSON file at all.

    `keep` gets each valid row as it was read and returns what is kept of it: many thousand records do not fit into memory whole. Of rows
    for which `once` says the same, the first is kept; the others count as bad files.
    """
    if records.exists() and not records.is_dir():
        raise UserError(f"{records}: no folder of records; seen: a file; give the folder, for example results/quickstart/records")
    if not records.is_dir():
        raise UserError(f"{records}: there is no such folder; give the folder of records, for example results/quickstart/records")
    files = sorted(path for path in records.rglob("*.json") if not path.name.startswith("."))
    if not files and plan is None:
        raise UserError(f"{records}: no records; seen: no *.json file below it; run a suite first (`coati-bench run SUITE`)")
    rows, bad_files = _read_rows(records, files, keep, once)
    if not rows and not bad_files:
        raise UserError(f"{records}: no records; seen: 0 of the planned trials; run the suite first (`coati-bench run SUITE`)")
    return Inventory(tuple(sorted(rows, key=_row_order)), tuple(bad_files), load_plan(plan) if plan else None)


def _row_order(row: Row) -> tuple[object, ...]:
    return (*cell_order(row.cell), row.record.trial, row.file)


def _read_rows(
    records: Path, files: Iterable[Path], keep: Callable[[Row], Row], once: Callable[[Row], Hashable]
) -> tuple[list[Row], list[BadFile]]:
    rows: list[Row] = []
    bad_files: list[BadFile] = []
    first: dict[Hashable, str] = {}
    for path in files:
        name = path.relative_to(records).as_posix()
        row = _read_row(path, name)
        if isinstance(row, BadFile):
            bad_files.append(row)
            continue
        known = first.setdefault(once(row), name)
        if known == name:
            try:
                rows.append(keep(row))
            except ODD as error:
                bad_files.append(BadFile(name, f"not a record that can be worked out: {type(error).__name__}: {error}"))
        else:
            bad_files.append(BadFile(name, f"repeats trial {row.record.trial} of the cell in {known}, which is the one shown"))
    return rows, bad_files


@lru_cache(maxsize=10_000)
def _cell(text: str) -> tuple[Cell, str]:
    """The cell that `text` writes, and its id; the trials of one cell share them."""
    cell = cell_from_json(json.loads(text))
    return cell, cell.cell_id


def _read_row(path: Path, name: str) -> Row | BadFile:
    try:
        record = load_record(path)
    except RecordError as error:
        return BadFile(name, str(error).replace(str(path), name))
    try:
        cell, cell_id = _cell(canonical_json(record.cell))
        conditions(record)
    except KeyError:
        return BadFile(name, f"not a record; unknown stage: {record.cell.get('stage')!r}")
    except ValidationError as error:
        first = error.errors()[0]
        return BadFile(name, f"not a record; its cell at {'.'.join(map(str, first['loc']))}: {first['msg']}")
    except ODD as error:
        return BadFile(name, f"not a record; what it says of its cell or machines has another form: {error}")
    row = Row(record, cell, name)
    return _problem_of(row, cell_id) or row


def _problem_of(row: Row, cell_id: str) -> BadFile | None:
    """What a record contradicts: itself, as its cell has the id `cell_id`, or what this version knows."""
    if (said := row.record.cell_id) != cell_id:
        return BadFile(row.file, f"says it is of the cell {said}, and its cell is {cell_id}; changed by hand, or of another version")
    if row.cell.strategy not in all_strategies():
        return BadFile(row.file, f"unknown strategy {row.cell.strategy!r}, which another version may have; seen in its cell")
    if max(row.record.trial, row.record.seed, row.record.attempt) >= LARGEST:
        return BadFile(row.file, "a number of its trial, seed or attempt is larger than 64 bits")
    return None
