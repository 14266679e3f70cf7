"""Trials of a rank that is not a real one, and ways to run them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.cell import cell_from_json
from bench.launch.command import Agents
from bench.launch.parent import ForkParent
from bench.launch.processes import alive
from bench.record import Input
from bench.suite import Limits
from bench.trial import Trial, make_trial

HERE = (str(Path(__file__).parent),)


def fake_trial(folder: Path, behaviour: dict[int, str], *, ranks: int = 2, nodes: int = 1, launcher: str = "fork", **more: object) -> Trial:
    """A trial whose rank k does `behaviour[k]`, a function of fake_rank.py; limits are longer than a slow machine takes."""
    facts = {"behaviour": {str(rank): name for rank, name in behaviour.items()}, **more.pop("facts", {})}
    limits = {"timeout_seconds": 120.0, "heartbeat_seconds": 60.0, **more}
    cell = cell_from_json(
        {"stage": "sft", "model": "bloom-tiny", "strategy": "ddp", "nodes": nodes, "processes_per_node": ranks // nodes, "steps": 10,
         "global_batch": 2 * ranks, "device": "cpu", "launcher": launcher}
    )  # fmt: skip
    data = [Input(name="synthetic-instruct", path="nowhere", sha256="0" * 64, facts=facts)]
    return make_trial(cell, 0, data=data, work=str(folder / "work"), limits=Limits(**limits))


def wait_until(condition: Callable[[], object], seconds: float = 15.0) -> bool:
    """Whether `condition` comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def gone(pids: list[int]) -> bool:
    """Whether none of `pids` runs."""
    return not any(map(alive, pids))


@pytest.fixture(name="fake_trial")
def _fake_trial(tmp_path: Path) -> Callable[..., Trial]:
    def make(behaviour: dict[int, str], **more: object) -> Trial:
        return fake_trial(tmp_path, behaviour, **more)

    return make


@pytest.fixture
def fork_parent(tmp_path: Path) -> Iterator[ForkParent]:
    with ForkParent(tmp_path / "parent.log", program="fake_rank", preload=("contextlib",), search_path=HERE) as parent:
        yield parent


@pytest.fixture
def agents() -> Agents:
    return Agents(program="fake_rank", search_path=HERE)


@pytest.fixture(name="wait_until")
def _wait_until() -> Callable[..., bool]:
    return wait_until


@pytest.fixture(name="gone")
def _gone() -> Callable[..., bool]:
    return gone
