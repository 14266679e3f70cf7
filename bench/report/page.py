"""What every rendering of a report shows, in order: one value that HTML and Markdown both read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bench.cell import Cell
from bench.differences import titled
from bench.measure.devices import DeviceRow
from bench.report.analysis import Analysis, CellResult
from bench.report.detail_tables import Detail, detail_tables
from bench.report.device import card_bytes, measured_on
from bench.report.evidence import evidence_tables
from bench.report.headline import Answer, Tile, answers, sentences, tiles
from bench.report.inventory import BadFile
from bench.report.nodes import node_tables
from bench.report.plots import Figure, stage_figures, style_of
from bench.report.provenance import DataSet, Fact, data_sets, provenance_facts, run_facts, without_paths
from bench.report.registry import GIB, Given, NoValue, Trial
from bench.report.scaling import scaling_tables
from bench.report.tables import Table, cell_words, stage_table
from bench.report.text import counted, first_line, lora, number, shape
from bench.stages.base import SPECS

SYMBOLS = {
    "ok": "✓",
    "struck": "≠",
    "failed": "✕",
    "skipped": "–",
    "partly": "◐",
    "missing": "?",
}
STATE_WORDS = {
    "ok": "ran, not struck",
    "struck": "ran, but is struck",
    "failed": "a trial did not end ok",
    "skipped": "impossible, with a reason",
    "partly": "ran; a planned trial has no record",
    "missing": "planned, no record",
}
WORST_FIRST = ("failed", "struck", "missing", "partly", "ok", "skipped")


@dataclass(frozen=True, slots=True)
class Failure:
    """A record whose outcome is not ok."""

    cell: str
    trial: int
    outcome: str
    reason: str
    """First line."""
    log: str
    """The rest: last log lines."""
    memory: str
    """What a trial that ran out of a device's memory would have needed, and what there was; else empty."""
    file: str
    strategy: str


@dataclass(frozen=True, slots=True)
class Notice:
    """Cells that share a reason: skipped, struck or without a partner."""

    reason: str
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """What ran: strategies down, LoRA rank and ranks across."""

    columns: tuple[tuple[str, ...], ...]
    """Each head in parts: model if there are several, LoRA rank, nodes x ranks."""
    lines: tuple[tuple[str, tuple[str, ...]], ...]
    """Strategy and the state of each column; empty where the matrix has no such cell."""

    @property
    def states(self) -> tuple[str, ...]:
        """States that occur, for the key."""
        there = {state for _, found in self.lines for state in found}
        return tuple(state for state in SYMBOLS if state in there)


@dataclass(frozen=True, slots=True)
class StagePart:
    """One stage's part of the page."""

    name: str
    title: str
    strategies: tuple[str, ...]
    grid: Grid
    table: Table
    details: tuple[Detail, ...]
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """The report."""

    title: str
    sentences: tuple[str, ...]
    badges: tuple[str, ...]
    tiles: tuple[Tile, ...]
    answers: tuple[Answer, ...]
    stages: tuple[StagePart, ...]
    failures: tuple[Failure, ...]
    struck: tuple[Notice, ...]
    skipped: tuple[Notice, ...]
    missing: tuple[str, ...]
    bad_files: tuple[BadFile, ...]
    run: tuple[Fact, ...]
    provenance: tuple[Fact, ...]
    data: tuple[DataSet, ...]
    strategies: tuple[tuple[str, int], ...]
    """Name and style."""


def make_page(analysis: Analysis) -> Page:
    """Everything that the report says, in the order in which it says it."""
    inventory = analysis.inventory
    skipped = inventory.plan.skipped if inventory.plan else ()
    names = titled([*(it.cell for it in analysis.results), *(it.cell for it in skipped)], cell_words, " · ")
    return Page(
        title=inventory.title,
        sentences=tuple(sentences(analysis)),
        badges=tuple(_badges(analysis)),
        tiles=tuple(tiles(analysis)),
        answers=tuple(answers(analysis)),
        stages=tuple(_stage(analysis, stage) for stage in analysis.stages),
        failures=tuple(_failures(analysis, names)),
        struck=tuple(_notices((reason, names[cell]) for reason, cell in _struck(analysis))),
        skipped=tuple(_notices((without_paths(item.reason), names[item.cell]) for item in skipped)),
        missing=tuple(f"{names[item.cell]} · trial {item.trial}" for item in inventory.missing),
        bad_files=tuple(BadFile(item.file, without_paths(item.problem)) for item in inventory.bad_files),
        run=(*run_facts(inventory), *_given(analysis.given)) if inventory.rows else (),
        provenance=tuple(provenance_facts(inventory)),
        data=tuple(data_sets(inventory.rows)),
        strategies=tuple((name, style_of(name, analysis)) for name in analysis.strategies),
    )


def _given(given: Given) -> Iterable[Fact]:
    """What the report was told beside the records."""
    if given.price is not None:
        yield Fact("price of a device-hour", f"{given.price:g}")
    for name, rates in sorted(given.ceilings.items()):
        measured = ", ".join(f"{dtype} {rate / 1e12:.1f} TFLOP/s" for dtype, rate in sorted(rates.items()))
        yield Fact(f"matrix products of {name}", f"{measured} (doctor --bench)")


def _struck(analysis: Analysis) -> Iterable[tuple[str, Cell]]:
    """Why a trial that ended ok is struck, and its cell: its losses, or numbers that cannot be true."""
    for file, parity in analysis.parities.items():
        if parity.state == "struck":
            yield parity.reason, analysis.trials[file].cell
    for file, band in analysis.bands.items():
        if band.other_losses:
            yield band.other_losses, analysis.trials[file].cell
    for result in analysis.results:
        for trial in result.ok:
            yield from ((f"impossible: {problem}", result.cell) for problem in trial.impossible)


def _badges(analysis: Analysis) -> Iterable[str]:
    records = [row.record for row in analysis.inventory.rows]
    if any(record.emulated for record in records):
        yield "emulated: times and memory mean nothing"
    if any(record.simulated_nodes for record in records):
        yield "simulated nodes"
    if any(result.indicative and result.clock_problem is None for result in analysis.results):
        yield "indicative: short windows"
    if analysis.random_weights and records:
        yield "random weights: no quality claim"


def _failures(analysis: Analysis, names: Mapping[Cell, str]) -> Iterable[Failure]:
    for result in analysis.results:
        for trial, file in zip(result.trials, result.files, strict=True):
            if trial.record.outcome != "ok":
                yield _failure(trial, names[trial.cell], file)


def _failure(trial: Trial, name: str, file: str) -> Failure:
    record = trial.record
    reason = without_paths(record.reason or "no reason was recorded")
    log = "\n".join(reason.splitlines()[1:])
    return Failure(name, record.trial, record.outcome, first_line(reason), log, _memory_wanted(trial), file, trial.cell.strategy)


def _memory_wanted(trial: Trial) -> str:
    if trial.record.outcome != "oom" or trial.cell.settings.device != "cuda":
        return ""
    card = card_bytes(trial)
    figures = {
        "peak by theory": _gib(trial, "theory_peak_gib"),
        "the device": "" if card is None else number(card / GIB),
        "seen in use": _gib(trial, "device_memory_gib"),
        "allocated": _gib(trial, "peak_allocated_gib"),
    }
    return ", ".join(f"{what} {figure} GiB" for what, figure in figures.items() if figure)


def _gib(trial: Trial, name: str) -> str:
    value = trial.values[name].number
    return "" if value is None else number(value)


def _notices(pairs: Iterable[tuple[str, str]]) -> list[Notice]:
    groups: dict[str, list[str]] = defaultdict(list)
    for reason, cell in pairs:
        groups[reason].append(cell)
    return [Notice(reason, tuple(groups[reason])) for reason in sorted(groups, key=lambda key: (-len(groups[key]), key))]


# -- one stage ---------------------------------------------------------------------------------------------------


def _stage(analysis: Analysis, stage: str) -> StagePart:
    results = analysis.of_stage(stage)
    table = stage_table(results, bands=bool(analysis.bands))
    strategies = tuple(name for name in analysis.strategies if any(result.cell.strategy == name for result in results))
    return StagePart(
        stage, SPECS[stage].title, strategies, _grid(analysis, stage), table,
        (*detail_tables(results), *scaling_tables(results), *node_tables(results), *evidence_tables(results)),
        tuple(stage_figures(analysis, stage)), tuple(_notes(results)),
    )  # fmt: skip


ACROSS_ONE = (
    "A ratio's interval holds 1 beside a claim: the interval is of the median alone, between two of the observed ratios; the claim is the "
    "sign-flip test, to which every pair counts by its size."
)


OTHER_MACHINES = "Compared with trials of naive on other machines: what the machines differ in is in the ratio."


def _notes(results: Iterable[CellResult]) -> Iterable[str]:
    """Below a table: why clocks do not count, which flags were raised, where a chain has no partner."""
    found: dict[str, int] = defaultdict(int)
    for result in results:
        if result.clock_problem:
            found[f"Greyed times and memory are no measurements: {result.clock_problem}."] += 1
        for flag in result.flags:
            if flag != "indicative":
                found[f"Flagged: {without_paths(flag)}."] += 1
        for name in _never_finite(result):
            found[f"Not finite in some steps, which ended no trial: {name}."] += 1
        if result.parity and result.parity.state == "no partner":
            found[f"Not compared: {result.parity.reason}."] += 1
        if result.parity and result.parity.state == "peers agree":
            found[f"Losses compared with other strategies only: {result.parity.reason}."] += 1
        for difference in result.other_conditions:
            found[f"Not compared in speed, since naive ran under other conditions (naive's / its own): {difference}."] += 1
        if result.other_machines:
            found[OTHER_MACHINES] += 1
        if _claimed_across_one(result):
            found[ACROSS_ONE] += 1
        if device := known_device(result):
            found[f"{device.name}: {device.note}."] += bool(device.note)
        if result.indicative and result.clock_problem is None:
            found[f"Indicative: {_without_length(result.indicative)}."] += 1
    return [f"{text} ({counted(count, 'cell')})" for text, count in found.items() if count]


def _claimed_across_one(result: CellResult) -> bool:
    """Whether a difference is claimed although the interval of the median ratio holds 1."""
    interval = result.comparison.interval if result.comparison else None
    return result.verdict in ("faster", "slower") and interval is not None and interval[0] <= 1 <= interval[1]


def _without_length(indicative: str) -> str:
    """Why a window is indicative, without its own length, so that cells with the same reason share a line.

    >>> _without_length("window of 30 steps and 4.8 s; publishable from 30 steps and 60 s")
    'too short a window; publishable from 30 steps and 60 s'
    """
    return f"too short a window; {indicative.partition('; ')[2]}" if indicative.startswith("window of ") else indicative


def known_device(result: CellResult) -> DeviceRow | None:
    """The data sheet's row of a cell's device, or None."""
    try:
        return measured_on(result.ok[0]) if result.ok else None
    except NoValue:
        return None


def _never_finite(result: CellResult) -> list[str]:
    """Series with values that were not finite (a gradient norm where 16 bits overflowed)."""
    facts = [trial.record.lead.facts.get("non_finite") for trial in result.trials if trial.record.lead]
    return sorted({str(name) for fact in facts if isinstance(fact, dict) for name in fact})


def _grid(analysis: Analysis, stage: str) -> Grid:
    states: dict[tuple[str, tuple[object, ...]], list[str]] = defaultdict(list)
    names: dict[tuple[object, ...], tuple[str, ...]] = {}
    skipped = [item.cell for item in analysis.inventory.plan.skipped if item.cell.stage == stage] if analysis.inventory.plan else []
    entries = [(result.cell, _state(result)) for result in analysis.of_stage(stage)] + [(cell, "skipped") for cell in skipped]
    several = len({cell.model for cell, _ in entries}) > 1
    for cell, state in entries:
        key = (cell.model, cell.lora_rank, cell.nodes, cell.processes_per_node)
        names[key] = (*([cell.model] if several else []), f"LoRA {lora(cell)}" if cell.lora_rank else "full", shape(cell))
        states[(cell.strategy, key)].append(state)
    rows = sorted({cell.strategy for cell, _ in entries}, key=lambda name: (name != "naive", name))
    columns = sorted(names, key=lambda key: tuple(map(_sortable, key)))
    lines = tuple((name, tuple(_together(states.get((name, key), [])) for key in columns)) for name in rows)
    return Grid(tuple(names[key] for key in columns), lines)


def _together(states: list[str]) -> str:
    """The state of cells that share a place: the worst, but where some ran the others are what is missing of it.

    >>> _together(["ok", "missing"]), _together(["missing", "missing"]), _together(["missing", "ok", "failed"]), _together([])
    ('partly', 'missing', 'failed', '')
    """
    worst = min(states, key=WORST_FIRST.index, default="")
    return "partly" if worst == "missing" and {"ok", "partly"} & set(states) else worst


def _sortable(value: object) -> tuple[str, int]:
    return ("", value) if isinstance(value, int) else (str(value), 0)


def _state(result: CellResult) -> str:
    if any(name not in ("ok", "missing") for name in result.outcomes):
        return "failed"
    if result.struck:
        return "struck"
    if result.missing:
        return "partly" if result.ok else "missing"
    return "ok"
