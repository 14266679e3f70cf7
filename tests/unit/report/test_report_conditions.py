"""What one report compares ran under the same conditions, or it says under which others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench.record import Record
from bench.report.analysis import CellResult, read_analysis
from bench.report.headline import answers
from bench.report.page import make_page
from bench.report.scaling import scaled, scaling_tables
from bench.report.tables import claim_cell, ratio_cell
from tests.unit.report.trial_factory import make_cell, make_record, write

GPU: dict[str, Any] = {"device": "cuda", "launcher": "torchrun", "precision": "bf16-master"}
TRIALS = 7


def trials(strategy: str, *, boot: str = "one", versions: dict[str, str | None] | None = None, **cell: Any) -> list[Record]:
    """Trials of a strategy on machines of which this is the start, with these versions."""
    found = [make_record(make_cell("sft", strategy, **GPU | cell), trial, seconds=1.0) for trial in range(TRIALS)]
    return [dataclasses.replace(record, provenance=stated(record, boot, versions or {})) for record in found]


def stated(record: Record, boot: str, versions: dict[str, str | None]) -> dict[str, Any]:
    machines = [{**machine, "boot_id": f"{boot}{node}"} for node, machine in enumerate(record.provenance["machines"])]
    return {**record.provenance, "machines": machines, "versions": {**record.provenance["versions"], **versions}}


def compared(folder: Path, mine: list[Record], naive: list[Record] | None = None) -> tuple[CellResult, tuple[str, ...]]:
    """The row of what is not naive, and what stands below the table."""
    analysis = read_analysis(write(folder / "records", *(naive or trials("naive")), *mine))
    (result,) = (it for it in analysis.results if it.cell.strategy != "naive")
    return result, tuple(make_page(analysis).stages[0].notes)


def test_under_the_same_conditions_there_is_a_verdict_and_nothing_to_say(tmp_path: Path) -> None:
    result, notes = compared(tmp_path, trials("ddp"))
    assert result.verdict == "equal"
    assert not [note for note in notes if "conditions" in note or "machines" in note]


def test_under_other_conditions_there_is_no_ratio_and_they_are_named(tmp_path: Path) -> None:
    result, notes = compared(tmp_path, trials("ddp", versions={"torch": "2.11.0"}))
    assert (claim_cell(result).text, ratio_cell(result).text) == ("no claim (other conditions)", "–")
    assert "Not compared in speed, since naive ran under other conditions (naive's / its own): torch: 2.13.0 / 2.11.0. (1 cell)" in notes


def test_pairs_may_have_run_under_other_conditions_than_other_pairs(tmp_path: Path) -> None:
    naive, ddp = ([*trials(name)[:4], *trials(name, versions={"torch": "2.11.0"})[4:]] for name in ("naive", "ddp"))
    assert compared(tmp_path / "paired", ddp, naive)[0].verdict == "equal"
    result, notes = compared(tmp_path / "one apart", [*trials("ddp")[:3], *ddp[3:4], *trials("ddp")[4:5], *ddp[5:]], naive)
    assert result.verdict == "no claim (other conditions)"
    assert [note for note in notes if "torch: 2.11.0 / 2.13.0. (1 cell)" in note]


@pytest.mark.parametrize("versions", [{"deepspeed": "0.19.8"}, {"deepspeed": None}])
def test_a_package_that_one_side_did_without_is_no_other_condition(tmp_path: Path, versions: dict[str, str | None]) -> None:
    naive = trials("naive", versions={"deepspeed": None if versions["deepspeed"] else "0.19.8"})
    assert compared(tmp_path, trials("deepspeed_zero2", versions=versions), naive)[0].verdict == "equal"


def test_an_image_on_one_side_only_is_another_condition(tmp_path: Path) -> None:
    def inside(records: list[Record], image: str | None) -> list[Record]:
        machines = [[{**machine, "container": image} for machine in record.provenance["machines"]] for record in records]
        return [
            dataclasses.replace(record, provenance={**record.provenance, "machines": found})
            for record, found in zip(records, machines, strict=True)
        ]

    result, notes = compared(tmp_path, inside(trials("ddp"), "coati-bench-current-0123"), inside(trials("naive"), None))
    assert result.verdict == "no claim (other conditions)"
    assert [note for note in notes if "image: none / coati-bench-current-0123. (1 cell)" in note]


def test_a_precision_that_the_strategy_forced_is_told_by_its_flag_and_is_no_other_condition(tmp_path: Path) -> None:
    forced = [
        dataclasses.replace(
            record, parts=[dataclasses.replace(part, facts={**part.facts, "precision": "bf16-pure"}) for part in record.parts]
        )
        for record in trials("gemini")
    ]
    assert compared(tmp_path, forced)[0].verdict == "equal"


def test_another_machine_is_told_beside_the_verdict(tmp_path: Path) -> None:
    result, notes = compared(tmp_path, trials("ddp", boot="two"))
    assert result.verdict == "equal"
    assert "Compared with trials of naive on other machines: what the machines differ in is in the ratio. (1 cell)" in notes


def test_an_answer_says_that_others_ran_on_other_machines(tmp_path: Path) -> None:
    def note(folder: str, boot: str) -> str:
        (answer,) = answers(read_analysis(write(tmp_path / folder / "records", *trials("naive"), *trials("ddp", boot=boot))))
        return answer.fastest_note

    assert note("other", "two") == f"{note('same', 'one')}; on other machines: ddp"


def test_a_machine_that_takes_part_on_both_sides_is_no_other_one(tmp_path: Path) -> None:
    result, _ = compared(tmp_path, trials("ddp", nodes=2))
    assert not result.other_machines


def test_records_that_do_not_name_their_machine_are_not_said_to_differ(tmp_path: Path) -> None:
    unnamed = [make_record(make_cell("sft", "ddp", **GPU), trial, seconds=1.0) for trial in range(TRIALS)]
    assert not compared(tmp_path, unnamed)[0].other_machines


# -- scaling -----------------------------------------------------------------------------------------------------


def doubled(folder: Path, **one_rank: Any) -> tuple[Any, str]:
    """Strong scaling of ddp from one rank under these conditions to two, and the efficiency's cell."""
    results = read_analysis(write(folder / "records", *trials("ddp", **one_rank), *trials("ddp", processes_per_node=2))).results
    (detail,) = scaling_tables(results)
    titles = [column.title for column in detail.table.columns]
    note = detail.table.lines[1].cells[titles.index("strong efficiency")].note if "strong efficiency" in titles else ""
    return scaled(results[1], results, "strong"), note


def test_scaling_from_one_rank_on_another_machine_says_so(tmp_path: Path) -> None:
    found, note = doubled(tmp_path / "other", boot="two")
    assert found.other_machines
    assert note == "0.495 to 0.495, n = 7, one rank on another machine"
    assert doubled(tmp_path / "same")[1] == "0.495 to 0.495, n = 7"


def test_scaling_from_one_rank_under_other_conditions_is_none(tmp_path: Path) -> None:
    found, _ = doubled(tmp_path, versions={"torch": "2.11.0"})
    assert (found.efficiencies, found.reason) == ({}, "on one rank under other conditions: torch: 2.11.0 / 2.13.0")
