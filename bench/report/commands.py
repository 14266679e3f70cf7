"""What the verb `report` does."""

from __future__ import annotations

from pathlib import Path

from bench.layout import Layout
from bench.report.ceilings import ceilings_beside, read_ceilings
from bench.report.make import ReportPaths, make_report
from bench.report.registry import Given


def report(records: Path, output: Path, *, price: float | None = None, ceilings: Path | None = None) -> ReportPaths:
    """Make the report of a folder of records, or of a suite's folder that has one (results/<suite>).

    The suite's plan.json beside the records, the stored records under results/references and files of ceilings are used where they
    exist. `price` is that of a device-hour, `ceilings` another file of them. Raises UserError where there are no records.
    """
    root = records if Layout(records).records.is_dir() else records.parent
    folder = Layout(root).records if root is records else records
    plan = Layout(root).plan
    references = root.parent / "references"
    given = Given(price=price, ceilings=read_ceilings([ceilings] if ceilings else ceilings_beside(root)))
    return make_report(
        folder, output, plan=plan if plan.is_file() else None, references=references if references.is_dir() else None, given=given
    )
