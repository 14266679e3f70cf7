"""The report says of every cell whether its strategy was active, with figures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bench.record import Check, Evidence, Record
from bench.report.commands import report
from tests.unit.report.trial_factory import make_cell, make_record, write


def check(what: str, state: str = "shown", model: str = "policy", **rest: Any) -> Check:
    return Check(what=what, model=model, state=state, **{"text": f"{what} in words", **rest})  # type: ignore[arg-type]


def with_evidence(record: Record, *checks: Check) -> Record:
    return dataclasses.replace(
        record, parts=[dataclasses.replace(part, evidence=Evidence(checks=list(checks))) for part in record.parts]
    )  # fmt: skip


def markdown(folder: Path, *records: Record) -> str:
    write(folder / "records", *records)
    report(folder / "records", folder / "report")
    return (folder / "report" / "report.md").read_text(encoding="utf-8")


def row_of(text: str, strategy: str) -> str:
    table = text.partition("### Supervised fine-tuning: Evidence")[2].partition("\n\n")[2].partition("\n\n")[0]
    return next(line for line in table.replace("\\", "").splitlines() if line.startswith(f"| {strategy} "))


SHARED = check("optimizer", seen=1_449_984.0, expected=1_449_472.0, unit="bytes")
REDUCED = check("reduced", seen=2_898_944.0, expected=1_449_472.0, unit="bytes")


def test_figures_stand_beside_the_verdict(tmp_path):
    zero2 = make_record(make_cell("sft", "zero2", nodes=2))
    text = markdown(tmp_path, with_evidence(zero2, SHARED, REDUCED, check("gathered", "not applicable")))
    row = row_of(text, "zero2")
    assert "shown [2 checks]" in row
    assert "1.00 [1.383 MiB]" in row
    assert "2.00 [2.765 MiB]" in row


def test_a_refuted_check_outweighs_all_others_and_its_reason_is_on_the_page(tmp_path):
    record = with_evidence(
        make_record(make_cell("sft", "zero2", nodes=2)), REDUCED, dataclasses.replace(SHARED, state="refuted", seen=2.9e6)
    )
    record = dataclasses.replace(record, outcome="invalid", reason="rank 0: evidence refutes that zero2 is active: too much of it")
    text = markdown(tmp_path, record)
    assert "refuted [1 check]" in row_of(text, "zero2")
    assert "2.00 [2.766 MiB]" in row_of(text, "zero2")
    assert "evidence refutes that zero2 is active: too much of it" in text
    html = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "policy, optimizer: optimizer in words." in html


def test_one_rank_that_refutes_is_enough(tmp_path):
    record = make_record(make_cell("sft", "zero2", nodes=2))
    first, second = with_evidence(record, SHARED).parts[0], with_evidence(record, dataclasses.replace(SHARED, state="refuted")).parts[1]
    assert "refuted" in row_of(markdown(tmp_path, dataclasses.replace(record, parts=[first, second])), "zero2")


def test_records_older_than_evidence_have_a_dash_and_no_table_of_their_own(tmp_path):
    old, new = make_record(make_cell("sft", "naive")), make_record(make_cell("sft", "ddp", nodes=2))
    assert "Evidence" not in markdown(tmp_path / "old", old)
    text = markdown(tmp_path / "both", old, with_evidence(new, REDUCED))
    assert "| – |" in row_of(text, "naive")


def test_what_does_not_apply_to_any_cell_has_no_column(tmp_path):
    checks = (check("trainable", seen=10.0, expected=10.0), check("gathered", "not applicable"))
    text = markdown(tmp_path, with_evidence(make_record(make_cell("sft", "naive")), *checks))
    assert "gathered" not in text.partition("Evidence")[2].partition("## Provenance")[0]
    assert "| 10 |" in row_of(text, "naive")
