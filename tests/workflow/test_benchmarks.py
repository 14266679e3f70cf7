"""Every script of benchmarks/ still runs and shows what it promises: real processes, smallest forms. No time is judged."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from bench.layout import Layout
from bench.matrix import load_plan

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(name: str, *options: str, code: int = 0) -> str:
    """What a benchmark prints; it must end with `code`."""
    command = [sys.executable, str(BENCHMARKS / name), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_every_benchmark_has_a_test_here() -> None:
    assert {f"test_{path.stem}" for path in BENCHMARKS.glob("*.py")} <= globals().keys()


def test_overhead() -> None:
    small = ("--model", "bloom-tiny", "--batch", "1", "--length", "128", "--pairs", "6", "--seconds", "0.1", "--lap-steps", "2")
    *shown, last = run("overhead.py", "--device", "cpu", *small).splitlines()
    result = json.loads(last)
    assert (result["benchmark"], result["model"], result["pairs"], len(result["ratios"])) == ("recorder-overhead", "bloom-tiny", 6, 6)
    low, high = result["interval"]
    assert 0 < low <= result["ratio"] <= high < math.inf
    assert result["steps_per_loop"] % 2 == 0
    assert result["step_seconds_bare"] > 0
    assert result["samples_per_second"] > 0
    assert set(result["memory_bytes"]) == {"watching", "guard", "waiter"}
    assert min(result["memory_bytes"].values()) > 1 << 20
    assert result["memory_bytes_total"] == sum(result["memory_bytes"].values())
    assert result["watched_devices"] == 0
    assert set(result["met"]) == {"ratio", "memory"}
    assert [line.split("  ")[1] for line in shown[1:]] == ["step time, recorded / bare", "host memory, MB", "watched", "pairs"]


def test_plan() -> None:
    heading, row = run("plan.py", "40").splitlines()
    cells, seconds, megabytes, _, torch_loaded = row.split()
    assert heading.split() == ["cells", "seconds", "MB", "ms", "a", "cell", "torch", "loaded"]
    assert (int(cells), torch_loaded) == (40, "False")
    assert float(seconds) > 0
    assert int(megabytes) > 0


def test_records() -> None:
    _, report, in_report, compare, in_compare = run("records.py", "20").splitlines()
    for verb, row, inside in (("report", report, in_report), ("compare", compare, in_compare)):
        assert row.split()[:2] == ["20", verb]
        assert all(float(figure) > 0 for figure in row.split()[2:])
        assert f"compare.py:{verb} " in inside or f"commands.py:{verb} " in inside


@pytest.mark.slow
def test_ruler() -> None:
    """Of one trial each nothing is claimed, so that it ends with 1, as where a verdict is not the planted one."""
    output = run("ruler.py", "--trials", "1", "--steps", "6", "--micro-batch", "1", code=1)
    assert len(re.findall(r"^trial 0 (A|A'|B): [\d,]+ loss tokens/s$", output, re.MULTILINE)) == 3
    assert len(re.findall(r"^   against A: [\d.]+, p = 1.0000: no claim \(n=1\)$", output, re.MULTILINE)) == 2


def test_container_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks start in tests/container, where an image is; here it makes all that a block needs."""
    monkeypatch.setenv("COATI_BENCH_CACHE", str(tmp_path / "cache"))
    assert "--image IMAGE" in run("container_start.py", "--help")
    block = runpy.run_path(str(BENCHMARKS / "container_start.py"))["prepare"](tmp_path / "outside")
    layout = Layout(block.parents[1])
    assert [each.block_id for each in load_plan(layout.plan).blocks] == [block.stem]
    assert list(layout.root.glob("warm/*/done.json"))
