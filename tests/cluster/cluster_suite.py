"""Small suites and `coati-bench` on the hosts of a simulated cluster."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster_hosts import BRIDGE_HOST, end
from cluster_slurm import Slurm

from bench.launch.workflow import SOURCE_TREE
from bench.layout import Layout
from bench.matrix import load_plan
from bench.record import Record, load_record

PROGRAM = str(Path(sys.executable).with_name("coati-bench"))

SUITE = """
suite: small
axes: {{stage: [sft], model: [bloom-tiny], {axes}}}
settings: {{device: cpu, precision: fp32, tokenizer_vocabulary: 1024, warm_start: none{saves}}}
stages:
  sft:
    {{data: synthetic-instruct, steps: {steps}, lap_steps: {lap}, micro_batch: 1, global_batch: 6, sequence_length: 128,
      learning_rate: 1e-2}}
limits: {{timeout_seconds: {timeout}, heartbeat_seconds: {heartbeat}}}
"""

STAGES_IN_AN_IMAGE = """
suite: small
axes: {{stage: [sft, rm, ppo], model: [bloom-tiny], strategy: [ddp], nodes: [2]}}
settings: {{device: cpu, precision: fp32, tokenizer_vocabulary: 1024, warm_start: none, container: {image}}}
stages:
  sft: {{data: synthetic-instruct, steps: 4, lap_steps: 2, micro_batch: 1, global_batch: 2, sequence_length: 128, learning_rate: 1e-2}}
  rm: {{data: synthetic-pairs, steps: 4, lap_steps: 2, micro_batch: 1, global_batch: 2, sequence_length: 64, learning_rate: 2e-3}}
  ppo:
    {{data: synthetic-prompts, iterations: 2, prompts_per_iteration: 4, global_batch: 4, micro_batch: 2, prompt_length: 24,
      response_length: 12, learning_rate: 2e-3, ptx: synthetic-instruct, ptx_coef: 0.1}}
limits: {{timeout_seconds: 300, heartbeat_seconds: 120}}
"""

A_WARM_START = """
suite: small
axes: {stage: [rm], model: [bloom-tiny], strategy: [naive]}
settings: {device: cpu, precision: fp32, tokenizer_vocabulary: 1024, warm_start: shared}
stages:
  sft: {data: synthetic-instruct, steps: 100, lap_steps: 2, micro_batch: 1, global_batch: 2, sequence_length: 128, learning_rate: 1e-2}
  rm: {data: synthetic-pairs, steps: 4, lap_steps: 2, micro_batch: 1, global_batch: 2, sequence_length: 64, learning_rate: 2e-3}
"""


class Bench:
    """One suite in a folder that all hosts share."""

    def __init__(self, slurm: Slurm, folder: Path, cache: Path, results: Path | None = None) -> None:
        self.slurm, self.folder, self.suite = slurm, folder, folder / "small.yaml"
        self.layout = Layout((results or folder) / "results" / "small")
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "COATI_BENCH_CACHE": str(cache), "PYTHONPATH": str(SOURCE_TREE)}
        self._prepared = cache / "prepared"
        self._started: list[subprocess.Popen[bytes]] = []

    def plan(
        self, axes: str, *, steps: int = 4, lap: int = 2, timeout: float = 300, heartbeat: float = 120, save_every: int | None = None
    ) -> None:
        """Write the suite and its plan."""
        saves = "" if save_every is None else f", save_every: {save_every}"
        self.write_plan(SUITE.format(axes=axes, steps=steps, lap=lap, timeout=timeout, heartbeat=heartbeat, saves=saves))

    def write_plan(self, suite: str) -> None:
        """Write a suite's file and its plan."""
        self.suite.write_text(suite)
        self.call("plan", str(self.suite), "--write", "--results", str(self.layout.root.parent))

    def prepare(self) -> None:
        """Make what trials begin from, by the lines that `plan --commands` prints; the same for every test, so made once."""
        if self._prepared.exists():
            shutil.copytree(self._prepared, self.layout.root, dirs_exist_ok=True)
            return
        for line in self.lines_once():
            self.call(*line)
        for name in ("data", "warm"):
            shutil.copytree(self.layout.root / name, self._prepared / name)

    def lines_once(self) -> list[list[str]]:
        """The lines of `plan --commands` that make what trials begin from, without the program's name."""
        return self._printed("data", "warm")

    def typed_lines(self, head: str) -> list[list[str]]:
        """The lines of `plan --commands` for each node of the only cell, `head` being the address of node 0."""
        return [[word.replace("$HEAD", head) for word in words] for words in self._printed("trial")]

    def _printed(self, *verbs: str) -> list[list[str]]:
        text = self.call("plan", str(self.suite), "--commands", "--results", str(self.layout.root.parent)).stdout
        lines = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("coati-bench ")]
        return [words for words in lines if words[0] in verbs]

    def call(self, *arguments: str, seconds: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run `coati-bench` on the login node."""
        done = self.slurm.login("env", "-C", str(self.folder), PROGRAM, *arguments, seconds=seconds, env=self.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def start(self, host: str, *arguments: str, log: str = "run.log") -> subprocess.Popen[bytes]:
        """Start `coati-bench` on a host."""
        line = ("env", "-C", str(self.folder), PROGRAM, *arguments)
        process = self.slurm.hosts.popen(host, *line, log=self.folder / log, env=self.environment)
        self._started.append(process)
        return process

    def run(self) -> subprocess.Popen[bytes]:
        """Start the suite through Snakemake and Slurm."""
        return self.start(BRIDGE_HOST, "run", str(self.suite), "--profile", "slurm", "--results", str(self.layout.root.parent))

    def submit(self, block: str, nodes: int, *options: str) -> str:
        """Submit one block by hand; return the job's number. What it prints is in block.log."""
        line = f"exec {PROGRAM} block {self.layout.block(block)}"
        sized = ["--nodes", str(nodes), "--ntasks", str(nodes), "--output", str(self.folder / "block.log"), *options]
        done = self.slurm.login("sbatch", "--parsable", "--chdir", str(self.folder), *sized, "--wrap", line, env=self.environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def the_cell(self) -> str:
        """The only cell."""
        (cell_id,) = self.cells()
        return cell_id

    def cells(self) -> list[str]:
        """All cells."""
        return list(load_plan(self.layout.plan).cells)

    def without_record(self) -> list[str]:
        """Cells whose trial has no record yet."""
        return [cell_id for cell_id in self.cells() if not self.layout.record(cell_id, 0).exists()]

    def the_block(self) -> str:
        """The only block."""
        (block,) = load_plan(self.layout.plan).blocks
        return block.block_id

    def record(self, seconds: float) -> Record:
        """The record of the only cell, waited for."""
        path = self.layout.record(self.the_cell(), 0)
        wait_until(path.exists, seconds, self.said)
        return load_record(path)

    def records(self) -> list[Record]:
        """All records."""
        return [load_record(path) for path in sorted(self.layout.records.glob("*/*.json"))]

    def allocations_of(self, record: Record) -> list[dict[str, Any]]:
        """What the record's block says of the nodes of its allocation."""
        (block,) = [it for it in load_plan(self.layout.plan).blocks if record.cell_id in it.cells]
        found: list[dict[str, Any]] = json.loads(self.layout.block(block.block_id).read_text())["allocations"]
        return found

    def await_step(self, rank: int, seconds: float = 180, cell_id: str | None = None) -> None:
        """Wait until a rank of a cell, the only one if none is named, has finished a step."""
        heartbeat = self.layout.logs(cell_id or self.the_cell(), 0) / f"heartbeat{rank}.json"
        wait_until(lambda: _read(heartbeat).get("step", 0) > 0, seconds, self.said)

    def said(self) -> str:
        """The last words of everything that was started."""
        logs = [*self.folder.glob("*.log"), *self.layout.root.glob("logs/**/*.log")]
        return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-1500:]}" for path in logs)

    def is_over(self) -> bool:
        """Whether every command has ended by itself, and every job."""
        return all(process.poll() is not None for process in self._started) and not self.slurm.jobs()

    def leave(self) -> None:
        """End what still runs."""
        end(process.pid for process in self._started if process.poll() is None)
        for process in self._started:
            process.wait()
        self.slurm.login("scancel", "--user=root")
        self.slurm.await_quiet(120)


def wait_until(condition: Callable[[], Any], seconds: float, said: Callable[[], str]) -> None:
    """Wait for a condition, or fail with what was said."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s\n{said()}"
        time.sleep(0.3)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
