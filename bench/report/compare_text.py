"""A comparison of two result sets in Markdown."""

from __future__ import annotations

from bench.report.bands import COST_SHARE
from bench.report.compare import Change, Changes
from bench.report.metrics import METRICS, primary_metric
from bench.report.pairing import final_metric
from bench.report.statistics import Summary
from bench.report.text import DASH, counted, number, ratio, spread

HEAD = ("cell", "outcomes", "verdict", "speed", "step time", "memory", "losses", "final loss")
LEGEND = (
    "Ratios are candidate over baseline, paired by trial: all of them below 6 pairs, else the median with its 95 % interval. Speed is the "
    "primary metric of the stage. Step time and memory decide nothing, unless the baseline is a reference: then more than 5 % above its "
    "median is a regression. More than 5 % away is marked `!`."
)
SHARE = COST_SHARE
"""Change of step time or memory that is marked: the reference band."""
MOST_BAD = 20
"""Files that are no records which are named; a folder of many suites has hundreds."""
BANDS = ("inside", "outside", "undefined")


def changes_text(changes: Changes) -> str:
    """The comparison as Markdown: what regressed first, then every cell, then what was not compared."""
    lines = [f"# {changes.names[1]} against {changes.names[0]}", "", _summary(changes), ""]
    for title, items in (
        ("Regressions", [f"`{it.cell.cell_id}`: {'; '.join(it.regressions)}" for it in changes.regressions]),
        ("Not the same", [f"{item} ({counted(count, 'cell')}; baseline / candidate)" for item, count in changes.differences.items()]),
    ):
        lines += _listing(title, items)
    for stage in dict.fromkeys(change.cell.stage for change in changes.cells):
        lines += _table(stage, [change for change in changes.cells if change.cell.stage == stage])
    lines += _listing("Not compared", _not_compared(changes))
    lines.append(LEGEND)
    return "\n".join(lines) + "\n"


def _summary(changes: Changes) -> str:
    words = [
        counted(len(changes.cells), "cell is compared", "cells are compared"),
        counted(len(changes.regressions), "regression"),
        *(f"{count} {word}" for word in ("faster", "equal") if (count := sum(change.verdict == word for change in changes.cells))),
        *([counted(count, "cell was mended", "cells were mended")] if (count := sum(change.mended for change in changes.cells)) else []),
        *(f"{count} {word} the reference band" for word in BANDS if (count := sum(change.band == word for change in changes.cells))),
    ]
    return ", ".join(words) + "."


def _listing(title: str, items: list[str]) -> list[str]:
    return [f"## {title}", "", *(f"- {_plain(item)}" for item in items), ""] if items else []


def _not_compared(changes: Changes) -> list[str]:
    sides = ((changes.only_baseline, "in the baseline only"), (changes.only_candidate, "in the candidate only"))
    return [
        *(f"`{cell.cell_id}`: {where}" for cells, where in sides for cell in cells),
        *(f"`{it.cell.cell_id}`: the candidate lacks trial {', '.join(map(str, it.lacking))}" for it in changes.cells if it.lacking),
        *(f"`{bad.file}`: {bad.problem.removeprefix(f'{bad.file}: ')}" for bad in changes.bad_files[:MOST_BAD]),
        *([f"{counted(rest, 'more file')} that are no records"] if (rest := len(changes.bad_files) - MOST_BAD) > 0 else []),
    ]


def _table(stage: str, changes: list[Change]) -> list[str]:
    primary = METRICS[primary_metric(stage)].title
    names = {METRICS[change.memory_name].title for change in changes if change.memory_name}
    heads = [f"{head} ({primary})" if head == "speed" else head for head in HEAD]
    if len(names) == 1:
        heads[HEAD.index("memory")] = f"memory ({names.pop()})"
    if stage == "ppo":
        heads[-1] = "final reward"
    bands = any(change.band for change in changes)
    rows = [[_plain(text) for text in [*_row(change), *([change.band or DASH] if bands else [])]] for change in changes]
    heads += ["reference band"] if bands else []
    return [f"## {stage}", "", _line(heads), _line(["---"] * len(heads)), *map(_line, rows), ""]


def _line(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _plain(text: str) -> str:
    """One line that cannot break a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _row(change: Change) -> list[str]:
    speed = Summary(change.speed.ratios) if change.speed else None
    return [
        f"`{change.cell.cell_id}`", outcomes_text(change), verdict_text(change), ratio_text(speed), ratio_text(change.step_time, mark=True),
        ratio_text(change.memory, mark=True), DASH if change.losses is None else change.losses.state, _final(change),
    ]  # fmt: skip


def outcomes_text(change: Change) -> str:
    """How the trials ended, before and now where that is not the same."""
    before, now = change.baseline.outcomes, change.candidate.outcomes
    return now if before == now else f"{before} → {now}"


def verdict_text(change: Change) -> str:
    """The verdict, with what a reader must know of the windows."""
    trials = (*change.baseline.ok.values(), *change.candidate.ok.values())
    short = change.speed is not None and any(trial.indicative for trial in trials)
    return f"{change.verdict}; indicative" if short else change.verdict


def ratio_text(summary: Summary | None, *, mark: bool = False) -> str:
    """Median ratio with its interval, or all ratios below 6 pairs.

    >>> ratio_text(Summary((1.061, 1.0, 1.102)), mark=True), ratio_text(Summary((1.0,) * 6))
    ('1.061 (1.000 · 1.061 · 1.102) !', '1.000 (1.000 to 1.000, n = 6)')
    """
    if summary is None:
        return DASH
    around = f" ({found})" if (found := spread(summary, ratio)) else ""
    return f"{ratio(summary.middle)}{around}{' !' if mark and abs(summary.middle - 1) > SHARE else ''}"


def _final(change: Change) -> str:
    sides = [side.summary(final_metric(change.cell.stage)) for side in (change.baseline, change.candidate)]
    return DASH if None in sides else " → ".join(number(summary.middle) for summary in sides if summary)
