"""Trials typed on several nodes: order, nodes that never come, that are killed, and a node 0 that is; ranks are fake, processes real."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bench.errors import UserError
from bench.launch import manual, meeting
from bench.launch.manual import Rendezvous, meeting_folder
from bench.launch.processes import descendants
from bench.launch.single import run_single
from bench.record import load_record
from bench.trial import save_trial

HERE = str(Path(__file__).parent)

COMMAND = """
import sys
from pathlib import Path
from bench.errors import BenchError
from bench.launch import manual, meeting
from bench.launch.manual import Rendezvous
from bench.launch.single import run_single
meeting.SILENT_SECONDS = manual.SILENT_SECONDS = 8.0
file, record, node, port, wait, search = sys.argv[1:]
meeting = Rendezvous(2, int(node), "127.0.0.1", int(port))
try:
    sys.exit(run_single(Path(file), Path(record), rendezvous=meeting, patience=float(wait), program="fake_rank", search_path=(search,)))
except BenchError as error:
    print(error)
    sys.exit(error.exit_code)
"""


class Typed:
    """One trial of two nodes, typed on both."""

    def __init__(self, trial, folder):
        self.file, self.record_path = folder / "trial.json", folder / "out" / "record.json"
        save_trial(trial, self.file)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.processes = {}

    def type(self, node, wait=30.0):
        line = [sys.executable, "-c", COMMAND, str(self.file), str(self.record_path), str(node), str(self.port), str(wait), HERE]
        self.processes[node] = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def end(self, node, seconds=60.0):
        text, _ = self.processes[node].communicate(timeout=seconds)
        return self.processes[node].returncode, text

    def has_begun(self):
        """Whether node 0 has spoken, which another node with little patience should find when it comes."""
        return (meeting_folder(self.record_path.with_name("record-logs")) / "node0.json").exists()

    def has_stepped(self):
        """Whether each rank has said that it finished a step: what breaks from then on is not tried again."""
        beats = [self.record_path.with_name("record-logs") / f"heartbeat{rank}.json" for rank in (0, 1)]
        return all(beat.exists() and json.loads(beat.read_text())["step"] > 0 for beat in beats)


@pytest.fixture
def typed(fake_trial, tmp_path):
    made = []

    def make(behaviour, **more):
        made.append(Typed(fake_trial(behaviour, ranks=2, nodes=2, launcher="torchrun", **more), tmp_path))
        return made[-1]

    yield make
    for process in (process for each in made for process in each.processes.values()):
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


def test_both_nodes_make_one_record_and_one_that_comes_after_the_end_hears_how_it_ended(typed):
    trial = typed({0: "work", 1: "work"})
    for node in (1, 0):
        trial.type(node)
    assert [trial.end(node)[0] for node in (0, 1)] == [0, 0]
    record = load_record(trial.record_path)
    assert (record.outcome, record.launcher, record.simulated_nodes, len(record.parts)) == ("ok", "manual", True, 2)
    trial.type(1)
    code, text = trial.end(1)
    assert (code, " ok " in text) == (0, True)


def test_a_node_that_never_comes_is_an_outcome_that_names_it(typed):
    trial = typed({0: "work", 1: "work"})
    trial.type(0, wait=2)
    code, text = trial.end(0)
    record = load_record(trial.record_path)
    assert (code, record.outcome, record.attempt) == (0, "error", 1)
    assert record.observed["time_to_detection_seconds"] >= 2  # from when it was waited for
    assert record.reason.startswith(f"node 1 never came: waited 2 s; seen: node 0 ({socket.gethostname()})")
    assert "node 1 never came" in text


def test_another_node_does_not_wait_for_ever_for_node_0(typed):
    trial = typed({0: "work", 1: "work"})
    trial.type(1, wait=2)
    code, text = trial.end(1)
    assert code == 3
    assert "node 0 did not come: waited 2 s" in text
    assert not trial.record_path.exists()


def test_a_failed_rank_on_another_node_is_the_trials_end_on_all(typed):
    trial = typed({0: "beat_for_ever", 1: "exit_three"})
    trial.type(1)
    trial.type(0)
    assert trial.end(0)[0] == trial.end(1)[0] == 0
    record = load_record(trial.record_path)
    assert (record.outcome, "rank 1 ended with exit code 3" in record.reason) == ("error", True)
    assert record.observed["time_to_detection_seconds"] < 30


def test_a_node_whose_command_is_killed_ends_its_ranks_and_the_trial(typed, wait_until, gone):
    trial = typed({0: "beat_for_ever", 1: "beat_for_ever"})
    trial.type(0)
    trial.type(1)
    assert wait_until(trial.has_stepped, 60)
    below = {node: descendants([process.pid]) for node, process in trial.processes.items()}
    trial.processes[1].kill()
    assert trial.end(0)[0] == 0
    record = load_record(trial.record_path)
    assert (record.outcome, record.attempt) == ("error", 1)
    # whichever is noticed first: its rank's end, or its silence
    assert record.reason.startswith(("rank 1 ended with SIGTERM (phase train", "node 1 (")), record.reason
    assert record.observed["time_to_detection_seconds"] < 60
    assert wait_until(lambda: gone([*below[0], *below[1]]))


def test_a_node_that_falls_silent_is_noticed_from_its_last_beat_on_and_ends_its_ranks_when_it_wakes(typed, wait_until, gone):
    trial = typed({0: "beat_for_ever", 1: "beat_for_ever"}, timeout_seconds=120.0)
    trial.type(0)
    assert wait_until(trial.has_begun, 60)
    trial.type(1, wait=5)
    assert wait_until(trial.has_stepped, 60)
    below = descendants([process.pid for process in trial.processes.values()])
    trial.processes[1].send_signal(signal.SIGSTOP)
    try:
        assert trial.end(0, 90)[0] == 0
    finally:
        trial.processes[1].send_signal(signal.SIGCONT)
    record = load_record(trial.record_path)
    assert (record.outcome, record.attempt) == ("error", 1)
    assert record.reason.startswith("node 1 ("), record.reason
    assert " was silent for more than 8 s: its command or its link is gone" in record.reason
    assert record.observed["time_to_detection_seconds"] >= 8
    trial.end(1)
    assert wait_until(lambda: gone(below))


def test_where_node_0_is_killed_the_others_end_their_ranks(typed, wait_until, gone):
    trial = typed({0: "beat_for_ever", 1: "beat_for_ever"})
    trial.type(0)
    assert wait_until(trial.has_begun, 60)
    trial.type(1, wait=5)
    assert wait_until(trial.has_stepped, 60)
    below = [pid for process in trial.processes.values() for pid in descendants([process.pid])]
    trial.processes[0].kill()
    code, text = trial.end(1)
    assert (code, "its command is gone" in text) == (3, True)
    assert wait_until(lambda: gone(below))


def test_node_0_goes_on_with_a_node_that_was_typed_for_an_earlier_command(typed):
    trial = typed({0: "work", 1: "work"})
    trial.type(0, wait=1)
    trial.end(0)
    trial.record_path.unlink()
    trial.type(1)
    trial.type(0)
    assert trial.end(0)[0] == trial.end(1)[0] == 0
    assert load_record(trial.record_path).outcome == "ok"


def test_another_number_of_nodes_than_the_cells_is_refused(fake_trial, tmp_path):
    save_trial(fake_trial({0: "work", 1: "work"}, nodes=2, launcher="torchrun"), tmp_path / "trial.json")
    with pytest.raises(UserError, match=r"--nodes 3: the cell .* is one of 2 nodes"):
        run_single(tmp_path / "trial.json", tmp_path / "r.json", rendezvous=Rendezvous(3, 0, "127.0.0.1", 29500))
    save_trial(fake_trial({0: "work", 1: "work"}, nodes=2, launcher="fork"), tmp_path / "trial.json")
    with pytest.raises(UserError, match="`launcher: torchrun` would be right"):
        run_single(tmp_path / "trial.json", tmp_path / "r.json", rendezvous=Rendezvous(2, 0, "127.0.0.1", 29500))


def test_nodes_meet_beside_the_work_folder_which_every_try_empties(tmp_path):
    assert meeting_folder(tmp_path / "logs" / "cell" / "0") == tmp_path / "logs" / "cell" / "0-nodes"
    assert manual.SILENT_SECONDS == meeting.SILENT_SECONDS
