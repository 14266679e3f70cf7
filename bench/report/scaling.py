"""How a strategy scales with ranks: strong and weak efficiency against the same strategy on one rank, and the pace of every node.

Efficiency is rate(N) / (N x rate(1)), the rate being the stage's primary one. Strong scaling keeps the batch of the whole step, weak
scaling the batch of a rank (Amdahl 1967, Gustafson 1988). Both sides are paired by trial number; the interval is that of any other median
here. Records whose clock does not count (emulated, simulated nodes, forked) have no ratio.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.cell import Cell, canonical_json, cell_to_json
from bench.report.analysis import CellResult
from bench.report.conditions import on_other_machines, other_conditions
from bench.report.detail_tables import Detail
from bench.report.metrics import primary_metric
from bench.report.metrics.speed import node_step_seconds
from bench.report.registry import NoValue, Trial
from bench.report.statistics import Summary
from bench.report.tables import Column, Line, Make, Table, TableCell, identity_columns, metric_column
from bench.report.text import DASH, number, ratio, spread

TITLE = "Scaling"
Kind = Literal["strong", "weak"]
KINDS: tuple[Kind, ...] = ("strong", "weak")
_SAME = {"strong": "the same batch of a step", "weak": "the same batch of a rank"}
_FREE = ("nodes", "processes_per_node", "scaling", "global_batch", "prompts_per_iteration", "tensor_parallel", "pipeline_parallel")
"""What may differ between a cell and its base; batches are compared as a step has them."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """How one cell scales: efficiencies by trial number, or why there are none."""

    efficiencies: dict[int, float]
    reason: str = ""
    other_machines: bool = False
    """Whether the one rank ran on others."""


def scaling_tables(results: Sequence[CellResult]) -> list[Detail]:
    """The table of one stage's cells that ran at more than one number of ranks, one strategy after the other; none where no cell did."""
    places = {_series(result.cell): place for place, result in reversed(list(enumerate(results)))}
    shown = sorted((it for it in results if _has_other_size(it, results)), key=lambda it: (places[_series(it.cell)], it.cell.world_size))
    if not shown:
        return []
    firsts = [_series(before.cell) != _series(result.cell) for before, result in zip([shown[-1], *shown], shown, strict=False)]
    found = {kind: {it: scaled(it, results, kind) for it in shown} for kind in KINDS}
    makers = [*identity_columns(shown), *_columns(shown, found)]
    lines = tuple(
        Line(tuple(make(result) for _, make in makers), result.cell.strategy, first) for result, first in zip(shown, firsts, strict=True)
    )
    return [Detail(TITLE, Table(tuple(column for column, _ in makers), lines, ()), tuple(_why_none(found)))]


def scaled(result: CellResult, results: Sequence[CellResult], kind: Kind) -> Scaled:
    """The efficiency of `result` against its base among `results`: 1 is perfect."""
    ranks = result.cell.world_size
    if ranks == 1:
        return Scaled({}, "one rank is what the others are held against")
    if problem := _not_ranked(result):
        return Scaled({}, problem)
    base = _base(result.cell, results, kind)
    if base is None:
        return Scaled({}, f"no record of {result.cell.strategy} on one rank with {_SAME[kind]}")
    if problem := _not_ranked(base):
        return Scaled({}, f"on one rank: {problem}")
    if unlike := other_conditions(result.ok, base.ok):
        return Scaled({}, f"on one rank under other conditions: {', '.join(map(str, unlike))}")
    theirs, mine = _rates(base), _rates(result)
    pairs = {trial: rate / (theirs[trial] * ranks) for trial, rate in mine.items() if trial in theirs}
    return Scaled(pairs, "" if pairs else "no pair of ok trials with a rate", on_other_machines(result.ok, base.ok))


def _not_ranked(result: CellResult) -> str:
    if result.clock_problem:
        return f"not a measurement: {result.clock_problem}"
    if result.struck:
        return "struck"
    return "" if result.ok else "no ok trial"


def _rates(result: CellResult) -> dict[int, float]:
    name = primary_metric(result.cell.stage)
    rates = ((trial.record.trial, trial.values[name].number) for trial in result.ok)
    return {trial: rate for trial, rate in rates if rate}


def _base(cell: Cell, results: Sequence[CellResult], kind: Kind) -> CellResult | None:
    """The same strategy on one rank, with the batch that `kind` keeps."""
    share = 1 if kind == "strong" else cell.data_parallel_size
    wanted, family = _batches(cell, share), _family(cell)
    alone = (it for it in results if it.cell.world_size == 1 and _batches(it.cell) == wanted)
    return next((it for it in alone if _family(it.cell) == family), None)


def _family(cell: Cell) -> str:
    """Cells that share it differ in ranks and batch alone."""
    return canonical_json({key: value for key, value in cell_to_json(cell).items() if key not in _FREE})


def _batches(cell: Cell, share: int = 1) -> tuple[float, float]:
    """Sequences of a step and prompts of an iteration, over `share`."""
    prompts = getattr(cell.settings, "prompts_per_iteration", 0) * cell.step_batch / cell.settings.global_batch
    return cell.step_batch / share, prompts / share


def _has_other_size(result: CellResult, results: Sequence[CellResult]) -> bool:
    """Whether the same stage, model, strategy and LoRA rank have records at another number of ranks."""
    return bool(result.trials) and any(
        it.trials and _series(it.cell) == _series(result.cell) and it.cell.world_size != result.cell.world_size for it in results
    )


def _series(cell: Cell) -> tuple[object, ...]:
    """What cells have in common that are read one after the other, by their number of ranks."""
    return cell.stage, cell.model, cell.lora_rank, cell.strategy


# -- columns -----------------------------------------------------------------------------------------------------


def _columns(shown: Sequence[CellResult], found: Mapping[Kind, Mapping[CellResult, Scaled]]) -> list[tuple[Column, Make]]:
    own: list[tuple[Column, Make]] = []
    if len({result.cell.settings.scaling for result in shown}) > 1:
        own.append((Column("scaling", help="A setting of the suite."), lambda it: TableCell(it.cell.settings.scaling)))
    own.append((Column("batch", "per step", "Sequences or pairs of one step over all ranks.", numeric=True), _batch_cell))
    own.append(metric_column(primary_metric(shown[0].cell.stage)))
    for kind, ratios in found.items():
        if any(item.efficiencies for item in ratios.values()):
            own += _kind_columns(kind, ratios)
    own.append(metric_column("straggler_ratio"))
    if any(result.cell.nodes > 1 for result in shown):
        own.append((Column("step time by node", "s", node_step_seconds.__doc__ or ""), _nodes_cell))
    return own


def _kind_columns(kind: Kind, found: Mapping[CellResult, Scaled]) -> list[tuple[Column, Make]]:
    what = f"the same strategy on one rank with {_SAME[kind]}, paired by trial"
    speedup = Column(f"{kind} speedup", "x", f"Throughput over that of {what}.", numeric=True)
    efficiency = Column(f"{kind} efficiency", "ratio", f"Speedup over the number of ranks, against {what}; 1 is perfect.", numeric=True)

    def times_ranks(result: CellResult) -> TableCell:
        return _ratio_cell(result, found[result], result.cell.world_size)

    def as_it_is(result: CellResult) -> TableCell:
        return _ratio_cell(result, found[result], 1)

    return [(speedup, times_ranks), (efficiency, as_it_is)]


def _ratio_cell(result: CellResult, found: Scaled, factor: int) -> TableCell:
    if not found.efficiencies:
        return TableCell(DASH, sort="", kind="muted", hint=found.reason)
    summary = Summary(tuple(factor * value for value in found.efficiencies.values()))
    around = ", ".join([spread(summary, ratio) or "n = 1"] + ["one rank on another machine"] * found.other_machines)
    return TableCell(ratio(summary.middle), around, summary.middle, hint=result.indicative or "")


def _batch_cell(result: CellResult) -> TableCell:
    return TableCell(f"{result.cell.step_batch:,}", sort=result.cell.step_batch)


def _nodes_cell(result: CellResult) -> TableCell:
    """Median step time of every node, in the order of their numbers; the median over trials of each."""
    found = [times for trial in result.ok if (times := _node_times(trial))]
    if not found:
        return TableCell(DASH, sort="", kind="muted", hint="no ok trial with laps of every rank")
    nodes = [Summary(tuple(times[node] for times in found)).middle for node in sorted(found[0])]
    muted = result.clock_problem
    text = " · ".join(map(number, nodes))
    return TableCell(text, "", max(nodes), "muted" if muted else "", f"not a measurement: {muted}" if muted else result.indicative or "")


def _node_times(trial: Trial) -> dict[int, float]:
    try:
        return node_step_seconds(trial)
    except NoValue:
        return {}


def _why_none(found: Mapping[Kind, Mapping[CellResult, Scaled]]) -> Iterator[str]:
    """Why a kind of scaling has no column at all; both kinds in one sentence where the reasons are the same."""
    reasons: dict[str, list[str]] = {}
    for kind, ratios in found.items():
        wanted = [item for result, item in ratios.items() if result.cell.world_size > 1]
        if not any(item.efficiencies for item in wanted):
            reasons.setdefault("; ".join(dict.fromkeys(item.reason for item in wanted)), []).append(kind)
    for reason, kinds in reasons.items():
        yield f"{' and '.join(kinds)} scaling efficiency: {reason}"
