"""From parts to a record."""

from __future__ import annotations

import json
import platform

import pytest

from bench.cell import cell_from_json
from bench.launch.assemble import assemble, is_indicative, make_provenance
from bench.launch.classify import Verdict
from bench.launch.rank import node_path
from bench.measure.provenance import versions
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


def test_an_image_whose_environment_is_not_the_committed_one_is_a_flag(tmp_path):
    record = make(trial(tmp_path), [part(0), part(1)], provenance={"image": {"environment_committed": False}})
    assert "environment not the committed one" in record.flags


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


def note(folder, node, *, torch="9", **environment):
    content = {"machine": {"hostname": f"n{node}"}, "versions": {"torch": torch}, "environment": {"NCCL_DEBUG": "INFO", **environment}}
    (folder / f"node{node}.json").write_text(json.dumps(content))


def provenance_of(a_trial):
    return make_provenance(a_trial, command=["x"], variables={"NCCL_DEBUG": "WARN", "HOME": "/h"}, started="a", ended="b")


def test_every_node_that_told_what_it_is_stands_in_the_provenance(tmp_path):
    two = trial(tmp_path, nodes=2, processes_per_node=1)
    for node in range(2):
        note(tmp_path, node, CUDA_VISIBLE_DEVICES=f"GPU-{node}")
    found = provenance_of(two)
    assert found["machines"] == [{"node": 0, "hostname": "n0"}, {"node": 1, "hostname": "n1"}]
    assert (found["versions"], found["missing_nodes"], found["node_differences"]) == ({"torch": "9"}, [], {})
    assert found["environment"] == {"NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "GPU-0"}, "as the first node's ranks saw it"


def test_a_node_that_told_nothing_is_missing_and_one_that_differs_is_told(tmp_path):
    three = trial(tmp_path, nodes=3, processes_per_node=1)
    note(tmp_path, 0)
    note(tmp_path, 2, torch="8", OMP_NUM_THREADS="4")
    (tmp_path / "node1.json").write_text("{")
    found = provenance_of(three)
    assert [machine["node"] for machine in found["machines"]] == [0, 2]
    assert found["missing_nodes"] == [1]
    assert found["node_differences"] == {"2": {"versions": {"torch": "8"}, "environment": {"OMP_NUM_THREADS": "4"}}}


def test_without_a_word_from_any_node_this_machine_is_described(tmp_path):
    found = provenance_of(trial(tmp_path))
    (machine,) = found["machines"]
    assert machine["hostname"] == platform.node()
    assert {"numa", "network", "fabric", "devices", "links", "ceilings", "cpu_governor"} <= machine.keys()
    assert (found["missing_nodes"], found["environment"]) == ([], {"NCCL_DEBUG": "WARN"})


def test_a_job_of_the_scheduler_and_the_model_s_source_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    found = provenance_of(trial(tmp_path, model="bloom-560m", weights="pretrained"))
    assert found["scheduler"]["job"] == "4711"
    assert found["model"]["hub_id"] == "bigscience/bloom-560m"
    assert len(found["model"]["revision"]) == 40
    assert provenance_of(trial(tmp_path))["model"] == {"name": "bloom-tiny", "weights": "random", "hub_id": None, "revision": None}


@pytest.mark.parametrize(
    ("torch", "cuda", "other"),
    [
        ("2.13.0+cpu", None, {}),
        ("2.11.0", "13.0", {}),
        ("2.11.1", "13.0", {"torch": "2.11.1, locked 2.11.0"}),
    ],
)
def test_a_record_says_which_versions_are_not_the_locked_ones(tmp_path, torch, cuda, other):
    seen = {**versions(), "torch": torch, "cuda": cuda, **({"triton": "3.6.0"} if cuda else {})}
    note = {"machine": {"hostname": "h"}, "versions": seen, "environment": {}}
    node_path(tmp_path, 0).write_text(json.dumps(note))
    assert make_provenance(trial(tmp_path), command=[], variables={}, started="", ended="")["not_locked"] == other
