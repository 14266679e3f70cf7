"""report.md: the same tables for a terminal or a code host."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from bench.report.page import STATE_WORDS, SYMBOLS, Notice, Page, StagePart
from bench.report.tables import Column, Table, TableCell
from bench.report.text import counted

SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")
MOST_LISTED = 20


def plain(text: str) -> str:
    r"""`text` so that Markdown and HTML leave it alone, on one line.

    >>> plain("a|b <script>")
    'a\\|b \\<script\\>'
    """
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))


def code_block(text: str) -> str:
    """`text` as a fenced block whose fence it cannot close."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def markdown(page: Page) -> str:
    """Return the report as Markdown."""
    parts = [f"# {plain(page.title)}", *(plain(sentence) for sentence in page.sentences)]
    parts.append(_table(["", *(tile.label for tile in page.tiles)], [["", *(f"{tile.value} {tile.note}".strip() for tile in page.tiles)]]))
    if page.answers:
        rows = [[it.question, it.fastest, it.fastest_note, it.leanest, it.leanest_note] for it in page.answers]
        parts += ["## Answers", _table(["comparison", "highest throughput", "", "least memory", ""], rows)]
    for stage in page.stages:
        parts += _stage(stage)
    parts += _failures(page)
    for title, notices in (("Struck", page.struck), ("Skipped", page.skipped)):
        parts += _notices(title, notices)
    if page.missing:
        parts += ["## Missing", _listed(page.missing)]
    if page.bad_files:
        parts += ["## Files that are no records", _listed([f"{item.file}: {item.problem}" for item in page.bad_files])]
    parts += ["## Provenance", _table(["what", "value"], [[fact.name, fact.value] for fact in (*page.run, *page.provenance)])]
    rows = [[item.name, item.kind, item.sha256, "; ".join(f"{fact.name} {fact.value}" for fact in item.facts)] for item in page.data]
    parts.append(_table(["data", "kind", "sha256", "facts"], rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[bool] = ()) -> str:
    rule = ["---:" if wide else "---" for wide in numeric] or ["---"] * len(heads)
    lines = [[plain(head) for head in heads], rule, *([plain(entry) for entry in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if len(lines) > 2 else ""


def _stage(stage: StagePart) -> Iterator[str]:
    yield f"## {plain(stage.title)}"
    heads = [" · ".join(parts) for parts in stage.grid.columns]
    yield _table(["strategy", *heads], [[name, *(SYMBOLS.get(state, "") for state in states)] for name, states in stage.grid.lines])
    yield plain("; ".join(f"{SYMBOLS[state]} {STATE_WORDS[state]}" for state in stage.grid.states) + ".")
    yield _results(stage.table)
    if stage.notes:
        yield _listed(stage.notes)
    for detail in stage.details:
        yield f"### {plain(stage.title)}: {plain(detail.title)}"
        yield _results(detail.table)
        yield plain(f"No value: {'. '.join(detail.absent)}.") if detail.absent else ""
    yield plain("Held fixed: " + ", ".join(f"{name} {value}" for name, value in stage.table.fixed) + ".")


def _results(table: Table) -> str:
    rows = [[_entry(entry) for entry in line.cells] for line in table.lines]
    return _table([_head(column) for column in table.columns], rows, [column.numeric for column in table.columns])


def _head(column: Column) -> str:
    return f"{column.title} ({column.unit})" if column.unit else column.title


def _entry(entry: TableCell) -> str:
    text = f"({entry.text})" if entry.kind == "muted" and entry.text[:1].isdigit() else entry.text
    return f"{text} [{entry.note}]" if entry.note else text


def _failures(page: Page) -> Iterator[str]:
    if page.failures:
        yield "## Failures"
    for item in page.failures:
        memory = f" ({item.memory})" if item.memory else ""
        yield f"- **{plain(item.outcome)}** {plain(item.cell)} · trial {item.trial}: {plain(item.reason + memory)}"
        if item.log:
            yield code_block(item.log)


def _notices(title: str, notices: Sequence[Notice]) -> Iterator[str]:
    if notices:
        yield f"## {title}"
        yield _listed([f"{notice.reason} ({counted(len(notice.cells), 'cell')}: {_some(notice.cells)})" for notice in notices])


def _some(cells: Sequence[str]) -> str:
    rest = len(cells) - MOST_LISTED
    return "; ".join([*cells[:MOST_LISTED], f"and {rest} more"] if rest > 0 else cells)


def _listed(items: Iterable[str]) -> str:
    return "\n".join(f"- {plain(item)}" for item in items)
