"""What is left when supervisors, guards and parents die: nothing that runs, and a trial that can be run again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bench.launch.processes import MARKER, descendants
from bench.launch.rank import read_process
from bench.launch.supervise import run_trial
from bench.record import load_record
from bench.trial import save_trial

FOLDER = Path(__file__).parent


def hangs(heartbeat: Path) -> bool:
    """Whether a rank has come to the step at which fake ranks hang."""
    return heartbeat.exists() and '"step": 7' in heartbeat.read_text()


@pytest.fixture
def supervisor(fake_trial, tmp_path, wait_until):
    """Start a supervisor process whose rank 1 left its session and hangs; return it, once all is running."""

    def start(launcher):
        trial = fake_trial({0: "hang_deaf", 1: "leave_session_and_hang"}, launcher=launcher, heartbeat_seconds=60.0, timeout_seconds=60.0)
        save_trial(trial, tmp_path / "trial.json")
        process = subprocess.Popen(
            [sys.executable, FOLDER / "fake_supervisor.py", tmp_path / "trial.json", tmp_path / "record.json"],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(FOLDER.parents[1])},
        )  # fmt: skip
        work = Path(trial.work)
        beats = [trial.heartbeat_path(0), trial.heartbeat_path(1)]
        assert wait_until(lambda: all(map(hangs, beats)) and (tmp_path / "stray1.pid").exists(), 60)
        ranks = [read_process(work, rank).pid for rank in (0, 1)]
        return process, [*descendants([process.pid]), *ranks, int((tmp_path / "stray1.pid").read_text())]

    return start


@pytest.mark.parametrize("launcher", ["fork", "torchrun"])
def test_nothing_survives_a_supervisor_that_was_killed(supervisor, launcher, wait_until, gone):
    process, everyone = supervisor(launcher)
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(everyone) >= 5
    assert wait_until(lambda: gone(everyone), 30)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_trial_is_cancelled_and_leaves_no_record_that_blocks_the_next_run(supervisor, number, tmp_path, gone):
    process, everyone = supervisor("fork")
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert out.strip() == "cancelled"
    assert gone(everyone)
    assert not (tmp_path / "record.json").exists()
    record = load_record(tmp_path / "work" / "cancelled.json")
    assert (record.outcome, record.reason) == ("cancelled", f"the supervisor got {number.name}")


def test_a_cancelled_trial_can_be_run_again(fake_trial, fork_parent, tmp_path):
    from bench.launch.watch import Stop

    stop = Stop()
    threading.Timer(0.5, stop.ask, ["SIGTERM"]).start()
    first = run_trial(fake_trial({0: "hang", 1: "hang"}), tmp_path / "record.json", parent=fork_parent, stop=stop)
    second = run_trial(fake_trial({}), tmp_path / "record.json", parent=fork_parent)
    assert (first.outcome, second.outcome) == ("cancelled", "ok")
    assert 0 <= first.observed["time_to_detection_seconds"] < 5
    assert (tmp_path / "work" / "attempt1" / "cancelled.json").exists()


def test_a_killed_fork_parent_is_an_error_and_the_next_trial_gets_a_new_one(fake_trial, fork_parent, tmp_path, wait_until, gone):
    trial = fake_trial({0: "hang_deaf", 1: "leave_session_and_hang"})
    stray = tmp_path / "stray1.pid"
    seen = []

    def kill():
        wait_until(lambda: stray.exists() and hangs(trial.heartbeat_path(0)) and hangs(trial.heartbeat_path(1)))
        seen.extend([fork_parent.pid, *descendants([fork_parent.pid])])
        os.kill(fork_parent.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    record = run_trial(trial, tmp_path / "0.json", parent=fork_parent)
    thread.join()
    assert (record.outcome, record.attempt) == ("error", 1)
    assert record.reason.startswith("the fork parent ended with SIGKILL")
    assert len(seen) >= 4
    assert gone(seen)
    assert run_trial(fake_trial({}), tmp_path / "1.json", parent=fork_parent).outcome == "ok"


def test_a_killed_guard_takes_its_whole_tree_with_it(fake_trial, fork_parent, tmp_path, wait_until, gone):
    trial = fake_trial({0: "hang_deaf", 1: "hang_deaf"})
    seen = []

    def kill():
        wait_until(lambda: hangs(trial.heartbeat_path(0)) and hangs(trial.heartbeat_path(1)))
        guard = int(Path(f"/proc/{fork_parent.pid}/stat").read_text().rpartition(")")[2].split()[1])
        assert MARKER.encode() in Path(f"/proc/{guard}/environ").read_bytes()
        seen.extend([guard, *descendants([guard])])
        os.kill(guard, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    record = run_trial(trial, tmp_path / "record.json", parent=fork_parent)
    thread.join()
    assert record.outcome == "error"
    assert len(seen) == 4
    assert gone(seen)
