"""Preflight over NCCL: on one device what can be seen of it there, on two devices a real link."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.measure.preflight import LARGE_BYTES, preflight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def test_one_rank_finds_no_other_node_and_gives_its_memory_back(group: None) -> None:
    device = torch.device("cuda", 0)
    preflight(device, 0)  # NCCL keeps buffers of its own from its first collective on
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    found = preflight(device, 0)
    assert found["backend"] == "nccl"
    assert (found["clocks"], found["differences"]) == ({}, {})
    assert 0 < found["all_reduce_latency_seconds"] < 0.1
    assert found["all_reduce_bytes"] == LARGE_BYTES["cuda"] == 64 << 20
    assert found["all_reduce_bytes_per_second"] == 0, "2 (n - 1) / n of one rank"
    assert torch.cuda.max_memory_allocated(device) >= LARGE_BYTES["cuda"], "the values lay on the device"
    assert torch.cuda.memory_reserved(device) <= before
    assert found["seconds"] < 10


def _rank(rank: int, port: int, folder: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, device_id=device)
    torch.save(preflight(device, rank), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device has no link to another")
def test_two_ranks_measure_their_link_and_agree_on_it(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, args=(port, str(tmp_path)), nprocs=2)
    found: list[dict[str, Any]] = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert {key: value for key, value in found[0].items() if key != "seconds"} == {
        key: value for key, value in found[1].items() if key != "seconds"
    }
    assert found[0]["backend"] == "nccl"
    assert found[0]["all_reduce_latency_seconds"] < 0.01
    assert 1e9 < found[0]["all_reduce_bytes_per_second"] < 2e12
    clock = found[0]["clocks"]["1"]
    assert abs(clock["offset_seconds"]) <= clock["error_seconds"] + 1e-3, "one machine has one clock"
