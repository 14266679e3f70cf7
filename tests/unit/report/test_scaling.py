"""Scaling efficiency from records: perfect is 1, half is a half, and what is lacking or no measurement has a reason instead."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from bench.record import Record
from bench.report.analysis import Analysis, read_analysis
from bench.report.commands import report
from bench.report.detail_tables import Detail
from bench.report.headline import sentences
from bench.report.scaling import TITLE, scaled, scaling_tables
from tests.unit.report.trial_factory import make_cell, make_record, write

GPU: dict[str, Any] = {"device": "cuda", "model": "bloom-560m", "steps": 50, "precision": "bf16-master"}


def paced(stage: str, *, ranks: int, seconds: float, trials: int = 1, slow: dict[int, float] | None = None, **changes: Any) -> list[Record]:
    """Records of ddp on `ranks` nodes, all ranks with the same laps but those in `slow`."""
    own = {key: value for key, value in GPU.items() if stage != "ppo" or key != "steps"} | ({"iterations": 6} if stage == "ppo" else {})
    marks = {key: changes.pop(key) for key in ("simulated_nodes", "emulated", "launcher") if key in changes}
    cell = make_cell(stage, "ddp", **({"nodes": ranks} | own | changes))
    found = []
    for trial in range(trials):
        record = make_record(cell, trial, seconds=seconds, **marks)
        even = record.parts[0].laps
        parts = [
            dataclasses.replace(
                part, laps=[dataclasses.replace(lap, seconds=lap.seconds * (slow or {}).get(part.rank, 1.0)) for lap in even]
            )
            for part in record.parts
        ]
        found.append(dataclasses.replace(record, parts=parts))
    return found


def analysis_of(folder: Path, *records: Record) -> Analysis:
    return read_analysis(write(folder / "records", *records))


def efficiency(found: Analysis, ranks: int, kind: Any = "strong") -> list[float]:
    (result,) = (it for it in found.results if it.cell.world_size == ranks)
    return list(scaled(result, found.results, kind).efficiencies.values())


def text_of(detail: Detail, title: str) -> list[str]:
    index = [column.title for column in detail.table.columns].index(title)
    return [line.cells[index].text for line in detail.table.lines]


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_half_the_time_on_two_ranks_is_a_strong_efficiency_of_one(tmp_path: Path, stage: str) -> None:
    found = analysis_of(tmp_path, *paced(stage, ranks=1, seconds=8.0), *paced(stage, ranks=2, seconds=4.0))
    assert efficiency(found, 2) == [pytest.approx(1.0)]
    (detail,) = scaling_tables(found.results)
    assert (detail.title, text_of(detail, "strong speedup"), text_of(detail, "strong efficiency")) == (
        TITLE,
        ["–", "2.000"],
        ["–", "1.000"],
    )


def test_the_headline_says_how_well_it_scales(tmp_path: Path) -> None:
    found = analysis_of(tmp_path, *paced("sft", ranks=1, seconds=8.0, trials=2), *paced("sft", ranks=2, seconds=5.0, trials=2))
    assert [text for text in sentences(found) if "scaling" in text] == [
        "Supervised fine-tuning, strong scaling efficiency on 2 ranks: ddp 0.800 (n = 2)."
    ]


def test_the_same_time_on_two_ranks_for_the_same_batch_is_half(tmp_path: Path) -> None:
    found = analysis_of(tmp_path, *paced("sft", ranks=1, seconds=1.0), *paced("sft", ranks=2, seconds=1.0))
    assert efficiency(found, 2) == [pytest.approx(0.5)]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize(("seconds", "expected"), [(4.0, 1.0), (8.0, 0.5)])
def test_weak_scaling_keeps_the_batch_of_a_rank(tmp_path: Path, stage: str, seconds: float, expected: float) -> None:
    many = paced(stage, ranks=4, seconds=seconds, scaling="weak")
    if stage == "ppo":  # the factory's rollouts are those of strong scaling
        many = [dataclasses.replace(it, parts=[fourfold(part) for part in it.parts]) for it in many]
    found = analysis_of(tmp_path, *paced(stage, ranks=1, seconds=4.0, scaling="weak"), *many)
    assert efficiency(found, 4, "weak") == [pytest.approx(expected)]
    assert efficiency(found, 4, "strong") == []


def fourfold(part: Any) -> Any:
    laps = [dataclasses.replace(lap, counts={unit: 4 * count for unit, count in lap.counts.items()}) for lap in part.laps]
    return dataclasses.replace(part, laps=laps)


def test_a_strong_cell_on_one_rank_is_the_base_of_weak_ones_too(tmp_path: Path) -> None:
    found = analysis_of(tmp_path, *paced("sft", ranks=1, seconds=1.0), *paced("sft", ranks=2, seconds=1.0, scaling="weak"))
    assert efficiency(found, 2, "weak") == [pytest.approx(1.0)]


def test_trials_are_paired_by_number_and_enough_of_them_have_an_interval(tmp_path: Path) -> None:
    one = [record for trial in range(6) for record in paced("sft", ranks=1, seconds=1.0 + 0.1 * trial, trials=trial + 1)[trial:]]
    two = [record for trial in range(6) for record in paced("sft", ranks=2, seconds=0.5 + 0.05 * trial, trials=trial + 1)[trial:]]
    found = analysis_of(tmp_path, *one, *two)
    assert efficiency(found, 2) == [pytest.approx(1.0)] * 6
    (detail,) = scaling_tables(found.results)
    index = [column.title for column in detail.table.columns].index("strong efficiency")
    assert [line.cells[index].note for line in detail.table.lines] == ["", "1.000 to 1.000, n = 6"]


def test_a_missing_base_is_told(tmp_path: Path) -> None:
    found = analysis_of(tmp_path, *paced("sft", ranks=2, seconds=1.0), *paced("sft", ranks=4, seconds=0.5))
    assert efficiency(found, 4) == []
    (detail,) = scaling_tables(found.results)
    assert "strong scaling efficiency: no record of ddp on one rank with the same batch of a step" in detail.absent


def test_another_batch_is_no_base(tmp_path: Path) -> None:
    found = analysis_of(tmp_path, *paced("sft", ranks=1, seconds=1.0, global_batch=16), *paced("sft", ranks=2, seconds=0.5))
    assert (efficiency(found, 2, "strong"), efficiency(found, 2, "weak")) == ([], [])


@pytest.mark.parametrize("mark", [{"simulated_nodes": True}, {"emulated": True}, {"launcher": "fork"}])
def test_what_is_no_measurement_has_no_efficiency_and_says_why(tmp_path: Path, mark: dict[str, Any]) -> None:
    found = analysis_of(tmp_path, *paced("sft", ranks=1, seconds=1.0), *paced("sft", ranks=2, seconds=0.5, **mark))
    assert efficiency(found, 2) == []
    (detail,) = scaling_tables(found.results)
    assert any("not a measurement: " in reason for reason in detail.absent)
    index = [column.title for column in detail.table.columns].index("step time by node")
    assert [line.cells[index].kind for line in detail.table.lines] == ["", "muted"]


def test_one_number_of_ranks_has_no_section(tmp_path: Path) -> None:
    found = analysis_of(tmp_path, *paced("sft", ranks=2, seconds=1.0), *paced("rm", ranks=1, seconds=1.0))
    assert scaling_tables(found.of_stage("sft")) == []


def test_a_slow_node_is_seen(tmp_path: Path) -> None:
    slow = paced("sft", ranks=3, seconds=1.0, slow={1: 1.5}, global_batch=12)
    found = analysis_of(tmp_path, *paced("sft", ranks=1, seconds=3.0, global_batch=12), *slow)
    (detail,) = scaling_tables(found.results)
    assert text_of(detail, "step time by node") == ["3.000", "1.000 · 1.500 · 1.000"]
    (result,) = (it for it in found.results if it.cell.nodes == 3)
    assert [trial.values["slowest_node_ratio"].number for trial in result.ok] == [pytest.approx(1.5)]
    assert efficiency(found, 3) == [pytest.approx(1 / 1.5)]


def test_a_node_is_as_slow_as_its_slowest_rank(tmp_path: Path) -> None:
    slow = paced("sft", ranks=2, seconds=1.0, slow={1: 2.0, 2: 1.25}, processes_per_node=2)
    found = analysis_of(tmp_path, *paced("sft", ranks=1, seconds=4.0), *slow)
    (detail,) = scaling_tables(found.results)
    assert text_of(detail, "step time by node") == ["4.000", "2.000 · 1.250"]


def test_report_and_data_have_the_efficiency(tmp_path: Path) -> None:
    write(tmp_path / "records", *paced("sft", ranks=1, seconds=1.0, trials=2), *paced("sft", ranks=2, seconds=0.5, trials=2))
    paths = report(tmp_path / "records", tmp_path / "out")
    assert "Scaling" in paths.markdown.read_text(encoding="utf-8")
    assert "Scaling" in paths.html.read_text(encoding="utf-8")
    rows = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    found = {(row["nodes"], row["trial"]): row["strong_scaling_efficiency"] for row in rows}
    assert found == {(1, 0): None, (1, 1): None, (2, 0): pytest.approx(1.0), (2, 1): pytest.approx(1.0)}


def test_a_strategy_stands_together_by_its_number_of_ranks(tmp_path: Path) -> None:
    cells = [make_cell("sft", strategy, nodes=ranks, **GPU | {"global_batch": 12}) for ranks in (3, 1, 2) for strategy in ("ddp", "zero1")]
    records = [make_record(cell, 0) for cell in cells]
    (detail,) = scaling_tables(analysis_of(tmp_path, *records).results)
    rows = list(zip(text_of(detail, "strategy"), text_of(detail, "nodes × ranks"), strict=True))
    assert rows == [(strategy, f"{ranks} × 1") for strategy in ("ddp", "zero1") for ranks in (1, 2, 3)]
    assert [line.starts_group for line in detail.table.lines] == [True, False, False, True, False, False]


def test_one_reason_for_both_kinds_is_said_once(tmp_path: Path) -> None:
    found = analysis_of(tmp_path, *paced("sft", ranks=1, seconds=8.0), *paced("sft", ranks=2, seconds=4.0, simulated_nodes=True))
    (detail,) = scaling_tables(found.results)
    (told,) = detail.absent
    assert told.startswith("strong and weak scaling efficiency: not a measurement: ")
