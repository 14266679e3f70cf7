"""Two result sets, cell by cell: a candidate against its baseline. Torch-free.

A regression is a claim of the statistics (slower beyond the threshold, significant within its family), a loss outside its
band, a trial that was ok and is not, or a row that is struck and was not. Where the baseline is a reference (it lies below a
folder `references`), a step time or memory above its band is one too. Everything else is shown and decides nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bench.cell import Cell
from bench.errors import UserError
from bench.files import write_whole
from bench.measure.conditions import Difference, conditions, differences
from bench.report.bands import COSTS, Check, cost_check
from bench.report.inventory import BadFile, cell_order
from bench.report.metrics import primary_metric
from bench.report.pairing import Measured, Side, nothing_common, other_settings, pair_cells, read_cells, sorted_cells
from bench.report.parity import comparison_key
from bench.report.provenance import without_paths
from bench.report.ranking import MEMORY
from bench.report.repetition import Losses, repeat_of
from bench.report.statistics import Comparison, Summary, verdicts
from bench.report.statistics import compare as compare_ratios
from bench.report.text import first_line

REFERENCES = "references"
"""Folder of stored records; a baseline below it is a reference."""
LOSS_ORDER = ("outside", "undefined", "inside", "identical")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What became of one cell."""

    cell: Cell
    """The candidate's."""
    baseline: Side
    candidate: Side
    differences: tuple[Difference, ...] = ()
    """Settings and conditions that were not the same."""
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
    """The worst over pairs of trials; None where no pair is ok, or where other settings train otherwise anyway."""
    costs: tuple[Check, ...] = ()
    """Step time and memory against the reference band; none where the baseline is no reference."""

    @property
    def regressions(self) -> tuple[str, ...]:
        """Why this cell is a regression; empty if it is none."""
        struck = [f"struck: {self.candidate.struck}"] if self.candidate.struck and not self.baseline.struck else []
        slow = [f"slower: {self.speed.middle:.3f} of the baseline's speed"] if self.speed and self.verdict == "slower" else []
        judged = self.losses if not self.baseline.struck else None
        lost = [f"losses outside the band: {judged.text}"] if judged and judged.state == "outside" else []
        above = [f"outside the reference band: {it.name} {it.text}" for it in self.costs if it.state == "outside" and not it.better]
        return (*self.broken, *struck, *slow, *lost, *above)

    @property
    def band(self) -> str:
        """`inside`, `outside` or `undefined` of the reference band; empty where the baseline is no reference."""
        states = {check.state for check in self.costs} | ({self.losses.state} if self.losses and self.costs else set())
        return next((state for state in ("outside", "undefined") if state in states), "inside") if states else ""

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
    bad_files: tuple[BadFile, ...] = ()

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

    for path in (markdown, junit):
        if path is not None and path.is_dir():
            raise UserError(f"{path}: cannot be written; seen: a folder; the name of a file would be right")
    changes = compare_sets(baseline, candidate)
    if changes.differences and not allow_differences:
        raise UserError(_refusal(changes))
    text = changes_text(changes)
    write_whole({path: content for path, content in ((markdown, text), (junit, junit_text(changes) if junit else "")) if path is not None})
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
    (before, bad_before), (after, bad_after) = read_cells(baseline), read_cells(candidate)
    pairs, rest_before, rest_after = pair_cells(before, after)
    if not pairs:
        raise UserError(nothing_common(baseline, candidate, before, after))
    bands = REFERENCES in baseline.absolute().parts
    changes = [_change(before[first], after[second], bands=bands) for first, second in pairs]
    return Changes(
        names=(str(baseline), str(candidate)), cells=_judge_speed(sorted(changes, key=lambda change: cell_order(change.cell))),
        only_baseline=sorted_cells(before[key] for key in rest_before), only_candidate=sorted_cells(after[key] for key in rest_after),
        bad_files=(*bad_before, *bad_after),
    )  # fmt: skip


# -- one cell ----------------------------------------------------------------------------------------------------


def _change(before: list[Measured], after: list[Measured], *, bands: bool) -> Change:
    baseline, candidate = (Side({trial.row.record.trial: trial for trial in trials}) for trials in (before, after))
    memory_name, memory = _memory(baseline, candidate)
    settings = other_settings(before[0].row.cell, after[0].row.cell)
    return Change(
        cell=after[0].row.cell, baseline=baseline, candidate=candidate,
        differences=(*settings, *differences(map(_conditions, before), map(_conditions, after))),
        broken=tuple(_broken(baseline, candidate)), lacking=tuple(number for number in baseline.trials if number not in candidate.trials),
        speed=_speed(baseline, candidate), step_time=_ratio(baseline, candidate, "step_seconds"), memory=memory, memory_name=memory_name,
        verdict=_why_no_speed(baseline, candidate), losses=None if settings else _losses(baseline, candidate),
        costs=_against_band(baseline, candidate) if bands and not settings else (),
    )  # fmt: skip


def _against_band(baseline: Side, candidate: Side) -> tuple[Check, ...]:
    """Medians of the candidate's step time and memory against those of the stored trials."""
    if _why_not_ranked(baseline, candidate):
        return ()
    checks = []
    for name in COSTS:
        mine, stored = candidate.summary(name), baseline.summary(name)
        checks.append(cost_check(name, mine.middle if mine else None, stored.points if stored else ()))
    return tuple(check for check in checks if check is not None)


def _conditions(trial: Measured) -> dict[str, str]:
    return conditions(trial.row.record)


def _broken(baseline: Side, candidate: Side) -> Iterator[str]:
    for number in baseline.ok:
        record = candidate.trials[number].row.record if number in candidate.trials else None
        if record is not None and record.outcome != "ok":
            reason = without_paths(first_line(record.reason or "no reason recorded"))
            yield f"trial {number} was ok and is {record.outcome}: {reason}"


def _why_no_speed(baseline: Side, candidate: Side) -> str:
    """Why times are not compared, or nothing."""
    if problem := _why_not_ranked(baseline, candidate):
        return problem
    return "" if baseline.ok.keys() & candidate.ok.keys() else "no claim (no pair of ok trials)"


def _why_not_ranked(baseline: Side, candidate: Side) -> str:
    """Why neither times nor memory of the two may be held against each other, or nothing."""
    if problem := baseline.clock_problem or candidate.clock_problem:
        return f"not compared ({problem})"
    if candidate.struck:
        return "struck"
    return f"not compared (the baseline is struck: {baseline.struck})" if baseline.struck else ""


def _ratios(baseline: Side, candidate: Side, name: str) -> list[float]:
    """A metric of the candidate over that of the baseline, paired by trial; empty where the clocks do not count or one is struck."""
    if _why_not_ranked(baseline, candidate):
        return []
    before, after = baseline.ok, candidate.ok
    pairs = [(before[number].values[name], after[number].values[name]) for number in before if number in after]
    return [mine / theirs for theirs, mine in pairs if mine and theirs]


def _speed(baseline: Side, candidate: Side) -> Comparison | None:
    stage = next(iter(candidate.trials.values())).row.cell.stage
    ratios = _ratios(baseline, candidate, primary_metric(stage))
    return compare_ratios(ratios) if ratios else None


def _ratio(baseline: Side, candidate: Side, name: str) -> Summary | None:
    ratios = _ratios(baseline, candidate, name)
    return Summary(tuple(ratios)) if ratios else None


def _memory(baseline: Side, candidate: Side) -> tuple[str, Summary | None]:
    found = ((name, _ratio(baseline, candidate, name)) for name in MEMORY)
    return next(((name, ratio) for name, ratio in found if ratio), ("", None))


def _losses(baseline: Side, candidate: Side) -> Losses | None:
    """The worst verdict over pairs of ok trials."""
    before, after = baseline.ok, candidate.ok
    pairs = [repeat_of(after[number].row, before[number].row) for number in before if number in after]
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
