"""Allocations as a fold over records: what is put together, what is worst, and what is kept apart."""

from __future__ import annotations

import dataclasses
import json

import pytest

from bench.measure.allocations import allocations
from tests.unit.report.trial_factory import make_cell, make_record


def record(*, job=None, hosts=("a", "b"), latency=1e-4, rate=1e9, offset=0.0, differences=None, simulated=False, flags=(), trial=0):
    found = {
        "backend": "gloo", "all_reduce_latency_seconds": latency, "all_reduce_bytes": 4 << 20, "all_reduce_bytes_per_second": rate,
        "clocks": {"1": {"offset_seconds": offset, "error_seconds": 1e-4}}, "differences": differences or {}, "seconds": 0.1,
    }  # fmt: skip
    made = make_record(make_cell("sft", "ddp", nodes=len(hosts), global_batch=12), trial)
    parts = [
        dataclasses.replace(part, node=node, hostname=host, facts={**part.facts, "preflight": found})
        for node, (part, host) in enumerate(zip(made.parts, hosts, strict=True))
    ]
    scheduler = None if job is None else {"scheduler": "slurm", "job": job}
    provenance = {**made.provenance, "scheduler": scheduler}
    return dataclasses.replace(made, parts=parts, simulated_nodes=simulated, flags=list(flags), provenance=provenance)


def test_trials_of_one_job_are_one_allocation_with_their_median_and_their_worst():
    trials = [record(job="7", latency=latency, rate=rate) for latency, rate in ((1e-4, 3e9), (3e-4, 1e9), (2e-4, 2e9))]
    (found,) = allocations(trials)
    told = found.as_json()
    assert (told["job"], told["hosts"], told["ranks"], told["backend"], told["trials"]) == ("7", ["a", "b"], 2, "gloo", 3)
    assert told["all_reduce_latency_seconds"] == {"median": 2e-4, "worst": 3e-4}
    assert told["all_reduce_bytes_per_second"] == {"median": 2e9, "worst": 1e9}
    assert json.loads(json.dumps(told)) == told


def test_other_jobs_other_nodes_and_other_numbers_of_ranks_are_kept_apart():
    found = allocations(
        [record(job="7"), record(job="8"), record(job="7", hosts=("a", "c")), record(job="7", hosts=("a", "b", "c")), record(job="7")]
    )
    assert [(it.job, it.hosts, len(it.all_reduce_latency_seconds)) for it in found] == [
        ("7", ("a", "b"), 2),
        ("8", ("a", "b"), 1),
        ("7", ("a", "c"), 1),
        ("7", ("a", "b", "c"), 1),
    ]


def test_the_reading_of_a_clock_that_was_furthest_off_is_kept_whatever_its_sign():
    (found,) = allocations([record(offset=0.1), record(offset=-2.0), record(offset=1.0)])
    assert found.clocks["1"].offset_seconds == -2.0


def test_a_node_that_differs_in_one_trial_is_named():
    (found,) = allocations([record(), record(differences={"1": {"torch": ["2.11.0", "2.5.1"]}}), record()])
    assert found.differences == {"1": {"torch": ["2.11.0", "2.5.1"]}}


def test_hosts_stand_in_the_order_of_their_nodes_and_a_node_that_left_no_part_is_missing():
    whole = record(hosts=("z", "a"))
    (found,) = allocations([dataclasses.replace(whole, parts=list(reversed(whole.parts)))])
    assert found.hosts == ("z", "a")
    (found,) = allocations([dataclasses.replace(whole, parts=whole.parts[1:])])
    assert (found.hosts, found.ranks) == (("a",), 1)


@pytest.mark.parametrize("parts", [[], None])
def test_records_without_a_preflight_are_of_no_allocation(parts):
    made = make_record(make_cell("sft", "naive"), 0)
    assert allocations([made if parts is None else dataclasses.replace(made, parts=parts)]) == []


def test_nodes_that_are_parts_of_one_machine_are_marked():
    (found,) = allocations([record(simulated=True)])
    assert (found.as_json()["simulated_nodes"], found.as_json()["side_by_side"]) == (True, False)


def test_links_that_trials_shared_are_marked():
    (found,) = allocations([record(trial=0), record(trial=1, flags=["side by side"])])
    assert found.as_json()["side_by_side"] is True
