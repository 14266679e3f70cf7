"""The table of nodes: figures, what is greyed, who is named, and how many names fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.record import SIDE_BY_SIDE
from bench.report.analysis import read_analysis
from bench.report.commands import report
from bench.report.nodes import TITLE, node_tables
from bench.report.tables import TableCell
from tests.unit.measure.test_allocations import record
from tests.unit.report.trial_factory import make_cell, make_record, write


def table(folder: Path, *records: Any) -> list[dict[str, TableCell]]:
    found = read_analysis(write(folder / "records", *records))
    (detail,) = node_tables(found.results)
    assert detail.title == TITLE
    return [dict(zip((it.title for it in detail.table.columns), line.cells, strict=True)) for line in detail.table.lines]


def test_a_row_has_the_network_the_clock_and_nobody_who_differs(tmp_path: Path) -> None:
    trials = [record(job="7", trial=0, latency=1e-4, rate=2e9, offset=0.002), record(job="7", trial=1, latency=3e-4, rate=1e9)]
    (row,) = table(tmp_path, *trials)
    assert {name: cell.text for name, cell in row.items()} == {
        "job": "7", "nodes": "a, b", "ranks": "2", "trials": "2", "all-reduce latency": "200.0", "all-reduce bandwidth": "1.500",
        "clock offset": "+2.00", "differs": "none",
    }  # fmt: skip
    assert (row["all-reduce latency"].note, row["all-reduce bandwidth"].note) == ("worst 300.0", "worst 1.000")
    assert row["clock offset"].note == "± 0.10, node 1"
    assert row["all-reduce bandwidth"].kind == ""


@pytest.mark.parametrize("changes", [{"simulated": True}, {"flags": [SIDE_BY_SIDE]}])
def test_nodes_of_one_machine_and_trials_side_by_side_have_a_greyed_network(tmp_path: Path, changes: dict[str, Any]) -> None:
    (row,) = table(tmp_path, record(**changes))
    assert (row["all-reduce latency"].kind, row["all-reduce bandwidth"].kind) == ("muted", "muted")


def test_a_node_that_differs_is_named_with_what(tmp_path: Path) -> None:
    (row,) = table(tmp_path, record(differences={"1": {"torch": ["2.11.0", "2.5.1"]}}))
    assert (row["differs"].text, row["differs"].kind, row["differs"].hint) == ("node 1", "bad", "node 1: torch")


def test_many_names_are_shortened_and_stand_in_the_hint(tmp_path: Path) -> None:
    hosts = tuple(f"n{number}" for number in range(6))
    (row,) = table(tmp_path, record(hosts=hosts))
    assert (row["nodes"].text, row["nodes"].note, row["nodes"].hint) == ("n0, n1, n2 … n5", "6 nodes", ", ".join(hosts))


def test_trials_of_one_rank_have_no_table_of_nodes(tmp_path: Path) -> None:
    assert node_tables(read_analysis(write(tmp_path / "records", make_record(make_cell("sft", "naive"), 0))).results) == []


def test_the_report_has_the_table_in_both_renderings(tmp_path: Path) -> None:
    report(write(tmp_path / "records", record(job="4711")), tmp_path / "out")
    for name in ("report.html", "report.md"):
        text = (tmp_path / "out" / name).read_text()
        assert TITLE in text
        assert "4711" in text
