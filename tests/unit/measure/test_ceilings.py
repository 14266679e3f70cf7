from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.measure import ceilings

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def small(monkeypatch):
    """Seconds instead of minutes; the arithmetic is the same."""
    monkeypatch.setitem(ceilings.MATRIX_SIZE, "cpu", 96)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 1 << 20)


def test_every_ceiling_is_a_rate_or_null_with_a_note(small):
    found = ceilings.measure_ceilings("cpu")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found["matrix_flops_per_second"]) == {"fp32", "bf16"}
    assert all(rate > 0 for rate in found["matrix_flops_per_second"].values())
    assert found["copy_bytes_per_second"] > 0
    assert found["host_to_device_bytes_per_second"] is None
    assert found["all_reduce"] is None
    assert found["notes"] == {"links": "a CPU has no link to a device", "all_reduce": "no process group with more than one rank"}


class Clock:
    """A monotonic clock on which each timed piece of work takes as long as it is told."""

    def __init__(self, seconds):
        self.now, self.seconds, self.reads = 0.0, list(seconds), 0

    def __call__(self):
        self.reads += 1
        if self.reads % 2 == 0:
            self.now += self.seconds[(self.reads // 2 - 1) % len(self.seconds)]
        return self.now


def test_a_rate_is_work_over_the_median_time(small, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", Clock([1.0, 2.0, 2.0, 2.0, 50.0]))
    assert ceilings.matrix_rate("cpu", "fp32", size=64) == 2 * 64**3 / 2.0
    monkeypatch.setattr(time, "perf_counter", Clock([1.0, 2.0, 2.0, 2.0, 50.0]))
    rate, spread = ceilings.copy_bandwidth(torch.device("cpu"))
    assert (rate, spread) == (2 * (1 << 20) / 2.0, 24.5)


def test_operands_are_random_and_take_turns(small, monkeypatch):
    seen = []

    def product(left, right, out):
        seen.append((left.data_ptr(), float(left.std()), float(right.std())))

    monkeypatch.setattr(torch, "mm", product)
    ceilings.matrix_rate("cpu", "fp32", size=64)
    assert len({where for where, *_ in seen}) == ceilings.OPERAND_SETS
    assert all(0.9 < deviation < 1.1 for _, *deviations in seen for deviation in deviations)


def test_tf32_is_a_setting_that_is_put_back():
    before = torch.get_float32_matmul_precision()
    with ceilings.fp32_products("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_words_name_what_is_missing_and_compare_with_the_data_sheet():
    found = {
        "device": "NVIDIA H100 80GB HBM3",
        "matrix_flops_per_second": {"bf16": 791.52e12, "fp16": None},
        "copy_bytes_per_second": 3.015e12,
        "host_to_device_bytes_per_second": 55e9,
        "device_to_host_bytes_per_second": 54e9,
        "all_reduce": {"ranks": 8, "bus_bytes_per_second": 450e9, "latency_seconds": 21e-6},
        "spread": {"matrix bf16": 0.02},
        "sizes": {"matrix": 8192, "repeats": 20},
        "notes": {"matrix fp16": "not there"},
    }
    assert ceilings.bench_text(found, power_limit_watts=650.0).splitlines() == [
        "Ceilings of NVIDIA H100 80GB HBM3 (medians of 20; spread = slowest less fastest)",
        "  matrix product, bf16, 8192^3: 791.52 TFLOP/s, 80% of 989.4, spread 2%",
        "  matrix product, fp16, 8192^3: none (not there)",
        "  copy in its memory (read + written): 3,015.00 GB/s, 90% of 3,350.0",
        "  host to device, pinned: 55.00 GB/s",
        "  device to host, pinned: 54.00 GB/s",
        "  all-reduce over 8 ranks: bus 450.00 GB/s, latency 21.0 us",
        "  power limit 650 W; the peaks hold at 700 W",
    ]


def test_two_ranks_measure_their_all_reduce():
    """Through gloo, as torchrun would start it; rank 0 speaks."""
    script = (
        "from bench.measure import ceilings as c; \n"
        "c.MATRIX_SIZE['cpu'], c.COPY_BYTES['cpu'], c.REDUCE_BYTES['cpu'] = 32, 4096, 65536\n"
        "print(c.run(as_json=True, store=False))\n"
    )
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [_start(script, {**environment, "RANK": str(rank)}) for rank in range(2)]
    said = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert said[1] == ""
    reduced = json.loads(said[0])["all_reduce"]
    assert reduced["ranks"] == 2
    assert reduced["bus_bytes_per_second"] > 0
    assert 0 < reduced["latency_seconds"] < 10


def _start(script, environment):
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
