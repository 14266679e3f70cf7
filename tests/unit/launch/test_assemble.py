"""From parts to a record."""

from __future__ import annotations

import json

import pytest

from bench.cell import cell_from_json
from bench.launch.assemble import assemble, is_indicative, make_provenance
from bench.launch.classify import Verdict
from bench.record import Lap, Part, load_record, save_record
from bench.trial import make_trial


def trial(tmp_path, **settings):
    cell = {
        "stage": "sft",
        "model": "bloom-tiny",
        "strategy": "ddp",
        "processes_per_node": 2,
        "steps": 3,
        "global_batch": 4,
        "device": "cpu",
    }
    return make_trial(cell_from_json({**cell, **settings}), 2, work=str(tmp_path))


def part(rank=0, laps=12, steps=5, seconds=10.0):
    found = [Lap(first_step=index * steps, steps=steps, seconds=seconds, counts={}) for index in range(laps)]
    return Part(rank=rank, local_rank=rank, node=0, world_size=2, hostname="h", pid=1, outcome="ok", laps=found)


def make(a_trial, parts=(), **more):
    return assemble(a_trial, Verdict("ok"), launcher="torchrun", simulated_nodes=False, parts=list(parts), **more)


def test_a_record_of_all_parts_is_valid_and_has_them_in_the_order_of_ranks(tmp_path):
    record = make(trial(tmp_path), [part(1), part(0)])
    save_record(record, tmp_path / "record.json")
    assert load_record(tmp_path / "record.json") == record
    assert [item.rank for item in record.parts] == [0, 1]
    assert (record.seed, record.trial, record.flags, record.emulated) == (44, 2, [], False)


def test_missing_ranks_old_semantics_and_forced_settings_are_flags(tmp_path):
    record = make(trial(tmp_path, strategy="gemini", precision="bf16-master", semantics="coati-0.2.8", optimizer="fused"), [part(1)])
    assert "missing ranks: 0" in record.flags
    assert "semantics: lora-alpha-1" in record.flags
    assert "forced: optimizer=adamw" in record.flags
    assert record.emulated


@pytest.mark.parametrize(
    ("stage", "laps", "steps", "seconds", "expected"),
    [
        ("sft", 11, 5, 10.0, False),
        ("sft", 10, 5, 12.0, True),
        ("sft", 11, 5, 9.9, True),
        ("sft", 4, 5, 100.0, True),
        ("ppo", 7, 1, 24.0, False),
        ("ppo", 6, 1, 60.0, True),
        ("ppo", 7, 1, 23.0, True),
    ],
)
def test_a_window_shorter_than_30_steps_or_60_seconds_after_the_warm_up_is_indicative(stage, laps, steps, seconds, expected):
    assert is_indicative(stage, [part(0, laps, steps, seconds)]) is expected


def test_every_node_that_told_what_it_is_stands_in_the_provenance(tmp_path):
    two = trial(tmp_path, nodes=2, processes_per_node=1)
    for node in range(2):
        (tmp_path / f"node{node}.json").write_text(json.dumps({"machine": {"hostname": f"n{node}"}, "versions": {"torch": "9"}}))
    found = make_provenance(two, command=["x"], variables={"NCCL_DEBUG": "INFO", "HOME": "/h"}, started="a", ended="b")
    assert [machine["hostname"] for machine in found["machines"]] == ["n0", "n1"]
    assert found["versions"] == {"torch": "9"}
    assert found["environment"] == {"NCCL_DEBUG": "INFO"}
    (tmp_path / "node0.json").write_text("{")
    assert len(make_provenance(two, command=[], variables={}, started="a", ended="b")["machines"]) == 1
