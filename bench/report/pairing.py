"""Two folders of records as cells with their trials, and which cells of the two are the same. Torch-free."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from bench.cell import AXES, Cell, canonical_json, cell_to_json, identity
from bench.errors import UserError
from bench.layout import Layout
from bench.measure.conditions import Difference
from bench.report.inventory import BadFile, Row, cell_order, read_inventory
from bench.report.metrics import METRICS, NoValue, Trial, primary_metric
from bench.report.parity import NOTHING_TRAINED, Parity, judge, trained_nothing
from bench.report.ranking import MEMORY
from bench.report.statistics import Summary

SETTINGS_OF_THE_PLACE = ("device", "launcher", "precision")
"""Settings in which cells may differ and still be the same comparison, if the user allows it."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a comparison needs of one trial."""

    row: Row
    """The record without its laps, so that sets of many thousand fit into memory."""
    values: Mapping[str, float | None]
    """The metrics that are compared."""
    clock_problem: str | None
    """Why its times and memory mean nothing, or None."""
    indicative: bool
    """Whether its window is too short to publish."""
    struck: str | None = None
    """Why it may not be ranked: its losses are other than those of `naive` in its set, or its numbers cannot be true."""

    @property
    def outcome(self) -> str:
        """How it ended."""
        return self.row.record.outcome


@dataclass(frozen=True, slots=True)
class Side:
    """The trials of one cell in one set, by number."""

    trials: Mapping[int, Measured]

    @property
    def ok(self) -> dict[int, Measured]:
        """Those that ended well."""
        return {number: trial for number, trial in self.trials.items() if trial.outcome == "ok"}

    @property
    def clock_problem(self) -> str | None:
        """Why its times and memory mean nothing, or None."""
        return next((trial.clock_problem for trial in self.trials.values() if trial.clock_problem), None)

    @property
    def struck(self) -> str | None:
        """Why one of the ok trials is struck, or None."""
        return next((trial.struck for trial in self.ok.values() if trial.struck), None)

    def summary(self, name: str) -> Summary | None:
        """A metric over the ok trials; None where none of them has it."""
        known = tuple(value for trial in self.ok.values() if (value := trial.values[name]) is not None)
        return Summary(known) if known else None

    @property
    def outcomes(self) -> str:
        """How its trials ended.

        >>> Side({}).outcomes
        'no trial'
        """
        counts = Counter(trial.outcome for trial in self.trials.values())
        return ", ".join(f"{name} × {count}" if count > 1 else name for name, count in sorted(counts.items())) or "no trial"


Cells = dict[str, list[Measured]]
"""The trials of each cell, by its identity."""
Pairing = tuple[list[tuple[str, str]], list[str], list[str]]
"""Identities of the cells that are the same, then those that only the first set has, and only the second."""


def read_cells(folder: Path) -> tuple[Cells, tuple[BadFile, ...]]:
    """The trials of each cell by its identity; a suite's folder stands for its records. Raises UserError where there is none."""
    records = Layout(folder).records
    found: dict[str, Measured] = {}

    def keep(row: Row) -> Row:
        found[row.file] = _measured(row)
        return found[row.file].row

    inventory = read_inventory(records if records.is_dir() else folder, keep=keep)
    parities = judge(inventory.rows)
    cells: Cells = defaultdict(list)
    for row in inventory.rows:
        cells[canonical_json(identity(row.cell))].append(_judged(found[row.file], parities.get(row.file)))
    if not cells:
        first = inventory.bad_files[0]
        problem = first.problem.removeprefix(f"{first.file}: ")
        raise UserError(f"{folder}: no valid record; seen: {len(inventory.bad_files)} other JSON files, first {first.file}: {problem}")
    return cells, inventory.bad_files


def _measured(row: Row) -> Measured:
    trial = Trial(row)
    names = (primary_metric(row.cell.stage), "step_seconds", *MEMORY, final_metric(row.cell.stage))
    parts = [replace(part, laps=[]) for part in row.record.parts]
    return Measured(
        row=replace(row, record=replace(row.record, parts=parts)), values={name: _value(trial, name) for name in names},
        clock_problem=trial.clock_problem, indicative=bool(trial.window and trial.window.indicative), struck=_struck(trial),
    )  # fmt: skip


def _struck(trial: Trial) -> str | None:
    """What a record by itself has against it."""
    if trial.record.outcome != "ok":
        return None
    return NOTHING_TRAINED if trained_nothing(trial.record) else next(iter(trial.impossible), None)


def _judged(trial: Measured, parity: Parity | None) -> Measured:
    """With the verdict of its set on the losses."""
    return replace(trial, struck=parity.reason) if parity and parity.state == "struck" and not trial.struck else trial


def _value(trial: Trial, name: str) -> float | None:
    try:
        return METRICS[name].compute(trial)
    except NoValue:
        return None


def final_metric(stage: str) -> str:
    """Where the training of a stage arrived."""
    return "final_reward" if stage == "ppo" else "final_loss"


def pair_cells(before: Mapping[str, list[Measured]], after: Mapping[str, list[Measured]]) -> Pairing:
    """Cells that are the same, then those that differ in the place only, then those of the same axes, where there is no doubt which.

    And the rest of both. Whether cells that differ may be compared is another question: see `other_settings`.
    """
    pairs = [(key, key) for key in before if key in after]
    for alike in (_without_place, _axes):
        groups = _grouped(before, {first for first, _ in pairs}, alike), _grouped(after, {second for _, second in pairs}, alike)
        pairs += [(keys[0], groups[1][name][0]) for name, keys in groups[0].items() if len(keys) == len(groups[1].get(name, ())) == 1]
    used = ({first for first, _ in pairs}, {second for _, second in pairs})
    return pairs, [key for key in before if key not in used[0]], [key for key in after if key not in used[1]]


def _grouped(cells: Mapping[str, list[Measured]], used: set[str], alike: Callable[[Cell], Hashable]) -> dict[Hashable, list[str]]:
    """Keys of the cells that are not used yet, by what makes them alike."""
    found: dict[Hashable, list[str]] = defaultdict(list)
    for key, rows in cells.items():
        if key not in used:
            found[alike(rows[0].row.cell)].append(key)
    return found


def _without_place(cell: Cell) -> Hashable:
    return canonical_json({name: value for name, value in identity(cell).items() if name not in SETTINGS_OF_THE_PLACE})


def _axes(cell: Cell) -> Hashable:
    return tuple(getattr(cell, axis) for axis in AXES)


def other_settings(before: Cell, after: Cell) -> tuple[Difference, ...]:
    """Settings that two cells of the same axes do not share; those of the place are conditions of their trials anyway."""
    first, second = cell_to_json(before), cell_to_json(after)
    names = [name for name in first if name not in SETTINGS_OF_THE_PLACE and first[name] != second.get(name)]
    return tuple(Difference(name, str(first[name]), str(second.get(name))) for name in names)


def sorted_cells(groups: Iterable[list[Measured]]) -> tuple[Cell, ...]:
    """The cell of each group, in the order of the tables."""
    return tuple(sorted((rows[0].row.cell for rows in groups), key=cell_order))


def nothing_common(baseline: Path, candidate: Path, before: Mapping[str, list[Measured]], after: Mapping[str, list[Measured]]) -> str:
    """What to tell the user."""
    seen = f"{len(before)} and {len(after)} cells, of which no two share stage, model, strategy, LoRA rank and ranks"
    return f"{baseline} and {candidate} have no cell in common; seen: {seen}; two runs of the same suite would be right"
