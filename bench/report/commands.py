"""What the verb `report` does."""

from __future__ import annotations

from pathlib import Path

from bench.layout import Layout
from bench.report.make import ReportPaths, make_report


def report(records: Path, output: Path) -> ReportPaths:
    """Make the report of a folder of records, or of a suite's folder that has one (results/<suite>).

    The suite's plan.json beside the records and the stored records under results/references are used where they exist.
    Raises UserError where there are no records.
    """
    root = records if Layout(records).records.is_dir() else records.parent
    folder = Layout(root).records if root is records else records
    plan = Layout(root).plan
    references = root.parent / "references"
    return make_report(folder, output, plan=plan if plan.is_file() else None, references=references if references.is_dir() else None)
