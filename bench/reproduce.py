"""What the verb `reproduce` does: rebuild a trial from its record, run it again, and judge the result. Torch-free."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from bench.errors import MachineError, RecordError, UserError
from bench.launch.reproduce import rebuild, run_again
from bench.record import Record, load_record
from bench.report.inventory import Row
from bench.report.reproduction import judge_reproduction


def reproduce(record: Path, *, anyway: bool = False, results: Path = Path("results")) -> int:
    """Run the trial of a record again; return 0 if it gave the same, 1 if not, 130 when interrupted.

    The new record goes to results/reproduced/. Raises UserError where something is missing, or is not as it was and `anyway`
    is false; RecordError for a file that is no record; MachineError where no idle device was to be had.
    """
    old = load_record(record)
    rebuilt = rebuild(old, record, results)
    if rebuilt.trial is None:
        other = ("besides, not the same here:", *(f"  {item}" for item in rebuilt.differences)) if rebuilt.differences else ()
        raise UserError(_refusal(f"{record}: cannot be run again; missing here:", rebuilt.missing, other))
    if rebuilt.differences and not anyway:
        hint = ("the same would be right; --anyway runs it under these conditions",)
        raise UserError(_refusal(f"{record}: not the same here; seen:", rebuilt.differences, hint))
    for difference in rebuilt.differences:
        print(f"not the same: {difference}", flush=True)
    code, path = run_again(rebuilt.trial, results)
    if code:
        return code
    new = load_record(path)
    if new.outcome == "busy":
        raise MachineError(f"the trial could not be run again: {new.reason}")
    verdict = judge_reproduction(_row(new, path), _row(old, record), _siblings(old, record))
    print(f"{path}\n{verdict.text}", flush=True)
    return 0 if verdict.reproduced else 1


def _refusal(title: str, items: tuple[str, ...], rest: tuple[str, ...] = ()) -> str:
    return "\n".join([title, *(f"  {item}" for item in items), *rest])


def _row(record: Record, path: Path) -> Row:
    return Row(record, record.parsed_cell, path.name)


def _siblings(record: Record, path: Path) -> list[Row]:
    """The records of the same cell that lie beside it, itself among them."""
    found: list[Record] = []
    for file in sorted(path.absolute().parent.glob("*.json")):
        with suppress(RecordError):
            found.append(load_record(file))
    return [_row(it, path) for it in found if it.cell_id == record.cell_id]
