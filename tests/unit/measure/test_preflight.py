"""Preflight over real process groups of gloo: what it measures, whose clock is off, which node is not like the first."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import pytest
import torch

import bench.measure.preflight as module
from bench.measure.preflight import Seen, preflight, preflight_flags, summed_up
from bench.record import Part
from tests.contract.rank_harness import run_ranks


def rank_of_a_group() -> int:
    return torch.distributed.get_rank()


def on_nodes(ahead: float = 0.0, other: dict[str, str | None] | None = None) -> dict[str, Any]:
    """Preflight with one rank a node; the second node's clock is `ahead` and it runs `other` code."""
    second = rank_of_a_group() == 1
    clock, code = time.time, module.code_identity()
    with (
        patch.object(module.time, "time", lambda: clock() + (ahead if second else 0.0)),
        patch.object(module, "code_identity", lambda: code | (other or {} if second else {})),
    ):
        return preflight(torch.device("cpu"), rank_of_a_group())


def part(found: dict[str, Any]) -> Part:
    return Part(rank=0, local_rank=0, node=0, world_size=2, hostname="h", pid=1, outcome="ok", facts={"preflight": found})


@pytest.mark.parametrize("ranks", [2, 3])
def test_equal_nodes_are_measured_in_little_time_and_raise_no_flag(ranks: int) -> None:
    found = run_ranks(on_nodes, ranks)
    shared = [{key: value for key, value in it.items() if key != "seconds"} for it in found]
    assert all(it == shared[0] for it in shared), "every rank knows the same"
    first = found[0]
    assert first["backend"] == "gloo"
    assert 0 < first["all_reduce_latency_seconds"] < 0.5
    assert 1e6 < first["all_reduce_bytes_per_second"] < 1e12
    assert first["differences"] == {}
    assert first["clocks"].keys() == {str(node) for node in range(1, ranks)}
    assert all(abs(it["offset_seconds"]) <= it["error_seconds"] + 1e-3 for it in first["clocks"].values()), "one machine has one clock"
    assert max(it["seconds"] for it in found) < 2
    assert preflight_flags([part(first)]) == []


@pytest.mark.parametrize("ahead", [5.0, -3.0])
def test_a_clock_that_is_off_is_found_and_its_node_named(ahead: float) -> None:
    found = run_ranks(on_nodes, 2, ahead)[0]
    clock = found["clocks"]["1"]
    assert clock["offset_seconds"] == pytest.approx(ahead, abs=clock["error_seconds"] + 1e-3)
    assert clock["error_seconds"] < 0.25
    assert preflight_flags([part(found)]) == [f"the clock of node 1 is off by {ahead:+.1f} s"]


def test_a_node_with_other_code_is_named_with_what_differs() -> None:
    found = run_ranks(on_nodes, 2, 0.0, {"package_sha256": "f" * 64, "torch": "0.1"})[0]
    assert found["differences"]["1"].keys() == {"package_sha256", "torch"}
    (flag,) = preflight_flags([part(found)])
    assert flag.startswith("node 1 is not the same as the first: package_sha256 ffffffffffff instead of ")
    assert "torch 0.1 instead of " in flag


def seen(rank: int, node: int, large: float, latency: float = 1e-3, **code: str) -> Seen:
    return Seen(rank=rank, node=node, latency_seconds=latency, large_seconds=large, entries=[0.0, 1.0], exits=[0.5, 1.1], code=code)


def test_bandwidth_is_that_of_the_slowest_rank_whatever_the_number_of_ranks() -> None:
    found = summed_up([seen(0, 0, 0.5), seen(1, 0, 1.0), seen(2, 1, 0.5, latency=2e-3), seen(3, 1, 0.5)], 100)
    assert found["all_reduce_bytes_per_second"] == pytest.approx(2 * 3 / 4 * 100)
    assert found["all_reduce_latency_seconds"] == 2e-3


def test_the_tightest_exchange_bounds_the_clock() -> None:
    clock = summed_up([seen(0, 0, 1.0), seen(1, 1, 1.0)], 100)["clocks"]["1"]
    assert clock == {"offset_seconds": pytest.approx(0.0), "error_seconds": pytest.approx(0.1)}


def test_ranks_of_one_node_have_no_clocks_to_compare() -> None:
    found = summed_up([seen(0, 0, 1.0, torch="1"), seen(1, 0, 1.0, torch="2")], 100)
    assert (found["clocks"], found["differences"]) == ({}, {})


def test_records_without_preflight_have_no_flags() -> None:
    assert preflight_flags([Part(rank=0, local_rank=0, node=0, world_size=1, hostname="h", pid=1, outcome="ok")]) == []
