"""Two real ranks in mid-training, on the CPU with gloo and on two GPUs with NCCL: one is killed, one stands still, one is out of memory."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from bench.launch.command import Agents
from bench.launch.processes import alive
from bench.launch.rank import read_process
from bench.launch.supervise import run_trial
from bench.measure.nvml import all_devices
from bench.suite import Limits
from tests.trials import tiny_cell, tiny_trial

HERE = (str(Path(__file__).parent),)
TWO_DEVICES = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_DEVICES])]


@pytest.fixture
def trial(tmp_path):
    """A long trial of two ranks."""

    def make(device, **limits):
        cell = tiny_cell(
            "sft", strategy="ddp", processes_per_node=2, device=device, launcher="torchrun", steps=100_000, lap_steps=1, micro_batch=8,
        )  # fmt: skip
        return tiny_trial(cell, tmp_path / "work", limits=Limits(**{"timeout_seconds": 240.0, "heartbeat_seconds": 120.0, **limits}))

    return make


@pytest.fixture
def broken(trial, tmp_path, wait_until):
    """Run the long trial, send rank 1 a signal when both ranks have finished a step, and return its record."""

    def run(device, number, **limits):
        made = trial(device, **limits)

        def strike():
            if wait_until(lambda: all(step_of(made.heartbeat_path(rank)) > 0 for rank in (0, 1)), 120):
                os.kill(read_process(Path(made.work), 1).pid, number)

        striker = threading.Thread(target=strike)
        striker.start()
        record = run_trial(made, tmp_path / "record.json", agents=Agents())
        striker.join()
        assert nothing_is_left(made)
        return record

    return run


def step_of(heartbeat):
    try:
        return json.loads(heartbeat.read_text())["step"]
    except (OSError, ValueError):
        return 0


def nothing_is_left(trial):
    """Whether both ranks are gone, from their devices too."""
    pids = {read_process(Path(trial.work), rank).pid for rank in (0, 1)}
    on_devices = {pid for device in all_devices() for pid in device.processes()} if trial.parsed_cell.settings.device == "cuda" else set()
    return not any(map(alive, pids)) and not pids & on_devices


@pytest.mark.parametrize("device", DEVICES)
def test_a_rank_that_is_killed_in_mid_training_ends_the_trial(broken, device):
    record = broken(device, signal.SIGKILL)
    assert (record.outcome, record.attempt) == ("error", 1)
    assert record.reason.startswith("rank 1 ended with SIGKILL (phase train, step ")
    assert record.observed["time_to_detection_seconds"] < 60


@pytest.mark.parametrize("device", DEVICES)
def test_a_collective_that_hangs_is_a_timeout(broken, device):
    record = broken(device, signal.SIGSTOP, heartbeat_seconds=40.0)
    assert (record.outcome, record.attempt) == ("timeout", 1)
    assert " was silent for more than 40 s (phase train, step " in record.reason
    assert 40 <= record.observed["time_to_detection_seconds"] < 100


@pytest.mark.gpu
@TWO_DEVICES
def test_one_rank_out_of_memory_is_the_trials_outcome(trial, tmp_path):
    made = trial("cuda")
    record = run_trial(made, tmp_path / "record.json", agents=Agents(program="cramped_worker", search_path=HERE))
    assert (record.outcome, record.attempt) == ("oom", 1)
    assert record.reason.startswith("rank 1, phase ")
    assert nothing_is_left(made)
