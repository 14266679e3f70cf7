from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench.record import Record
from bench.report.commands import report
from bench.report.inventory import Row
from bench.report.metrics import METRICS, Trial
from bench.report.registry import Given
from tests.unit.report.trial_factory import GIB, make_cell, make_record, write

GPU: dict[str, Any] = {"device": "cuda", "model": "bloom-560m", "precision": "bf16-master"}
SFT = make_cell("sft", steps=50, **GPU)
H100 = "NVIDIA H100 80GB HBM3"


def trial_of(record: Record, given: Given | None = None) -> Trial:
    return Trial(Row(record, record.parsed_cell, "a.json"), given or Given())


def with_laps(record: Record, **changes: Any) -> Record:
    """The record with every lap changed; callables get the lap."""
    laps = [
        dataclasses.replace(lap, **{name: new(lap) if callable(new) else new for name, new in changes.items()})
        for lap in record.parts[0].laps
    ]
    return dataclasses.replace(record, parts=[dataclasses.replace(record.parts[0], laps=laps)])


def test_possible_trials_are_left_alone() -> None:
    assert trial_of(make_record(SFT)).impossible == ()
    assert trial_of(make_record(make_cell("rm", steps=50, **GPU))).impossible == ()
    assert trial_of(make_record(make_cell("ppo", iterations=8, **GPU), seconds=20.0)).impossible == ()


def test_a_share_above_the_peak_withholds_every_time_and_no_count() -> None:
    """2.06 TFLOP a step in 1 ms: twice what an H100 can multiply."""
    trial = trial_of(make_record(SFT, seconds=0.001))
    assert [text.split(":")[0] for text in trial.impossible] == ["MFU above 100 %", "HFU above 100 %"]
    for name, value in trial.values.items():
        if METRICS[name].is_time:
            assert str(value.reason).startswith("withheld: MFU above 100 %"), name
    assert trial.values["final_loss"].number is not None
    assert trial.values["peak_allocated_gib"].number == pytest.approx(4.0)
    assert trial.values["model_tflop_per_step"].number is not None


def test_faster_than_the_matrix_products_of_the_node() -> None:
    record = make_record(SFT, seconds=0.01)
    assert trial_of(record).impossible == ()
    found = trial_of(record, Given(ceilings={H100: {"bf16": 100e12}})).impossible
    assert [text.split(":")[0] for text in found] == ["faster than the matrix products of the same node"]


def test_learning_faster_than_the_peak() -> None:
    record = make_record(make_cell("ppo", iterations=8, **GPU), seconds=0.2)
    quick = with_laps(record, phases=lambda lap: {**lap.phases, "policy_learn": 1e-3, "critic_learn": 1e-3})
    assert [text[:15] for text in trial_of(quick).impossible] == ["MFU above 100 %"]
    assert trial_of(quick).impossible[0].endswith("(learning alone)")


def test_decoding_faster_than_the_memory() -> None:
    record = make_record(make_cell("ppo", iterations=8, **GPU), seconds=2.0)
    quick = with_laps(record, phases=lambda lap: {**lap.phases, "rollout_decode": 1e-2})
    assert [text[:15] for text in trial_of(quick).impossible] == ["MBU above 100 %"]


def test_memory_above_the_card_withholds_that_figure_only() -> None:
    record = make_record(SFT)
    facts = {**record.parts[0].facts, "device_total_bytes": 4 * GIB + GIB // 2}
    found = trial_of(dataclasses.replace(record, parts=[dataclasses.replace(record.parts[0], facts=facts)]))
    reserved, device = ("memory above the card: 5.0 GiB, the card has 4.5 GiB", "memory above the card: 6.5 GiB, the card has 4.5 GiB")
    assert found.impossible == (reserved, device)
    assert found.values["peak_reserved_gib"].reason == f"withheld: {reserved}"
    assert found.values["peak_allocated_gib"].number == pytest.approx(4.0)
    assert found.values["step_seconds"].number is not None


def test_host_memory_is_held_to_the_host_and_not_to_the_card() -> None:
    record = make_record(SFT)
    memory = dataclasses.replace(record.parts[0].memory, host_peak_bytes=23 * GIB)
    facts = {**record.parts[0].facts, "device_total_bytes": 8 * GIB}
    big = dataclasses.replace(record, parts=[dataclasses.replace(record.parts[0], memory=memory, facts=facts)])
    assert trial_of(big).values["host_peak_gib"].number == pytest.approx(23)
    more = dataclasses.replace(big, parts=[dataclasses.replace(big.parts[0], memory=dataclasses.replace(memory, host_peak_bytes=25 * GIB))])
    assert str(trial_of(more).values["host_peak_gib"].reason).startswith("withheld: 25.0 GiB of 24.0 GiB that the node has")


@pytest.mark.parametrize(
    ("stage", "changes", "said"),
    [
        ("sft", {"counts": lambda lap: {**lap.counts, "sequences": 44}}, "220 sequences counted in 25 steps, which have 200"),
        ("sft", {"counts": lambda lap: {**lap.counts, "tokens": 9999}}, "49995 tokens of 24000 tokens with padding"),
        ("sft", {"counts": lambda lap: {**lap.counts, "loss_tokens": 9999}}, "49995 loss tokens of 24000 tokens with padding"),
        ("rm", {"counts": lambda lap: {**lap.counts, "sequences": 88}}, "440 sequences counted in 25 steps, which have 400"),
        ("ppo", {"counts": lambda lap: {**lap.counts, "response_tokens": 32 * 65}}, "12480 response tokens in 192 sequences of at most 64"),
        ("ppo", {"counts": lambda lap: {**lap.counts, "sequences": 33}}, "198 sequences counted in 6 steps, which have 192"),
    ],
)
def test_more_work_than_the_cell_gives(stage: str, changes: dict[str, Any], said: str) -> None:
    """Steps of 8 rows (pairs: 16 sequences), 5 a lap; PPO: 32 prompts and responses of 64 tokens."""
    cell = make_cell(stage, **({"iterations": 8} if stage == "ppo" else {"steps": 50}), **GPU)
    assert trial_of(with_laps(make_record(cell, seconds=20.0), **changes)).impossible[0] == f"more work than there was: {said}"


def test_a_step_of_weak_scaling_has_more_rows() -> None:
    cell = make_cell("sft", "ddp", nodes=2, scaling="weak", steps=50, **GPU)
    assert trial_of(make_record(cell, seconds=1.0)).impossible == ()


def test_laps_that_are_longer_than_the_whole_trial() -> None:
    record = dataclasses.replace(make_record(SFT, seconds=1.0), observed={"seconds": 20.0})
    said = "tokens and time do not match: laps of 25.0 s in a trial that the supervisor saw last 20.0 s"
    assert trial_of(record).impossible == (said,)
    assert trial_of(record).values["loss_tokens_per_second"].reason == f"withheld: {said}"


def test_nothing_is_asked_of_clocks_that_do_not_count() -> None:
    assert trial_of(make_record(SFT, seconds=0.001, emulated=True)).impossible == ()


def test_an_impossible_row_is_struck_with_the_reason_and_never_ranked(tmp_path: Path) -> None:
    cells = [make_cell("sft", name, steps=50, **GPU) for name in ("naive", "ddp", "zero2")]
    records = [make_record(cells[0]), make_record(cells[1]), make_record(cells[2], seconds=0.001)]
    paths = report(write(tmp_path / "suite" / "records", *records), tmp_path / "out")
    text = paths.markdown.read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| zero2 | full | 1 × 1 | "))
    assert row.startswith("| zero2 | full | 1 × 1 | impossible \\[MFU above 100 %: ")
    assert "| – | struck | – |" in row
    assert "impossible: MFU above 100 %" in text.split("## Struck")[1]
    assert "highest throughput naive" in text
    entry = next(row for row in csv.DictReader(paths.csv.read_text(encoding="utf-8").splitlines()) if row["strategy"] == "zero2")
    assert entry["loss_tokens_per_second"] == entry["mfu"] == ""
    assert entry["impossible"].startswith("MFU above 100 %")
    assert entry["final_loss"]
