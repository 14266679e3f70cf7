"""From records to a report: a pure function. The same records give the same bytes; no clock, host or folder enters."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.files import write_whole
from bench.report.analysis import read_analysis
from bench.report.export import csv_text, parquet_bytes, result_rows, result_table
from bench.report.html import html
from bench.report.markdown import markdown
from bench.report.page import make_page
from bench.report.registry import NOTHING, Given


class ReportPaths(NamedTuple):
    """The files of a report."""

    html: Path
    markdown: Path
    parquet: Path
    csv: Path


@contextmanager
def without_collector() -> Iterator[None]:
    """Records are trees; looking for cycles among those of many thousand takes a fifth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@without_collector()
def make_report(
    records: Path, output: Path, *, plan: Path | None = None, references: Path | None = None, given: Given = NOTHING
) -> ReportPaths:
    """Write report.html, report.md, results.parquet and results.csv into `output`.

    `plan` (plan.json) adds what was skipped and what is missing; `references` (stored records) adds the reference band; `given` what no
    record says.
    Raises UserError where there are no records, MachineError where the disk refuses: then all four are the old ones. Files that are no
    valid records are named in the report, not dropped.
    """
    analysis = read_analysis(records, plan, references, given)
    page = make_page(analysis)
    paths = ReportPaths(*(output / name for name in ("report.html", "report.md", "results.parquet", "results.csv")))
    table = result_table(result_rows(analysis))
    write_whole({paths.html: html(page), paths.markdown: markdown(page), paths.parquet: parquet_bytes(table), paths.csv: csv_text(table)})
    return paths
