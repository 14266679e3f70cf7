"""The tables of a report, as values that HTML and Markdown both write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.cell import Cell
from bench.differences import differing, named, settings_of, told_apart, written
from bench.report.analysis import CellResult
from bench.report.metrics import METRICS, primary_metric
from bench.report.provenance import without_paths
from bench.report.ranking import memory_metric
from bench.report.statistics import Summary
from bench.report.text import DASH, lora, number, ratio, shape, spread


@dataclass(frozen=True, slots=True)
class TableCell:
    """One entry: its text, a smaller second line, a sort key, and how it is to be read."""

    text: str
    note: str = ""
    sort: float | str = ""
    kind: str = ""
    """`muted` (not a measurement), `good`, `bad`, `warn`, `wrap` (long text), or nothing."""
    hint: str = ""
    """Longer text: a reason."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column: head, unit, explanation, whether it holds numbers."""

    title: str
    unit: str = ""
    help: str = ""
    numeric: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A row of a table, with what the toggles need."""

    cells: tuple[TableCell, ...]
    strategy: str
    starts_group: bool = False
    """Whether a new model, LoRA rank or number of ranks begins."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of one stage."""

    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    fixed: tuple[tuple[str, str], ...]
    """Settings that all its cells share, name and value."""


Make = Callable[[CellResult], TableCell]


def stage_table(results: Sequence[CellResult], *, bands: bool) -> Table:
    """The table of one stage's cells; `bands` adds the reference band."""
    contents = [settings_of(result.cell) for result in results]
    varying = differing(contents)
    fixed = tuple((name, written(value)) for name, value in contents[0].items() if name not in varying)
    own = [_setting(name) for name in varying if name == "precision"]
    rest = [name for name in varying if name != "precision"]
    makers = [
        *identity_columns(results, told=["precision"]),
        *own,
        *_measured(results, bands=bands),
        *([_other_settings(rest)] if rest else []),
    ]
    lines = tuple(
        Line(tuple(make(result) for _, make in makers), result.cell.strategy, first)
        for result, first in zip(results, starts_of_groups(results), strict=True)
    )
    return Table(tuple(column for column, _ in makers), lines, fixed)


def starts_of_groups(results: Sequence[CellResult]) -> list[bool]:
    """Whether a new model, LoRA rank or number of ranks begins with each cell."""
    return [_group(result.cell) != _group(before.cell) for before, result in zip([results[-1], *results], results, strict=False)]


def _group(cell: Cell) -> tuple[object, ...]:
    return cell.model, cell.lora_rank, cell.nodes, cell.processes_per_node


# -- columns -----------------------------------------------------------------------------------------------------


def identity_columns(results: Sequence[CellResult], told: Sequence[str] = ()) -> list[tuple[Column, Make]]:
    """What tells the cells of a stage apart: strategy, LoRA rank, ranks, and the model where there are several.

    Where cells are still alike, the settings stand below the strategy that tell them apart; not those that are `told` elsewhere.
    """
    contents = [{name: value for name, value in settings_of(it.cell).items() if name not in told} for it in results]
    looks = [(it.cell.strategy, *_group(it.cell)) for it in results]
    settings = dict(zip(results, told_apart(contents, looks), strict=True))
    adapters = Column("LoRA", "rank", "Rank of the adapters; full trains all parameters.", numeric=True)
    ranks = Column("nodes × ranks", "per node", "Nodes times processes per node.")
    columns: list[tuple[Column, Make]] = [
        (Column("strategy", help="How model and optimizer state lie over ranks."), lambda it: _strategy(it, settings[it])),
        (adapters, lambda it: TableCell(lora(it.cell), sort=it.cell.lora_rank)),
        (ranks, lambda it: TableCell(shape(it.cell), sort=it.cell.world_size)),
    ]
    if len({result.cell.model for result in results}) > 1:
        columns.insert(1, (Column("model"), lambda it: TableCell(it.cell.model, sort=it.cell.model)))
    return columns


def _strategy(result: CellResult, settings: str) -> TableCell:
    """The strategy, settings that tell it from others, and which package was somebody's own checkout instead of the installed one."""
    name, overlaid = result.cell.strategy, [flag.removeprefix("modified: ") for flag in result.flags if flag.startswith("modified: ")]
    if result.cell.settings.overlay is None and not overlaid:
        return TableCell(name, settings, sort=name)
    hint = f"runs another package than the installed one: {', '.join(overlaid) or 'of this trial there is no record'}"
    return TableCell(name, ", ".join(filter(None, ("modified", settings))), name, "warn", hint)


def _setting(name: str) -> tuple[Column, Make]:
    def make(result: CellResult) -> TableCell:
        value = getattr(result.cell.settings, name)
        return TableCell(written(value), sort=value if isinstance(value, (int, float)) else written(value))

    return Column(name.replace("_", " "), help="A setting that differs between rows; see the suite's schema."), make


def _other_settings(names: Sequence[str]) -> tuple[Column, Make]:
    def make(result: CellResult) -> TableCell:
        text = named(settings_of(result.cell), names)
        return TableCell(text, sort=text, kind="wrap")

    return Column("settings", help="Other settings that differ between rows."), make


def _measured(results: Sequence[CellResult], *, bands: bool) -> list[tuple[Column, Make]]:
    stage = results[0].cell.stage
    primary, memory = primary_metric(stage), memory_metric(results)
    comparison = [
        (Column("vs naive", "ratio", "Throughput over that of naive with the same settings, paired by trial.", numeric=True), ratio_cell),
        (Column("claim", help="faster, slower or equal (within 3 %) only from enough paired trials; otherwise no claim."), claim_cell),
    ]
    columns = [
        (Column("outcome", help="How the trials ended. Failures are results; their reasons stand below."), outcome_cell),
        (Column("losses", help="Parity with naive: whether the strategy computes the same. Struck rows are never ranked."), parity_cell),
        metric_column(primary),
        *(comparison if any(result.ok and result.clock_problem is None for result in results) else []),
        metric_column("step_seconds", "iteration" if stage == "ppo" else "step"),
        *([metric_column("mfu")] if stage != "ppo" and any(result.summary("mfu") for result in results) else []),
        metric_column(memory),
        *_quality_columns(stage),
    ]
    if bands:
        columns.append((Column("reference band", help="Whether a stored record of this cell on this device is repeated."), band_cell))
    return columns


def _quality_columns(stage: str) -> list[tuple[Column, Make]]:
    last = "final_reward" if stage == "ppo" else "final_loss"
    names = {"sft": ("loss",), "rm": ("accuracy", "margin"), "ppo": ("reward", "kl")}[stage]
    return [metric_column(last), *(_held_out_column(name) for name in names)]


def _held_out_column(name: str) -> tuple[Column, Make]:
    before, after = f"held_out_{name}_before", f"held_out_{name}_after"
    words = f"Held-out {name} after training, and from what it came, on rows never trained on; {METRICS[after].direction} is better."

    def make(result: CellResult) -> TableCell:
        first, last = result.summary(before), metric_cell(result, after)
        return dataclasses.replace(last, note=f"from {number(first.middle)}{last.note and f'; {last.note}'}") if first else last

    return Column(f"held-out {name}", METRICS[after].unit, words, numeric=True), make


def metric_column(name: str, title: str | None = None) -> tuple[Column, Make]:
    """The column of a metric, under its own title or another."""
    item = METRICS[name]
    return Column(title or item.title, item.shown_unit, item.explanation, numeric=True), lambda result: metric_cell(result, name)


def metric_cell(result: CellResult, name: str) -> TableCell:
    """Median of a metric with its points or interval; greyed where the clock does not count; a dash with a reason where there is none."""
    summary = result.summary(name)
    if summary is None:
        return TableCell(DASH, sort="", hint=result.why_none(name), kind="muted")
    if METRICS[name].is_share:
        summary = Summary(tuple(100 * point for point in summary.points))
    muted = METRICS[name].clocked and result.clock_problem
    note = "" if muted else spread(summary)
    hint = f"not a measurement: {result.clock_problem}" if muted else result.indicative or "" if METRICS[name].clocked else ""
    return TableCell(number(summary.middle), note, summary.middle, "muted" if muted else "", hint)


def outcome_cell(result: CellResult) -> TableCell:
    """`ok`, or how many trials ended how; `impossible` where physics speaks against the numbers."""
    outcomes = result.outcomes
    if result.impossible:
        return TableCell("impossible", result.impossible, "impossible", "bad", result.impossible)
    notes = [
        flag
        for flag, shown in (("indicative", _is_indicative(result)), ("not steady", result.unsteady and not result.clock_problem))
        if shown
    ]
    if set(outcomes) == {"ok"}:
        return TableCell(
            "ok" if outcomes["ok"] == 1 else f"ok × {outcomes['ok']}",
            ", ".join(notes),
            "ok",
            "good",
            result.indicative or "" if notes else "",
        )
    text = ", ".join(f"{name} × {count}" if count > 1 else name for name, count in sorted(outcomes.items()))
    reason = next((trial.record.reason for trial in result.trials if trial.record.reason), "") or ""
    kind = "warn" if result.ok or set(outcomes) == {"missing"} else "bad"
    return TableCell(text, ", ".join(notes), text, kind, without_paths(reason))


def _is_indicative(result: CellResult) -> bool:
    return result.indicative is not None and result.clock_problem is None


def parity_cell(result: CellResult) -> TableCell:
    """The parity verdict with the largest deviation."""
    parity = result.parity
    if parity is None:
        return TableCell(DASH, hint="no ok trial with losses", kind="muted")
    note = "" if parity.largest is None else f"{parity.largest:.1e}" if parity.largest else "exact"
    if parity.partner_precision and parity.partner_precision != result.cell.settings.precision:
        note = f"{note} (naive in {parity.partner_precision})"
    kind = {"agrees": "good", "peers agree": "good", "struck": "bad", "no partner": "muted"}.get(parity.state, "")
    return TableCell(parity.state, note.strip(), parity.largest if parity.largest is not None else "", kind, parity.reason)


def ratio_cell(result: CellResult) -> TableCell:
    """Throughput over that of `naive`."""
    if result.comparison is None:
        return TableCell(DASH, kind="muted", hint=result.verdict)
    compared = result.comparison
    return TableCell(ratio(compared.middle), spread(Summary(compared.ratios), ratio) or "n = 1", compared.middle)


def claim_cell(result: CellResult) -> TableCell:
    """The verdict of the comparison."""
    kind = {"faster": "good", "slower": "bad", "equal": "good", "struck": "bad"}.get(result.verdict, "muted")
    return TableCell(result.verdict, sort=result.verdict, kind=kind)


def band_cell(result: CellResult) -> TableCell:
    """Inside or outside the reference band."""
    band = result.band
    if band is None:
        return TableCell("no reference", kind="muted")
    hint = "; ".join(f"{check.name} {check.state}: {check.text}" for check in band.checks)
    return TableCell(band.state, sort=band.state, kind={"inside": "good", "outside": "bad"}.get(band.state, "warn"), hint=hint)


def cell_words(cell: Cell) -> str:
    """A cell in words, for lists of failures and skipped cells."""
    adapters = f"LoRA {cell.lora_rank}" if cell.lora_rank else "full"
    return f"{cell.stage} · {cell.model} · {cell.strategy} · {adapters} · {shape(cell)}"
