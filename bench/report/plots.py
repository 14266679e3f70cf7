"""The figures of a report: which curves and bars belong together, and what stands below them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Any, NamedTuple

from markupsafe import Markup

from bench.cell import Cell
from bench.differences import settings_of, told_apart, written
from bench.report.analysis import Analysis, CellResult
from bench.report.inventory import BASELINE
from bench.report.metrics import METRICS, NoValue, phase_means, primary_metric
from bench.report.parity import FP32_CURVE, HALF_CURVE, HALF_STEPS, deviations, losses
from bench.report.ranking import memory_metric
from bench.report.svg import DASHES, Bar, Change, Curve, bar_chart, change_chart, line_chart
from bench.report.text import number, shape
from bench.stages.base import SPECS

MOST_POINTS = 160
LEAST_DEVIATION = 1e-9
"""Where a curve of deviations that are exactly 0 is drawn."""
STYLES = len(DASHES)
OTHER = "other"
"""The phase of what no phase claims."""
HELD_OUT_SHOWN = {"sft": ("loss",), "rm": ("accuracy", "margin"), "ppo": ("reward", "kl")}


class Label(NamedTuple):
    """How a figure names a cell."""

    name: str
    """Strategy and ranks."""
    settings: str
    """What else tells it from its neighbours."""

    @property
    def whole(self) -> str:
        """Both in one line."""
        return f"{self.name} {self.settings}".rstrip()


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart of a figure."""

    heading: str
    svg: Markup


@dataclass(frozen=True, slots=True)
class Figure:
    """Panels with one caption and one legend (label, style, strategy)."""

    title: str
    caption: str
    panels: tuple[Panel, ...]
    legend: tuple[tuple[str, int, str], ...] = ()
    kind: str = "line"
    """`line` or `box`: how the legend's keys look."""


def style_of(strategy: str, analysis: Analysis) -> int:
    """Colour and dash of a strategy, the same in every figure; 0 is `naive`."""
    others = [name for name in analysis.strategies if name != BASELINE]
    return 0 if strategy == BASELINE else 1 + others.index(strategy) % (STYLES - 1)


def stage_figures(analysis: Analysis, stage: str) -> list[Figure]:
    """The figures of one stage, those without data left out."""
    results = [result for result in analysis.of_stage(stage) if result.ok]
    makers = (_loss_curves, _deviation_curves, _ppo_curves, _held_out, _speed_bars, _memory_bars, _phase_bars)
    return [figure for make in makers for figure in make(analysis, stage, results)]


def _facets(results: Sequence[CellResult]) -> Iterator[tuple[str, dict[CellResult, Label]]]:
    """Cells by model and LoRA rank, with their labels, and a heading; in each in the order of strategy, ranks and settings."""
    several_models = len({result.cell.model for result in results}) > 1
    for (model, rank), members in groupby(results, key=lambda it: (it.cell.model, it.cell.lora_rank)):
        heading = f"LoRA rank {rank}" if rank else "full fine-tuning"
        yield (f"{model} · {heading}" if several_models else heading), _labels(sorted(members, key=_order))


def _order(result: CellResult) -> tuple[object, ...]:
    cell = result.cell
    settings = tuple(_value_order(value) for value in settings_of(cell).values())
    return (cell.strategy != BASELINE, cell.strategy, cell.nodes, cell.processes_per_node, settings, cell.cell_id)


def _value_order(value: Any) -> tuple[bool, float, str]:
    """Sort key of a setting's value: numbers by size, then everything else as it is written."""
    numeric = isinstance(value, int | float)
    return (not numeric, float(value) if numeric else 0.0, written(value))


def _labels(members: Sequence[CellResult]) -> dict[CellResult, Label]:
    """Of each, its strategy and what else tells it from its neighbours."""
    names, contents = [_name(it.cell) for it in members], [settings_of(it.cell) for it in members]
    precisions = [content.pop("precision") for content in contents]
    several = len(set(precisions)) > 1
    told = told_apart(contents, names)
    return {
        it: Label(name, ", ".join(filter(None, (precision if several else "", settings))))
        for it, name, precision, settings in zip(members, names, precisions, told, strict=True)
    }


def _name(cell: Cell) -> str:
    """Strategy, ranks if there are several, and whether a package was somebody's own checkout."""
    ranks = [] if cell.world_size == 1 else [shape(cell)]
    return " ".join([cell.strategy, *ranks, *(["modified"] if cell.settings.overlay is not None else [])])


def _legend(analysis: Analysis, results: Sequence[CellResult]) -> tuple[tuple[str, int, str], ...]:
    names = {result.cell.strategy for result in results}
    return tuple((name, style_of(name, analysis), name) for name in analysis.strategies if name in names)


def middle_curve(series: Sequence[Sequence[float]]) -> list[float]:
    """Median over trials of each step, as far as all trials have it."""
    return [median(values) for values in zip(*series, strict=False)]


def _curve(label: str, ys: Sequence[float], style: int, group: str) -> Curve:
    """Every so-many-th point of a long series, and always the last."""
    step = max(1, -(-len(ys) // MOST_POINTS))
    chosen = sorted({*range(0, len(ys), step), len(ys) - 1})
    return Curve(label, [ys[index] for index in chosen], style, chosen, group)


# -- curves ------------------------------------------------------------------------------------------------------


def _series_figure(analysis: Analysis, results: Sequence[CellResult], name: str, x_label: str, y_label: str) -> list[Panel]:
    panels = []
    for heading, members in _facets(results):
        curves = []
        for result in _naive_first(members):
            series = [trial.lead.series[name] for trial in result.ok if trial.record.lead and trial.lead.series.get(name)]
            if series:
                style = style_of(result.cell.strategy, analysis)
                curves.append(_curve(members[result].whole, middle_curve(series), style, result.cell.strategy))
        if curves:
            panels.append(Panel(heading, line_chart(curves, title=f"{name}, {heading}", x_label=x_label, y_label=y_label)))
    return panels


def _naive_first(members: Iterable[CellResult]) -> list[CellResult]:
    return sorted(members, key=lambda it: it.cell.strategy != BASELINE)


def _loss_curves(analysis: Analysis, stage: str, results: Sequence[CellResult]) -> Iterator[Figure]:
    # PPO's surrogate is in units of whitened advantages: it has none
    panels = _series_figure(analysis, results, "loss", "step", "policy loss" if stage == "ppo" else "loss (nats)")
    if panels:
        what = "Policy loss" if stage == "ppo" else "Training loss"
        trials = " Lines are medians over trials." if any(len(result.ok) > 1 for result in results) else ""
        caption = f"{what} of each step over all ranks. naive is the wide grey band; a strategy that agrees lies on it.{trials}"
        yield Figure(what, caption, tuple(panels), _legend(analysis, results))


def _deviation_curves(analysis: Analysis, stage: str, results: Sequence[CellResult]) -> Iterator[Figure]:
    panels, shown = [], []
    for heading, members in _facets(results):
        curves = []
        for result in members:
            gaps = _gaps(analysis, result)
            if gaps:
                shown.append(result)
                curves.append(_curve(members[result].whole, gaps, style_of(result.cell.strategy, analysis), result.cell.strategy))
        if curves:
            title = f"deviation from naive, {heading}"
            limits = _limits(members)
            svg = line_chart(curves, title=title, x_label="step", y_label="relative deviation", log=True, limits=limits)
            panels.append(Panel(heading, svg))
    if panels:
        rest = " PPO is judged by the first iteration's steps only: later ones learn from sampled tokens." if stage == "ppo" else ""
        caption = (
            "Relative deviation of the loss from naive's, first trial that has a partner, on a logarithmic axis; exact agreement is drawn "
            f"at 1e-9.{rest}"
        )
        yield Figure("Deviation from naive", caption, tuple(panels), _legend(analysis, shown))


def _limits(members: Iterable[CellResult]) -> list[tuple[float, str]]:
    """The allowed deviations of the precisions among `members`."""
    partners = {item.single for result in members for item in result.parities if item.curve is not None}
    known = {True: (FP32_CURVE, "allowed in fp32"), False: (HALF_CURVE, f"allowed in 16 bits, mean of {HALF_STEPS} steps")}
    return [known[single] for single in sorted(partners)]


def _gaps(analysis: Analysis, result: CellResult) -> list[float]:
    for file, trial in zip(result.files, result.trials, strict=True):
        parity = analysis.parities.get(file)
        if parity is not None and parity.partner is not None:
            gaps = deviations(losses(trial.record), losses(analysis.trials[parity.partner].record), result.cell.stage)
            return [max(gap, LEAST_DEVIATION) for gap in gaps]
    return []


def _ppo_curves(analysis: Analysis, stage: str, results: Sequence[CellResult]) -> Iterator[Figure]:
    if stage != "ppo":
        return
    for name, title, axis, caption in (
        ("reward", "Reward", "reward", "Mean reward of each iteration's rollouts, before the KL penalty."),
        ("kl", "KL", "KL (nats)", "KL of policy and reference policy on each iteration's rollouts, in nats; 0 before the first update."),
    ):
        panels = _series_figure(analysis, results, name, "iteration", axis)
        if panels:
            yield Figure(title, caption, tuple(panels), _legend(analysis, results))


# -- before and after --------------------------------------------------------------------------------------------


def _held_out(analysis: Analysis, stage: str, results: Sequence[CellResult]) -> Iterator[Figure]:
    for name in HELD_OUT_SHOWN[stage]:
        panels = []
        for heading, members in _facets(results):
            changes = [change for result, label in members.items() if (change := _change(analysis, result, label, name))]
            if changes:
                unit = METRICS[f"held_out_{name}_after"].unit
                axis = name if unit == name else f"{name} ({unit})"
                panels.append(Panel(heading, change_chart(changes, title=f"held-out {name} before and after, {heading}", unit=axis)))
        if panels:
            better = SPECS[stage].held_out[name]
            caption = f"Held-out {name} before (ring) and after (dot) training, medians over trials; {better} is better."
            yield Figure(f"Held-out {name}", caption, tuple(panels))


def _change(analysis: Analysis, result: CellResult, label: Label, name: str) -> Change | None:
    before, after = (result.summary(f"held_out_{name}_{edge}") for edge in ("before", "after"))
    if before is None or after is None:
        return None
    strategy = result.cell.strategy
    return Change(label.name, before.middle, after.middle, style_of(strategy, analysis), strategy, label.settings)


# -- bars --------------------------------------------------------------------------------------------------------


def _metric_bars(analysis: Analysis, results: Sequence[CellResult], name: str) -> list[Panel]:
    panels = []
    for heading, members in _facets([result for result in results if result.clock_problem is None and not result.struck]):
        bars = []
        for result in members:
            summary = result.summary(name)
            if summary:
                style = style_of(result.cell.strategy, analysis)
                bars.append(
                    Bar(
                        members[result].name,
                        (("median", summary.middle, style),),
                        number(summary.middle),
                        result.cell.strategy,
                        summary.points,
                        members[result].settings,
                    )
                )
        if bars:
            panels.append(Panel(heading, bar_chart(bars, title=f"{METRICS[name].title}, {heading}", unit=METRICS[name].unit)))
    return panels


def _speed_bars(analysis: Analysis, stage: str, results: Sequence[CellResult]) -> Iterator[Figure]:
    name = primary_metric(stage)
    panels = _metric_bars(analysis, results, name)
    if panels:
        yield Figure(
            "Throughput",
            f"{METRICS[name].title.capitalize()}, median over trials; the table has the spread. Measured cells that are not struck.",
            tuple(panels),
        )


def _memory_bars(analysis: Analysis, _stage: str, results: Sequence[CellResult]) -> Iterator[Figure]:
    name = memory_metric(results)
    panels = _metric_bars(analysis, results, name)
    if panels:
        yield Figure(
            "Memory", f"{METRICS[name].title.capitalize()}: {METRICS[name].explanation} Measured cells that are not struck.", tuple(panels)
        )


def _phase_bars(_analysis: Analysis, stage: str, results: Sequence[CellResult]) -> Iterator[Figure]:
    means = {result: mean for result in results if stage == "ppo" and (mean := _phases(result))}
    names = dict.fromkeys(name for mean in means.values() for name in mean if name != OTHER)
    styles = {name: 1 + index % (STYLES - 1) for index, name in enumerate(names)} | {OTHER: 0}
    panels = []
    for heading, members in _facets([result for result in results if result in means]):
        bars = [
            Bar(
                label.name,
                tuple((name, value, styles[name]) for name, value in means[it].items()),
                group=it.cell.strategy,
                settings=label.settings,
            )
            for it, label in members.items()
        ]
        panels.append(Panel(heading, bar_chart(bars, title=f"phases of an iteration, {heading}", unit="seconds per iteration")))
    if panels:
        problem = next((result.clock_problem for result in means if result.clock_problem), None)
        warning = f" Not a measurement ({problem}): it shows only which phases ran." if problem else ""
        caption = f"Mean seconds of each phase of an iteration over all ranks, first trial.{warning}"
        legend = tuple((name.replace("_", " "), style, "") for name, style in styles.items())
        yield Figure("Phases of an iteration", caption, tuple(panels), legend, "box")


def _phases(result: CellResult) -> dict[str, float]:
    try:
        return phase_means(result.ok[0])
    except NoValue:
        return {}
