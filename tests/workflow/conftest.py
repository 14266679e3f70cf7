"""Tiny suites, run as a person would: `coati-bench run` in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from bench.layout import Layout
from bench.matrix import Plan, load_plan

PROGRAM = Path(sys.executable).with_name("coati-bench")
SUITE = """
suite: tiny
axes: {{stage: [sft], model: [bloom-tiny], strategy: [{strategies}]}}
settings: {{device: cpu, launcher: fork, precision: fp32, tokenizer_vocabulary: 1024, rows: 80, held_out_rows: 8, lap_steps: 1}}
stages:
  sft: {{steps: {steps}, micro_batch: 2, global_batch: 2, sequence_length: 128, learning_rate: 1e-3}}
overrides: [{overrides}]
"""


class Folder:
    """A working folder with one suite file."""

    def __init__(self, path: Path, cache: Path) -> None:
        self.path, self.layout = path, Layout(path / "results" / "tiny")
        self.environment = {**os.environ, "COATI_BENCH_CACHE": str(cache), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}

    def write(self, strategies: str = "naive, ddp", steps: int = 3, overrides: str = "") -> None:
        """Write the suite file."""
        (self.path / "tiny.yaml").write_text(SUITE.format(strategies=strategies, steps=steps, overrides=overrides), encoding="utf-8")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`coati-bench run tiny.yaml`, to its end."""
        return self.coati_bench("run", "tiny.yaml", *arguments)

    def coati_bench(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Any verb."""
        command = [str(PROGRAM), *arguments]
        return subprocess.run(command, cwd=self.path, env=self.environment, text=True, capture_output=True, timeout=300, check=False)

    def start(self) -> subprocess.Popen[str]:
        """The same, going on, and with Ctrl-C in force (a test run in the background has it ignored, and children inherit that)."""
        command = ["env", "--default-signal=INT", str(PROGRAM), "run", "tiny.yaml"]
        merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=self.path, env=self.environment, text=True, **merged)

    def snakemake(self, *arguments: str, snakefile: Path) -> subprocess.CompletedProcess[str]:
        """Snakemake by hand, as the Snakefile says it."""
        root = self.layout.root.relative_to(self.path)
        profile = snakefile.parent / "profiles" / "local"
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile), "--profile", str(profile), "--nocolor", *arguments]
        command += ["--config", f"suite={root}"]
        merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.run(command, cwd=self.path, env=self.environment, text=True, timeout=120, check=False, **merged)

    @property
    def plan(self) -> Plan:
        """The plan that the last run wrote."""
        return load_plan(self.layout.plan)

    def records(self) -> dict[str, tuple[int, int]]:
        """Strategy and outcome's file -> its identity (a record that was made again has another one)."""
        found = {}
        for path in sorted(self.layout.records.glob("*/*.json")):
            status = path.stat()
            found[path.parent.name] = (status.st_ino, status.st_mtime_ns)
        return found


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated data, made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def make_folder(data_cache: Path) -> Callable[[Path], Folder]:
    """A working folder somewhere."""
    return lambda path: Folder(path, data_cache)


@pytest.fixture
def folder(tmp_path: Path, make_folder: Callable[[Path], Folder]) -> Folder:
    """An empty working folder."""
    return make_folder(tmp_path)


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], object], float], bool]:
    """Wait for a condition."""

    def wait(condition: Callable[[], object], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    return wait


@pytest.fixture(scope="session")
def living() -> Callable[[list[psutil.Process]], list[psutil.Process]]:
    """Those of some processes that still run."""

    def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
        found = []
        for process in processes:
            try:
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    return alive
