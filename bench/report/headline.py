"""The answer in words: what ran, whether losses agree, what is fastest and what fits, and how far that can be believed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

from bench.cell import Cell
from bench.differences import IDENTITY, settings_of, titled, told_apart
from bench.report.analysis import Analysis, CellResult
from bench.report.metrics import METRICS, primary_metric
from bench.report.parity import NOTHING_TRAINED, compared
from bench.report.ranking import Leaders, RankedSet
from bench.report.scaling import KINDS, scaled
from bench.report.statistics import Summary
from bench.report.text import DASH, counted, listed, lora, number, ratio, shape, spread
from bench.stages.base import SPECS

MOST_FAILING = 4
"""Strategies with failed trials that the headline names."""
MOST_SCALING = 3
"""Strategies whose scaling the headline names."""
MOST_OUTSIDE = 3
"""Cells outside the reference band that the headline names."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One number of the summary strip."""

    label: str
    value: str
    note: str = ""
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """Which strategy is fastest and which needs least memory in one comparison set."""

    question: str
    fastest: str
    fastest_note: str
    leanest: str
    leanest_note: str


def sentences(analysis: Analysis) -> list[str]:
    """The headline, most important first."""
    return [
        _what_ran(analysis),
        *_idle(analysis),
        _whether_losses_agree(analysis),
        *_impossible(analysis),
        *_bands(analysis),
        *_speed(analysis),
        *_quality(analysis),
    ]


def _what_ran(analysis: Analysis) -> str:
    outcomes, plan = analysis.outcomes, analysis.inventory.plan
    failed = {name: count for name, count in sorted(outcomes.items()) if name != "ok"}
    total = sum(outcomes.values())
    parts = [f"{outcomes['ok']} of {counted(total, 'trial')} ended ok" if failed else f"All {total} trials ended ok"]
    if failed:
        how = "; ".join(f"{count} {name}: {_of_strategies(analysis, name)}" for name, count in failed.items())
        parts.append(f"{sum(failed.values())} did not ({how})")
    if plan is not None:
        parts.append(
            f"{counted(len(plan.skipped), 'cell was', 'cells were')} skipped as impossible" if plan.skipped else "no cell was skipped"
        )
    if analysis.inventory.missing:
        parts.append(f"{counted(len(analysis.inventory.missing), 'planned trial has', 'planned trials have')} no record")
    return f"{listed(parts)}."


def _of_strategies(analysis: Analysis, outcome: str) -> str:
    """Whose trials ended so, with what tells them from other cells of the strategy; the first ones by name, the others counted."""
    cells = [result.cell for result in analysis.results]
    told = told_apart([settings_of(cell) for cell in cells], [tuple(getattr(cell, name) for name in IDENTITY) for cell in cells])
    failing = [(result.cell.strategy, apart) for result, apart in zip(analysis.results, told, strict=True) if outcome in result.outcomes]
    found = list(dict.fromkeys(f"{name} [{apart}]" if apart else name for name, apart in failing))
    rest = len(found) - MOST_FAILING
    return listed([*found[:MOST_FAILING], f"{rest} more"] if rest > 1 else found)


def _idle(analysis: Analysis) -> Iterator[str]:
    """What looks fine and is not: trials in which nothing carried loss."""
    idle = [analysis.trials[file].cell for file, parity in analysis.parities.items() if parity.reason == NOTHING_TRAINED]
    if idle:
        stages = listed([SPECS[stage].title for stage in SPECS if any(cell.stage == stage for cell in idle)])
        what = counted(len(idle), "trial that ended ok", "trials that ended ok")
        yield f"{what} trained nothing ({stages}): no token carried loss, so their losses say nothing and they are struck."


def _impossible(analysis: Analysis) -> Iterator[str]:
    """What physics speaks against."""
    trials = [trial for result in analysis.results for trial in result.ok if trial.impossible]
    if trials:
        which = listed(sorted({trial.cell.strategy for trial in trials}))
        what = counted(len(trials), "trial has", "trials have")
        yield f"{what} numbers that cannot be true ({which}): {trials[0].impossible[0]}. They are withheld, and the rows are struck."


def parity_states(analysis: Analysis) -> Counter[str]:
    """How many ok trials have which parity verdict, those that trained nothing left out."""
    return Counter(parity.state for parity in analysis.parities.values() if parity.reason != NOTHING_TRAINED)


def _judged(states: Counter[str]) -> int:
    """Trials whose losses were held to those of others."""
    return states["agrees"] + states["peers agree"] + states["struck"]


def _whether_losses_agree(analysis: Analysis) -> str:
    states = parity_states(analysis)
    judged = _judged(states)
    if not judged:
        return "No trial could be compared with naive, so nothing says whether the strategies compute the same."
    rest = f" {counted(states['no partner'], 'trial has', 'trials have')} no partner to be compared with." if states["no partner"] else ""
    if not states["struck"]:
        return " ".join(_agreements(analysis, states)) + rest
    which = sorted(
        {
            analysis.trials[file].cell.strategy
            for file, parity in analysis.parities.items()
            if parity.state == "struck" and parity.reason != NOTHING_TRAINED
        }
    )
    return (
        f"Losses do not all agree: {states['struck']} of {counted(judged, 'comparable trial')} ({listed(which)}) "
        f"{'is' if states['struck'] == 1 else 'are'} struck and not ranked.{rest}"
    )


def _agreements(analysis: Analysis, states: Counter[str]) -> Iterator[str]:
    if states["agrees"]:
        yield f"Losses agree: {_all(states['agrees'])} with naive within tolerance{_worst(analysis, 'agrees')}."
    if states["peers agree"]:
        which = counted(states["peers agree"], "trial has", "trials have")
        worst = _worst(analysis, "peers agree")
        yield f"{which} no naive to be compared with but agree with each other{worst}; an error that all share would not show."


def _all(judged: int) -> str:
    return "the one comparable trial agrees" if judged == 1 else f"all {judged} comparable trials agree"


def _worst(analysis: Analysis, state: str) -> str:
    """Largest deviation of the trials in `state`, in fp32 and in 16 bits, in brackets; empty without any."""
    largest: dict[str, float] = {}
    for parity in analysis.parities.values():
        if parity.state == state and parity.largest is not None:
            kind = "fp32" if parity.single else "16 bits"
            largest[kind] = max(largest.get(kind, 0.0), parity.largest)
    figures = listed([f"{f'{value:.1e}' if value else 0} in {kind}" for kind, value in sorted(largest.items(), reverse=True)])
    return f" (largest deviation {figures})" if largest else ""


def _speed(analysis: Analysis) -> Iterator[str]:
    if not analysis.measured:
        reasons = sorted({result.clock_problem for result in analysis.results if result.clock_problem})
        if reasons:
            yield f"No time or memory is claimed: {listed(reasons)}. Such figures are greyed and never compared."
        return
    for stage in analysis.stages:
        if sentence := _stage_sentence(stage, [item for item in analysis.ranked_sets if item.cell.stage == stage]):
            yield sentence
        yield from _scaling(analysis, stage)


def _scaling(analysis: Analysis, stage: str) -> Iterator[str]:
    """How well the strategies scale from one rank to the most that ran, the best ones by name."""
    results = analysis.of_stage(stage)
    for kind in KINDS:
        efficient = [(result, it) for result in results if (it := scaled(result, results, kind)).efficiencies]
        most = max((result.cell.world_size for result, _ in efficient), default=0)
        found = [(median(it.efficiencies.values()), result, it) for result, it in efficient if result.cell.world_size == most]
        shown = sorted(found, key=lambda item: -item[0])[:MOST_SCALING]
        rest = [f"{len(found) - MOST_SCALING} lower"] if len(found) > MOST_SCALING else []
        if shown:
            words = listed([f"{result.cell.strategy} {ratio(value)}" for value, result, _ in shown] + rest)
            notes = [f"n = {min(len(it.efficiencies) for *_, it in shown)}"]
            notes += ["one rank ran on other machines"] * any(it.other_machines for *_, it in shown)
            yield f"{SPECS[stage].title}, {kind} scaling efficiency on {most} ranks: {words} ({'; '.join(notes)})."


def _stage_sentence(stage: str, sets: list[RankedSet]) -> str:
    fastest, leanest = [it for item in sets if (it := item.fastest)], [it for item in sets if (it := item.leanest)]
    if not fastest:
        return ""
    backed = sum(it.backed for it in fastest)
    claim = f" ({'observed' if backed == 0 else f'by the statistics in {backed}, else observed'}{_left_out(fastest)})"
    words = f"{SPECS[stage].title}: highest throughput {_winners(fastest)}{claim if backed < len(fastest) else _left_out(fastest, ' ({})')}"
    return words + (f"; least memory {_winners(leanest)} (observed)." if leanest else ".")


def _left_out(found: list[Leaders], form: str = "; {}") -> str:
    names = list(dict.fromkeys(name for it in found for name in it.left_out))
    return form.format(f"under other conditions: {listed(names)}") if names else ""


def _winners(found: list[Leaders]) -> str:
    """Who leads, and in how many comparisons, those that several lead within the practical threshold under the best of them."""
    if len(found) == 1:
        return found[0].text
    counts = Counter(it.results[0].cell.strategy for it in found)
    ordered, total = sorted(counts.items(), key=lambda item: (-item[1], item[0])), len(found)
    return (
        f"{ordered[0][0]} in {'both' if total == 2 else f'all {total}'} comparisons"
        if len(ordered) == 1
        else listed([f"{name} in {count}{f' of {total} comparisons' if not place else ''}" for place, (name, count) in enumerate(ordered)])
    )


def _bands(analysis: Analysis) -> Iterator[str]:
    """Whether a suite repeats its stored records; said of a reference suite even where there is none of this device."""
    states, total = Counter(band.state for band in analysis.bands.values()), len(analysis.bands)
    if not total and analysis.inventory.title in analysis.reference_suites:
        yield "No reference band: of these cells there is no stored record of this device."
    elif total and total == states["inside"]:
        which = "the one trial" if total == 1 else f"all {total} trials"
        yield f"Inside the reference band: {which} with a stored record of this device."
    elif total:
        rest = [f"{states[state]} {state}" for state in ("inside", "undefined") if states[state] not in (0, total)]
        word, count = ("Outside", states["outside"]) if states["outside"] else ("Not judged by", states["undefined"])
        which = f"{count} of {counted(total, 'trial')} with a stored record{f' ({listed(rest)})' if rest else ''}"
        yield f"{word} the reference band: {which}{_why_outside(analysis)}."


def _why_outside(analysis: Analysis) -> str:
    """The first cells that are outside, each with its first check."""
    found: dict[str, str] = {}
    for file, band in analysis.bands.items():
        check = next((check for check in band.checks if check.state == "outside"), None)
        if check is not None:
            cell = analysis.trials[file].cell
            adapters = f"LoRA {lora(cell)}" if cell.lora_rank else "full"
            found.setdefault(f"{cell.stage} {cell.strategy} {adapters}", f"{check.name} {check.text}")
    shown = [f"{cell}: {text}" for cell, text in list(found.items())[:MOST_OUTSIDE]]
    rest = [counted(len(found) - MOST_OUTSIDE, "more cell")] if len(found) > MOST_OUTSIDE else []
    return f"; {'; '.join([*shown, *rest])}" if shown else ""


def _quality(analysis: Analysis) -> Iterator[str]:
    if analysis.random_weights and analysis.results:
        yield "Random weights: no quality claim. Held-out figures only show that training learns, and serve parity."


# -- answers -----------------------------------------------------------------------------------------------------


def answers(analysis: Analysis) -> list[Answer]:
    """One answer for each comparison set with two measured strategies at least."""
    found = []
    questions = _questions(analysis)
    for item in analysis.ranked_sets:
        fastest, leanest = item.fastest, item.leanest
        speed = (fastest.text, _note(fastest)) if fastest else (DASH, "no two strategies ran under the same conditions")
        memory = (leanest.text, _note(leanest)) if leanest else (DASH, "no figure of memory for two strategies")
        if fastest or leanest:
            found.append(Answer(questions[item.cell], *speed, *memory))
    return found


def _questions(analysis: Analysis) -> dict[Cell, str]:
    """What each set is about, by its cell, and where others are named alike the settings that tell it from them."""
    cells = [result.cell for result in analysis.results]
    models, precisions = {it.model for it in cells}, {it.settings.precision for it in cells}
    words = partial(_set_name, models=len(models) > 1, precisions=len(precisions) > 1)
    return titled((item.cell for item in analysis.ranked_sets), words, " · ", compared)


def _set_name(cell: Cell, *, models: bool, precisions: bool) -> str:
    """Stage, LoRA rank and ranks; model and precision where there are several of them."""
    adapters = f"LoRA {lora(cell)}" if cell.lora_rank else "full"
    parts = [SPECS[cell.stage].title, *([cell.model] if models else []), adapters, shape(cell)]
    return " · ".join(parts + ([cell.settings.precision] if precisions else []))


def _note(leaders: Leaders) -> str:
    """The figure, how far it can be believed, and who was not ranked or ran elsewhere."""
    first = leaders.results[0]
    summary = first.summary(leaders.metric)
    assert summary is not None
    count = "" if summary.interval else f"n = {len(summary.points)}"
    claim = _claim(first, backed=leaders.backed) if leaders.metric == primary_metric(first.cell.stage) else ""
    words = f"{number(summary.middle)} {METRICS[leaders.metric].unit} ({', '.join(filter(None, (spread(summary), count)))}{claim})"
    why = "under other conditions" if claim else "without this figure"
    rest = [(leaders.left_out, f"not ranked, {why}"), (leaders.elsewhere, "on other machines")]
    return "; ".join([words, *(f"{text}: {listed(list(names))}" for names, text in rest if names)])


def _claim(result: CellResult, *, backed: bool) -> str:
    """The verdict against `naive`, with the ratio that it is about."""
    if result.comparison is None:
        return "; " + (result.verdict if result.verdict != "baseline" else "no other is faster" if backed else "observed")
    around = spread(Summary(result.comparison.ratios), ratio)
    where = " on 1 rank" if result.cell.world_size > 1 else ""
    return f"; {result.verdict}, {ratio(result.comparison.middle)} x naive{where}{f' ({around})' if around else ''}"


def tiles(analysis: Analysis) -> list[Tile]:
    """The summary strip."""
    outcomes, states, plan = analysis.outcomes, parity_states(analysis), analysis.inventory.plan
    failed, total = sum(outcomes.values()) - outcomes["ok"], sum(outcomes.values())
    judged = _judged(states)
    strips = [
        Tile("trials ok", str(outcomes["ok"]), f"of {total}", "good" if failed == 0 else ""),
        Tile("failed", str(failed), "a failure is a result", "bad" if failed else ""),
        Tile(
            "losses agree",
            f"{states['agrees'] + states['peers agree']}",
            f"of {judged} compared with {_partner_words(states)}",
            "bad" if states["struck"] else "good" if judged else "",
        ),
        Tile("strategies", str(len(analysis.strategies)), f"in {counted(len(analysis.stages), 'stage')}"),
    ]
    if plan is not None:
        strips.insert(2, Tile("skipped", str(len(plan.skipped)), "impossible, with reasons"))
        strips.insert(
            3, Tile("missing", str(len(analysis.inventory.missing)), "planned, no record", "warn" if analysis.inventory.missing else "")
        )
    return strips


def _partner_words(states: Counter[str]) -> str:
    """What losses were held to."""
    if not states["peers agree"]:
        return "naive"
    return "naive or each other" if states["agrees"] else "each other (no naive)"
