"""Two result sets, cell by cell: a candidate against its baseline. Torch-free.

A regression is a claim of the statistics (slower beyond the threshold, significant within its family), a loss outside its
band, or a trial that was ok and is not. Everything else is shown and decides nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.cell import Cell, canonical_json, cell_to_json, identity
from bench.errors import UserError
from bench.layout import Layout
from bench.measure.conditions import Difference, conditions, differences
from bench.report.analysis import MEMORY
from bench.report.inventory import BadFile, Row, cell_order, read_inventory
from bench.report.metrics import Trial, primary_metric
from bench.report.parity import comparison_key
from bench.report.provenance import without_paths
from bench.report.repetition import Losses, repeat_of
from bench.report.statistics import Comparison, Summary, verdicts
from bench.report.statistics import compare as compare_ratios
from bench.report.text import first_line

SETTINGS_OF_THE_PLACE = ("device", "launcher", "precision")
"""Settings in which cells may differ and still be the same comparison, if the user allows it."""
LOSS_ORDER = ("outside", "undefined", "inside", "identical")


@dataclass(frozen=True, slots=True)
class Side:
    """The trials of one cell in one set, by number."""

    rows: Mapping[int, Row]
    trials: Mapping[int, Trial]

    @property
    def ok(self) -> dict[int, Trial]:
        """Those that ended well."""
        return {number: trial for number, trial in self.trials.items() if trial.record.outcome == "ok"}

    @property
    def clock_problem(self) -> str | None:
        """Why its times and memory mean nothing, or None."""
        return next((trial.clock_problem for trial in self.trials.values() if trial.clock_problem), None)

    @property
    def outcomes(self) -> str:
        """How its trials ended.

        >>> Side({}, {}).outcomes
        'no trial'
        """
        counts = Counter(trial.record.outcome for trial in self.trials.values())
        return ", ".join(f"{name} × {count}" if count > 1 else name for name, count in sorted(counts.items())) or "no trial"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What became of one cell."""

    cell: Cell
    """The candidate's."""
    baseline: Side
    candidate: Side
    differences: tuple[Difference, ...] = ()
    """Conditions that were not the same."""
    broken: tuple[str, ...] = ()
    """Trials that were ok and are not."""
    lacking: tuple[int, ...] = ()
    """Trials of the baseline that the candidate has no record of."""
    speed: Comparison | None = None
    """Primary metric, candidate over baseline, paired by trial."""
    step_time: Summary | None = None
    """Step time, candidate over baseline."""
    memory: Summary | None = None
    """The most telling memory metric that both have, candidate over baseline."""
    memory_name: str = ""
    verdict: str = ""
    """Of the speed, or why there is none."""
    losses: Losses | None = None
    """The worst over pairs of trials; None where no pair is ok."""

    @property
    def regressions(self) -> tuple[str, ...]:
        """Why this cell is a regression; empty if it is none."""
        slow = [f"slower: {self.speed.middle:.3f} of the baseline's speed"] if self.speed and self.verdict == "slower" else []
        lost = [f"losses outside the band: {self.losses.text}"] if self.losses and self.losses.state == "outside" else []
        return (*self.broken, *slow, *lost)

    @property
    def mended(self) -> bool:
        """Whether no trial was ok and some are now."""
        return not self.baseline.ok and bool(self.candidate.ok)


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """The whole comparison."""

    names: tuple[str, str]
    """Baseline and candidate, as the user named them."""
    cells: tuple[Change, ...]
    only_baseline: tuple[Cell, ...] = ()
    only_candidate: tuple[Cell, ...] = ()
    bad_files: tuple[BadFile, ...] = field(default=())

    @property
    def regressions(self) -> tuple[Change, ...]:
        """The cells that are one."""
        return tuple(change for change in self.cells if change.regressions)

    @property
    def differences(self) -> dict[Difference, int]:
        """Conditions that were not the same, and in how many cells."""
        return dict(Counter(item for change in self.cells for item in change.differences))


def compare(
    baseline: Path, candidate: Path, *, markdown: Path | None = None, junit: Path | None = None, allow_differences: bool = False
) -> int:
    """Print how `candidate` differs from `baseline`, both folders of records; return 1 if there is a regression, else 0.

    `markdown` and `junit` are files to write too. Raises UserError where no cell is in both, or where conditions that change
    numbers were not the same and `allow_differences` is false.
    """
    from bench.report.compare_text import changes_text
    from bench.report.junit import junit_text

    changes = compare_sets(baseline, candidate)
    if changes.differences and not allow_differences:
        raise UserError(_refusal(changes))
    text = changes_text(changes)
    for path, content in ((markdown, text), (junit, junit_text(changes) if junit else "")):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    print(text, end="")
    return 1 if changes.regressions else 0


def _refusal(changes: Changes) -> str:
    lines = [f"  {item} ({count} of {len(changes.cells)} cells)" for item, count in changes.differences.items()]
    return "\n".join(
        [f"{changes.names[0]} and {changes.names[1]} did not run under the same conditions; seen (baseline / candidate):", *lines,
         "records of equal conditions would be right; --allow-differences compares these all the same"]
    )  # fmt: skip


def compare_sets(baseline: Path, candidate: Path) -> Changes:
    """Read and compare two sets. Raises UserError where one has no records or no cell is in both."""
    (before, bad_before), (after, bad_after) = _read(baseline), _read(candidate)
    pairs, rest_before, rest_after = _pair(before, after)
    if not pairs:
        raise UserError(_nothing_common(baseline, candidate, before, after))
    changes = [_change(before[first], after[second]) for first, second in pairs]
    return Changes(
        names=(str(baseline), str(candidate)), cells=_judge_speed(sorted(changes, key=lambda change: cell_order(change.cell))),
        only_baseline=_cells(before[key] for key in rest_before), only_candidate=_cells(after[key] for key in rest_after),
        bad_files=(*bad_before, *bad_after),
    )  # fmt: skip


# -- reading and pairing -----------------------------------------------------------------------------------------


def _read(folder: Path) -> tuple[dict[str, list[Row]], tuple[BadFile, ...]]:
    """The rows of each cell by its identity; a suite's folder stands for its records."""
    records = Layout(folder).records
    inventory = read_inventory(records if records.is_dir() else folder)
    cells: dict[str, list[Row]] = defaultdict(list)
    for row in inventory.rows:
        cells[canonical_json(identity(row.cell))].append(row)
    if not cells:
        first = inventory.bad_files[0]
        raise UserError(
            f"{folder}: no valid record; seen: {len(inventory.bad_files)} other JSON files, first {first.file}: {first.problem}"
        )
    return cells, inventory.bad_files


def _pair(before: Mapping[str, list[Row]], after: Mapping[str, list[Row]]) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """Cells that are the same, then those that differ in the place only, where there is no doubt which; and the rest of both."""
    pairs = [(key, key) for key in before if key in after]
    loose = [_loosely(before, after), _loosely(after, before)]
    pairs += [(keys[0], loose[1][name][0]) for name, keys in loose[0].items() if len(keys) == len(loose[1].get(name, ())) == 1]
    used = ({first for first, _ in pairs}, {second for _, second in pairs})
    return pairs, [key for key in before if key not in used[0]], [key for key in after if key not in used[1]]


def _loosely(cells: Mapping[str, list[Row]], others: Mapping[str, list[Row]]) -> dict[str, list[str]]:
    """Keys of the cells that `others` lacks, by identity without the settings of the place."""
    found: dict[str, list[str]] = defaultdict(list)
    for key, rows in cells.items():
        if key not in others:
            content = identity(rows[0].cell)
            found[canonical_json({name: value for name, value in content.items() if name not in SETTINGS_OF_THE_PLACE})].append(key)
    return found


def _cells(groups: Iterable[list[Row]]) -> tuple[Cell, ...]:
    return tuple(sorted((rows[0].cell for rows in groups), key=cell_order))


def _nothing_common(baseline: Path, candidate: Path, before: Mapping[str, list[Row]], after: Mapping[str, list[Row]]) -> str:
    text = f"{baseline} and {candidate} have no cell in common; seen: {len(before)} and {len(after)} cells"
    near = next(_near(before, after), None)
    return f"{text}{f'; cells of the same axes differ in {near}' if near else ''}; two runs of the same suite would be right"


def _near(before: Mapping[str, list[Row]], after: Mapping[str, list[Row]]) -> Iterator[str]:
    """What tells cells of the same axes apart."""
    first = {_axes(rows[0].cell): cell_to_json(rows[0].cell) for rows in before.values()}
    for rows in after.values():
        if theirs := first.get(_axes(rows[0].cell)):
            mine = cell_to_json(rows[0].cell)
            yield ", ".join(f"{name} ({theirs[name]} / {mine[name]})" for name in mine if mine[name] != theirs[name])


def _axes(cell: Cell) -> tuple[object, ...]:
    return cell.stage, cell.model, cell.strategy, cell.lora_rank, cell.nodes, cell.processes_per_node


# -- one cell ----------------------------------------------------------------------------------------------------


def _side(rows: list[Row]) -> Side:
    ordered = {row.record.trial: row for row in sorted(rows, key=lambda row: row.record.trial)}
    return Side(ordered, {number: Trial(row) for number, row in ordered.items()})


def _change(before: list[Row], after: list[Row]) -> Change:
    baseline, candidate = _side(before), _side(after)
    memory_name, memory = _memory(baseline, candidate)
    return Change(
        cell=after[0].cell, baseline=baseline, candidate=candidate,
        differences=tuple(differences(map(_conditions, before), map(_conditions, after))),
        broken=tuple(_broken(baseline, candidate)), lacking=tuple(number for number in baseline.rows if number not in candidate.rows),
        speed=_speed(baseline, candidate), step_time=_ratio(baseline, candidate, "step_seconds"), memory=memory, memory_name=memory_name,
        verdict=_why_no_speed(baseline, candidate), losses=_losses(baseline, candidate),
    )  # fmt: skip


def _conditions(row: Row) -> dict[str, str]:
    return conditions(row.record)


def _broken(baseline: Side, candidate: Side) -> Iterator[str]:
    for number in baseline.ok:
        record = candidate.rows[number].record if number in candidate.rows else None
        if record is not None and record.outcome != "ok":
            reason = without_paths(first_line(record.reason or "no reason recorded"))
            yield f"trial {number} was ok and is {record.outcome}: {reason}"


def _why_no_speed(baseline: Side, candidate: Side) -> str:
    """Why times are not compared, or nothing."""
    problem = baseline.clock_problem or candidate.clock_problem
    if problem:
        return f"not compared ({problem})"
    return "" if baseline.ok.keys() & candidate.ok.keys() else "no claim (no pair of ok trials)"


def _ratios(baseline: Side, candidate: Side, name: str) -> list[float]:
    """A metric of the candidate over that of the baseline, paired by trial; empty where the clocks do not count."""
    if baseline.clock_problem or candidate.clock_problem:
        return []
    before, after = baseline.ok, candidate.ok
    pairs = [(before[number].values[name].number, after[number].values[name].number) for number in before if number in after]
    return [mine / theirs for theirs, mine in pairs if mine and theirs]


def _speed(baseline: Side, candidate: Side) -> Comparison | None:
    trial = next(iter(candidate.trials.values()))
    ratios = _ratios(baseline, candidate, primary_metric(trial.cell.stage))
    return compare_ratios(ratios) if ratios else None


def _ratio(baseline: Side, candidate: Side, name: str) -> Summary | None:
    ratios = _ratios(baseline, candidate, name)
    return Summary(tuple(ratios)) if ratios else None


def _memory(baseline: Side, candidate: Side) -> tuple[str, Summary | None]:
    found = ((name, _ratio(baseline, candidate, name)) for name in MEMORY)
    return next(((name, ratio) for name, ratio in found if ratio), ("", None))


def _losses(baseline: Side, candidate: Side) -> Losses | None:
    """The worst verdict over pairs of ok trials."""
    pairs = [repeat_of(candidate.rows[number], baseline.rows[number]) for number in baseline.ok if number in candidate.ok]
    return min(pairs, key=lambda item: (LOSS_ORDER.index(item.state), -(item.largest or 0.0)), default=None)


# -- all cells ---------------------------------------------------------------------------------------------------


def _judge_speed(changes: list[Change]) -> tuple[Change, ...]:
    """Fill in the verdicts; one family is the cells of one stage and setting, as in a report."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, change in enumerate(changes):
        if change.speed is not None:
            members[comparison_key(change.cell)].append(index)
    judged = list(changes)
    for family in members.values():
        found = verdicts([comparison for index in family if (comparison := changes[index].speed)])
        for index, verdict in zip(family, found, strict=True):
            judged[index] = replace(changes[index], verdict=verdict)
    return tuple(replace(change, verdict="no claim (no speed recorded)") if not change.verdict else change for change in judged)
