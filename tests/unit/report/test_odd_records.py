"""Records that this version did not write as they are: listed with what is odd about them, and the others are reported all the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.report.commands import report
from bench.report.compare import compare
from bench.report.inventory import read_inventory
from tests.unit.report.trial_factory import measured_suite, write

CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another id": (lambda it: it.update(cell_id="sft-other"), "says it is of the cell sft-other, and its cell is"),
    "a cell that was changed": (lambda it: it["cell"].update(lora_rank=3), "says it is of the cell"),
    "an unknown strategy": (lambda it: it["cell"].update(strategy="zero9"), "says it is of the cell"),
    "a stage that is no name": (lambda it: it["cell"].update(stage=[]), "has another form"),
    "more nodes than there are": (lambda it: it["cell"].update(nodes=10**9), "less than or equal to 10000"),
    "a machine that is none": (lambda it: it["provenance"].update(machines=[None]), "has another form"),
    "a source that is none": (lambda it: it["provenance"].update(source="x"), "has another form"),
    "devices that are none": (lambda it: it["observed"].update(devices=3), "not a record that can be worked out"),
    "a precision that nobody knows": (lambda it: it["parts"][0]["facts"].update(precision="fp8"), "not a record that can be worked out"),
    "a number of more than 64 bits": (lambda it: it.update(attempt=10**30), "larger than 64 bits"),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_an_odd_record_is_listed_and_the_others_are_reported(tmp_path: Path, name: str) -> None:
    change, words = CHANGES[name]
    records = write(tmp_path / "suite" / "records", *measured_suite())
    files = sorted(records.rglob("*.json"))
    content = json.loads(files[0].read_text(encoding="utf-8"))
    change(content)
    files[0].write_text(json.dumps(content), encoding="utf-8")
    text = report(tmp_path / "suite", tmp_path / "out").markdown.read_text(encoding="utf-8")
    assert files[0].name in text
    assert words in text.replace("\\_", "_")
    assert compare(tmp_path / "suite", tmp_path / "suite") == 0


def test_all_others_of_the_set_are_kept(tmp_path: Path) -> None:
    records = write(tmp_path / "records", *measured_suite())
    files = sorted(records.rglob("*.json"))
    files[0].write_text(files[0].read_text(encoding="utf-8").replace('"cell_id": "', '"cell_id": "x'), encoding="utf-8")
    inventory = read_inventory(records)
    assert (len(inventory.rows), len(inventory.bad_files)) == (len(files) - 1, 1)
