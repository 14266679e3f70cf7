"""Everything but ColossalAI's own strategies works where ColossalAI is not installed: plan, ranks, the fork parent, the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.launch.command import Agents
from bench.launch.parent import PRELOAD, ForkParent
from bench.launch.supervise import run_trial
from bench.record import Record, load_record
from tests.trials import tiny_cell, tiny_trial

ROOT = Path(__file__).parents[2]
BLOCK = """
import importlib.metadata
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "colossalai":
            raise ImportError("colossalai is blocked")

def find(name, find=importlib.metadata.Distribution.from_name):
    if name == "colossalai":
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)

sys.meta_path.insert(0, Blocked())
importlib.metadata.Distribution.from_name = staticmethod(find)
"""
SETTINGS = {
    "steps": 4, "global_batch": 8, "micro_batch": 4, "sequence_length": 64, "held_out_rows": 8, "learning_rate": 1e-2, "lap_steps": 2,
}  # fmt: skip
RANKS = {"naive": 1, "ddp": 2, "fsdp": 2, "zero2": 2}


@pytest.fixture(scope="module")
def blocked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder which, on the search path of a Python, hides ColossalAI there."""
    folder = tmp_path_factory.mktemp("blocked")
    (folder / "sitecustomize.py").write_text(BLOCK, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(blocked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of real trials, a folder for each strategy, all from one fork parent, which preloads what it can."""
    root = tmp_path_factory.mktemp("alone")
    (root / "work").mkdir()
    assert "colossalai" in PRELOAD
    with ForkParent(root / "parent.log", search_path=(str(blocked),)) as parent:
        for strategy, ranks in RANKS.items():
            trial = tiny_trial(tiny_cell("sft", strategy=strategy, processes_per_node=ranks, **SETTINGS), root / "work" / strategy)
            run_trial(trial, root / "records" / strategy / "0.json", parent=parent, agents=Agents())
    return root / "records"


@pytest.fixture(scope="module")
def records(folder: Path) -> dict[str, Record]:
    return {strategy: load_record(folder / strategy / "0.json") for strategy in RANKS}


def bench(blocked: Path, folder: Path, *words: str) -> str:
    """What a command prints that runs in `folder` without ColossalAI."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(blocked), str(ROOT)])}
    done = subprocess.run([sys.executable, "-m", "bench", *words], check=False, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("strategy", ["naive", "ddp", "fsdp"])
def test_strategies_of_torch_train_without_colossalai(records: dict[str, Record], strategy: str) -> None:
    record = records[strategy]
    assert (record.outcome, record.reason) == ("ok", None)
    assert len(record.parts) == RANKS[strategy]
    losses = record.parts[0].series["loss"]
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(records["naive"].parts[0].series["loss"], rel=1e-4)
    assert "colossalai" not in record.parts[0].facts["versions"]


def test_planning_skips_a_strategy_of_colossalai(blocked: Path, tmp_path: Path) -> None:
    axes = {"stage": ["sft"], "model": ["bloom-tiny"], "strategy": list(RANKS)}
    suite = {"suite": "alone", "axes": axes, "settings": {"device": "cpu", "precision": "fp32", "steps": 2}}
    (tmp_path / "suite.yaml").write_text(json.dumps(suite), encoding="utf-8")
    plan = json.loads(bench(blocked, tmp_path, "plan", "suite.yaml", "--format", "json"))
    assert {cell["strategy"] for cell in plan["cells"].values()} == RANKS.keys() - {"zero2"}
    assert [skipped["reason"] for skipped in plan["skipped"]] == ["zero2: colossalai is not installed; `make install` would be right"]


def test_a_trial_that_cannot_import_colossalai_says_so(records: dict[str, Record]) -> None:
    record = records["zero2"]
    assert record.outcome == "error"
    assert "colossalai is blocked" in record.reason


def test_a_report_is_made_without_colossalai(folder: Path, blocked: Path, tmp_path: Path) -> None:
    bench(blocked, tmp_path, "report", str(folder), "--output", str(tmp_path))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all(strategy in text for strategy in RANKS)
