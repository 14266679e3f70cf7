"""What earlier trials took, for plans: those of the reference suites and of the suite itself. Torch-free."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from statistics import fmean, median, stdev

from pydantic import ValidationError

from bench.cell import Cell
from bench.errors import RecordError
from bench.layout import Layout
from bench.matrix import Plan
from bench.measure.conditions import conditions
from bench.record import Record, load_record
from bench.report.inventory import Row
from bench.report.metrics import METRICS, NoValue, Trial, primary_metric
from bench.report.windows import job_laps

MOST_TRIALS, MOST_RECORDS = 7, 300
"""Earlier trials of one cell, and of all of one suite, that are read: planning answers at once."""
FEWEST_FOR_CV = 3
"""Trials of a cell from which their coefficient of variation is worth a look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What one earlier trial took."""

    cell: Cell
    device: str
    seconds: float
    loop_seconds: float
    """Of them, the laps of the slowest rank."""
    joules: float | None
    """Null where the devices count no energy."""
    speed: float | None
    """The primary metric of the stage; null where its clock does not count or its window is too short to be had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How much the speed of independent trials of a cell varied on one kind of device."""

    cv: float
    """Standard deviation over mean; median over cells."""
    cells: int
    trials: int
    device: str


def past_trials(plan: Plan, results: Path) -> list[Past]:
    """The earlier ok trials under `results` on the kind of processor that the plan is for."""
    return list(_pasts(_earlier(results, plan.suite), {cell.settings.device for cell in plan.cells.values()}))


def spreads(pasts: Iterable[Past]) -> list[Spread]:
    """The spread on each kind of device of which a cell has 3 timed trials."""
    speeds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for past in pasts:
        if past.speed is not None:
            speeds[past.device][past.cell.cell_id].append(past.speed)
    found = []
    for device, cells in sorted(speeds.items()):
        known = [values for values in cells.values() if len(values) >= FEWEST_FOR_CV]
        if known:
            cv = median(stdev(values) / fmean(values) for values in known)
            found.append(Spread(cv=cv, cells=len(known), trials=sum(map(len, known)), device=device))
    return found


def _earlier(results: Path, suite: str) -> Iterator[Record]:
    """Records under results/references and results/<suite>: the first of each cell, then the second, up to some number."""
    folders = [path.parent for path in sorted((results / "references").glob("*/*/records"))] + [results / suite]
    for layout in map(Layout, folders):
        cells = sorted(path for path in layout.records.glob("*") if path.is_dir())
        trials = zip_longest(*(sorted(cell.glob("*.json"))[:MOST_TRIALS] for cell in cells))
        files = islice((file for rank in trials for file in rank if file), MOST_RECORDS)
        for file in chain(files, sorted(layout.root.glob("warm/*/record.json"))):
            with suppress(RecordError):
                yield load_record(file)


def _pasts(records: Iterable[Record], devices: Collection[str]) -> Iterator[Past]:
    for record in records:
        if record.outcome != "ok" or record.cell.get("device") not in devices:
            continue
        with suppress(KeyError, ValidationError):  # a cell of another version says nothing about this plan
            if past := _past(record, record.parsed_cell):
                yield past


def _past(record: Record, cell: Cell) -> Past | None:
    seconds = record.observed.get("seconds")
    if not isinstance(seconds, (int, float)) or seconds <= 0 or not record.parts:
        return None
    loop = sum(lap.seconds for lap in job_laps(record))
    device = conditions(record).get("device name", "an unnamed device")
    trial = Trial(Row(record, cell, ""))
    return Past(
        cell=cell, device=device, seconds=float(seconds), loop_seconds=min(loop, float(seconds)), joules=_value(trial, "energy_joules"),
        speed=None if trial.clock_problem else _value(trial, primary_metric(cell.stage)),
    )  # fmt: skip


def _value(trial: Trial, name: str) -> float | None:
    try:
        return METRICS[name].compute(trial)
    except NoValue:
        return None
