"""The same cells in the image, by every runtime that is here: losses as outside, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.launch.processes import alive
from bench.launch.rank import read_process
from bench.layout import Layout
from bench.matrix import load_plan
from bench.record import Record, load_record
from tests.faults.conftest import wait_until

TREE = Path(__file__).parents[2]
SUITE = """
suite: {name}
axes: {{stage: [sft], model: [bloom-tiny], strategy: [naive, ddp, zero2], nodes: [1, 2]}}
settings: {{device: cpu, launcher: fork, precision: fp32, tokenizer_vocabulary: 1024}}
stages:
  sft: {{data: synthetic-instruct, steps: {steps}, micro_batch: 4, global_batch: 8, sequence_length: 128, learning_rate: 1e-2}}
exclude:
  - {{strategy: zero2, nodes: 1}}
  - {{strategy: ddp, nodes: 1}}
overrides:
  - when: {{strategy: ddp}}
    settings: {{launcher: torchrun}}
limits: {{timeout_seconds: 600, heartbeat_seconds: 300}}
"""


def bench(*words: str) -> list[str]:
    return [sys.executable, "-m", "bench", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TREE), "OMP_NUM_THREADS": "1"}


def run(folder: Path, name: str, *options: str, steps: int = 6) -> dict[tuple[str, int], Record]:
    """The records of the suite, run whole in `folder`; (strategy, nodes) -> record."""
    suite = folder / f"{name}.yaml"
    suite.write_text(SUITE.format(name=name, steps=steps))
    done = subprocess.run(
        bench("run", str(suite), *options), cwd=folder, env=environment(), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (records,) = folder.glob(f"results/{name}*/records")
    found = [load_record(path) for path in records.glob("*/*.json")]
    return {(record.cell["strategy"], record.cell["nodes"]): record for record in found}


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    return run(tmp_path_factory.mktemp("outside"), "outside")


def left(runtime: str) -> list[str]:
    """Containers of ours that the engine still knows."""
    if runtime == "apptainer":
        return []
    listed = subprocess.run([runtime, "ps", "--all", "--format", "{{.Names}}"], capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split() if name.startswith("coati-bench-")]


def test_losses_are_those_outside_and_the_record_has_the_digest_as_seen_inside(runtime, image, outside, tmp_path):
    inside = run(tmp_path, "inside", "--container", str(image))
    assert inside.keys() == outside.keys()
    note = json.loads(image.with_suffix(".json").read_text())
    for cell, record in inside.items():
        assert record.outcome == "ok", record.reason
        for part, other in zip(record.parts, outside[cell].parts, strict=True):
            assert part.series["loss"] == pytest.approx(other.series["loss"], abs=1e-6)
        assert record.provenance["image"]["digest"] == note["digest"]
        for machine in record.provenance["machines"]:
            assert machine["container_runtime"] == runtime
            assert note["digest"].removeprefix("sha256:")[:12] in machine["container"]
            assert machine["container_locks_sha256"]
    assert left(runtime) == []


@pytest.mark.parametrize(("launcher", "number"), [("fork", signal.SIGKILL), ("torchrun", signal.SIGKILL), ("torchrun", signal.SIGTERM)])
def test_nothing_runs_after_its_supervisor_was_killed_or_told_to_end(runtime, image, launcher, number, tmp_path):
    layout = planned(tmp_path, image)
    strategy = {"fork": "zero2", "torchrun": "ddp"}[launcher]
    (cell_id,) = (name for name, cell in load_plan(layout.plan).cells.items() if cell.strategy == strategy)
    with (tmp_path / "trial.log").open("wb") as log:
        process = subprocess.Popen(bench("trial", str(layout.cell(cell_id))), cwd=tmp_path, env=environment(), stdout=log, stderr=log)
    work = layout.logs(cell_id, 0)
    assert wait_until(lambda: step_of(work / "heartbeat1.json") > 0, 300), (tmp_path / "trial.log").read_text()
    ranks = [read_process(work, rank).pid for rank in (0, 1)]
    assert all(map(alive, ranks))
    process.send_signal(number)
    process.wait(60)
    assert wait_until(lambda: not any(map(alive, ranks)) and left(runtime) == [], 60), left(runtime)


def planned(folder: Path, image: Path) -> Layout:
    """A suite of endless cells, planned, and what they begin from made."""
    suite = folder / "long.yaml"
    suite.write_text(SUITE.format(name="long", steps=100000))
    call(folder, "plan", str(suite), "--write", "--container", str(image))
    for line in call(folder, "plan", str(suite), "--container", str(image), "--commands").splitlines():
        if line.startswith(("coati-bench data ", "coati-bench warm ")):
            call(folder, *line.split()[1:])
    (root,) = (folder / "results").iterdir()
    return Layout(root)


def call(folder: Path, *words: str) -> str:
    """What the verb prints."""
    return subprocess.run(bench(*words), cwd=folder, env=environment(), check=True, capture_output=True, text=True).stdout


def step_of(heartbeat: Path) -> int:
    try:
        return int(json.loads(heartbeat.read_text())["step"])
    except (OSError, ValueError, KeyError):
        return 0
