"""Everything that tables, figures and headline say, worked out once from the inventory."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

from bench.cell import Cell
from bench.measure.conditions import Difference
from bench.report.bands import Band, judge_bands, read_references, suites_of
from bench.report.conditions import on_other_machines, other_conditions, paired
from bench.report.inventory import BASELINE, STAGE_ORDER, Inventory, Missing, Row, cell_order, read_inventory
from bench.report.metrics import METRICS, Trial, primary_metric
from bench.report.parity import Parity, comparison_key, judge
from bench.report.ranking import RankedSet, ranked_sets
from bench.report.registry import NOTHING, Given
from bench.report.statistics import Comparison, Summary, compare, verdicts


@dataclass(eq=False)
class CellResult:
    """One row of a table: a cell and its trials."""

    cell: Cell
    trials: tuple[Trial, ...]
    files: tuple[str, ...]
    parities: tuple[Parity, ...]
    bands: tuple[Band, ...]
    missing: tuple[Missing, ...] = ()
    comparison: Comparison | None = None
    """Speed against `naive`, where both were measured and neither is struck."""
    verdict: str = ""
    """Of that comparison, or why there is none."""
    other_conditions: tuple[Difference, ...] = ()
    """Those under which `naive` ran; there is no comparison then."""
    other_machines: bool = False
    """Whether it is compared with trials of `naive` that ran on others."""

    @cached_property
    def ok(self) -> tuple[Trial, ...]:
        """The trials that ended well."""
        return tuple(trial for trial in self.trials if trial.record.outcome == "ok")

    @property
    def outcomes(self) -> Counter[str]:
        """How many trials ended how; planned trials without a record count as missing."""
        return Counter([trial.record.outcome for trial in self.trials] + ["missing"] * len(self.missing))

    @cached_property
    def clock_problem(self) -> str | None:
        """Why times and memory of this cell mean nothing, or None."""
        return next((trial.clock_problem for trial in self.trials if trial.clock_problem), None)

    @cached_property
    def parity(self) -> Parity | None:
        """The worst verdict over trials: struck, no partner, peers agree, agrees, reference."""
        order = ("struck", "no partner", "peers agree", "agrees", "reference")
        worst = max((item.largest or 0.0 for item in self.parities), default=0.0)
        key: Callable[[Parity], tuple[int, bool]] = lambda item: (order.index(item.state), (item.largest or 0.0) != worst)  # noqa: E731
        return min(self.parities, key=key, default=None)

    @cached_property
    def band(self) -> Band | None:
        """The worst band verdict over trials."""
        order = ("outside", "undefined", "inside")
        return min(self.bands, key=lambda item: order.index(item.state), default=None)

    @property
    def indicative(self) -> str | None:
        """Why the window is too short to publish, or None."""
        return next((trial.window.indicative for trial in self.ok if trial.window and trial.window.indicative), None)

    @property
    def unsteady(self) -> bool:
        """Whether a trial's step times kept drifting."""
        return any(trial.window is not None and trial.window.steady is False for trial in self.ok)

    @property
    def flags(self) -> tuple[str, ...]:
        """What the trials flagged, in order, once each."""
        return tuple(dict.fromkeys(flag for trial in self.trials for flag in trial.record.flags))

    def summary(self, name: str) -> Summary | None:
        """A metric over the ok trials; None where none of them has it. What theory says holds of those that failed, too."""
        trials = self.trials if name.startswith("theory_") else self.ok
        points = [trial.values[name].number for trial in trials if name in trial.values]
        known = tuple(value for value in points if value is not None)
        return Summary(known) if known else None

    def why_none(self, name: str) -> str:
        """Why `summary` has no value."""
        if not self.ok:
            return "no ok trial"
        values = [trial.values.get(name) for trial in self.ok]
        return next((value.reason for value in values if value and value.reason), "not a metric of this stage")

    @cached_property
    def impossible(self) -> str | None:
        """What physics says against its numbers, or None."""
        return next((problem for trial in self.ok for problem in trial.impossible), None)

    @cached_property
    def other_losses(self) -> str | None:
        """Why its losses are other than those of stored records of the same trials, or None."""
        return next((problem for band in self.bands if (problem := band.other_losses)), None)

    @property
    def struck(self) -> bool:
        """Whether its losses are other than naive's or the stored ones, or its numbers cannot be true: shown, never ranked."""
        return bool(self.impossible or self.other_losses or (self.parity and self.parity.state == "struck"))

    @property
    def ranked(self) -> bool:
        """Whether its speed and memory may be compared: measured, ok, not struck."""
        return bool(self.ok) and self.clock_problem is None and not self.struck


@dataclass(eq=False)
class Analysis:
    """The inventory with all verdicts."""

    inventory: Inventory
    results: tuple[CellResult, ...] = ()
    parities: dict[str, Parity] = field(default_factory=dict)
    bands: dict[str, Band] = field(default_factory=dict)
    trials: dict[str, Trial] = field(default_factory=dict)
    reference_suites: frozenset[str] = frozenset()
    """Names of the suites that there are stored records of."""

    @property
    def given(self) -> Given:
        """What the report was told beside the records."""
        return next((trial.given for trial in self.trials.values()), NOTHING)

    def of_stage(self, stage: str) -> tuple[CellResult, ...]:
        """The cells of a stage, in the order of its table."""
        return tuple(result for result in self.results if result.cell.stage == stage)

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages with a cell, first to last."""
        return tuple(stage for stage in STAGE_ORDER if self.of_stage(stage))

    @cached_property
    def strategies(self) -> tuple[str, ...]:
        """Strategies with a cell, `naive` first."""
        return tuple(sorted({result.cell.strategy for result in self.results}, key=lambda name: (name != BASELINE, name)))

    @property
    def outcomes(self) -> Counter[str]:
        """How many records ended how."""
        return Counter(row.record.outcome for row in self.inventory.rows)

    @cached_property
    def measured(self) -> bool:
        """Whether any ok trial has a clock that counts."""
        return any(trial.clock_problem is None for result in self.results for trial in result.ok)

    @cached_property
    def random_weights(self) -> bool:
        """Whether every cell began from random weights."""
        return all(result.cell.settings.weights == "random" for result in self.results)

    @cached_property
    def ranked_sets(self) -> tuple[RankedSet, ...]:
        """Comparison sets with at least two ranked cells on the same number of ranks."""
        return ranked_sets(self.results)


def read_analysis(records: Path, plan: Path | None = None, references: Path | None = None, given: Given = NOTHING) -> Analysis:
    """Read every record below `records` and work it out, one after the other, so that no laps stay in memory.

    Raises UserError where there are no records.
    """
    trials: dict[str, Trial] = {}

    def keep(row: Row) -> Row:
        trials[row.file] = trial = Trial(row, given)
        return replace(row, record=trial.sum_up())

    return analyse(read_inventory(records, plan, keep), trials, read_references(references))


def analyse(inventory: Inventory, trials: dict[str, Trial], references: Sequence[Row] = ()) -> Analysis:
    """Judge parity, bands and comparisons with `naive`; `trials` has the trial of each row by its file."""
    parities, bands = judge(inventory.rows), judge_bands(inventory.rows, references, trials)
    missing: dict[str, list[Missing]] = defaultdict(list)
    for item in inventory.missing:
        missing[item.cell.cell_id].append(item)
    results = []
    for cell_id, members in groupby(inventory.rows, key=lambda row: row.record.cell_id):
        results.append(_result(list(members), trials, parities, bands, missing.pop(cell_id, [])))
    results += [CellResult(items[0].cell, (), (), (), (), tuple(items)) for items in missing.values()]
    results.sort(key=lambda result: cell_order(result.cell))
    _compare_speed(results)
    return Analysis(inventory, tuple(results), parities, bands, trials, suites_of(references))


def _result(
    rows: list[Row], trials: dict[str, Trial], parities: dict[str, Parity], bands: dict[str, Band], missing: list[Missing]
) -> CellResult:
    files = tuple(row.file for row in rows)
    return CellResult(
        rows[0].cell,
        tuple(trials[file] for file in files),
        files,
        tuple(parities[file] for file in files if file in parities),
        tuple(bands[file] for file in files if file in bands),
        tuple(missing),
    )


# -- speed against naive -----------------------------------------------------------------------------------------


def _compare_speed(results: Sequence[CellResult]) -> None:
    """Fill in comparison and verdict; one family is the strategies with the same `naive` partner."""
    families: dict[str, list[CellResult]] = defaultdict(list)
    for result in results:
        families[comparison_key(result.cell)].append(result)
    for members in families.values():
        baselines = [it for it in members if it.cell.strategy == BASELINE]
        baseline = next((it for it in baselines if it.ranked), baselines[0] if baselines else None)
        compared = []
        for result in members:
            result.verdict = _why_not(result, baseline)
            if baseline is not None and not result.verdict:
                _hold_against(result, baseline)
            if result.comparison:
                compared.append(result)
        for result, verdict in zip(compared, verdicts([it.comparison for it in compared if it.comparison]), strict=True):
            result.verdict = verdict


def _why_not(result: CellResult, baseline: CellResult | None) -> str:
    if result.clock_problem:
        return "no claim (not measured)"
    if result.struck:
        return "struck"
    if not result.ok:
        return "no claim (no ok trial)"
    if result is baseline:
        return "baseline"
    if baseline is None or not baseline.ranked:
        return "no claim (no measured naive)"
    return ""


def _hold_against(result: CellResult, baseline: CellResult) -> None:
    """Fill in the comparison with `naive`, or why there is none."""
    result.other_conditions = tuple(other_conditions(result.ok, baseline.ok))
    if result.other_conditions:
        result.verdict = "no claim (other conditions)"
    elif ratios := _ratios(result, baseline):
        result.comparison = compare(ratios)
        result.other_machines = on_other_machines(result.ok, baseline.ok)
    else:
        result.verdict = "no claim (no pair of ok trials)"


def _ratios(result: CellResult, baseline: CellResult) -> list[float]:
    """Primary metric over that of `naive`, paired by trial."""
    name = primary_metric(result.cell.stage)
    pairs = [(trial.values[name].number, other.values[name].number) for trial, other in paired(result.ok, baseline.ok)]
    return [mine / theirs for mine, theirs in pairs if mine and theirs]


def direction(name: str) -> str:
    """`higher`, `lower` or `none` is better."""
    return METRICS[name].direction
