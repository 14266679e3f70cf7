"""Every way in which real rank processes can end, and the record that is left of it."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from bench.launch.command import Agents
from bench.launch.parent import ForkParent
from bench.launch.rank import read_process
from bench.launch.supervise import run_trial
from bench.record import load_record


@pytest.fixture
def run(fake_trial, fork_parent, tmp_path):
    """Run ranks that behave so, and return the record as it was written; nothing may be left of the ranks."""

    def run(behaviour, **more):
        trial = fake_trial(behaviour, **more)
        returned = run_trial(trial, tmp_path / "record.json", parent=fork_parent)
        record = load_record(tmp_path / "record.json")
        assert record == returned
        for rank in range(trial.parsed_cell.world_size):
            note = read_process(Path(trial.work), rank)
            assert note is None or not Path(f"/proc/{note.pid}").exists()
        return record

    return run


def test_ranks_that_finish_leave_an_ok_record_with_all_parts(run):
    record = run({})
    assert (record.outcome, record.reason, record.attempt, record.launcher) == ("ok", None, 1, "fork")
    assert [part.rank for part in record.parts] == [0, 1]
    assert record.flags == ["indicative"]
    assert record.observed["exits"] == {"0": "exit code 0", "1": "exit code 0"}
    assert record.provenance["versions"]["python"]
    assert record.provenance["machines"][0]["hostname"] == socket.gethostname()
    assert record.provenance["started"] < record.provenance["ended"]


def test_a_rank_that_is_silent_ends_the_trial_as_timeout_and_is_named_with_its_place(run, tmp_path):
    record = run({1: "hang", 0: "beat_for_ever"}, heartbeat_seconds=3.0)
    assert record.outcome == "timeout"
    assert record.reason == "rank 1 was silent for more than 3 s (phase train, step 7)"
    assert 3 < record.observed["time_to_detection_seconds"] < 20
    assert record.observed["ended_by_supervisor"] == [0, 1]
    assert "missing ranks: 0, 1" in record.flags
    assert "fake_rank.py" in (tmp_path / "work" / "rank1.log").read_text(), "the stacks of a silent rank stand in its log"


def test_a_trial_longer_than_its_limit_is_a_timeout(run):
    record = run({0: "beat_for_ever", 1: "beat_for_ever"}, timeout_seconds=4.0)
    assert record.outcome == "timeout"
    assert record.reason.startswith("longer than 4 s (rank 0: phase train, step ")


def test_a_rank_that_ignores_sigterm_is_killed(run):
    record = run({1: "hang_deaf"}, heartbeat_seconds=3.0)
    assert record.outcome == "timeout"
    assert record.observed["exits"] == {"0": "exit code 0", "1": "SIGKILL"}


def test_a_rank_that_is_killed_from_outside_is_an_error_with_the_signals_name(run):
    record = run({1: "kill_self"})
    assert (record.outcome, record.attempt) == ("error", 1)
    assert record.reason.startswith("rank 1 ended with SIGKILL (phase train, step 2)")


def test_a_rank_that_exits_badly_is_an_error_with_its_code_and_last_log_lines(run):
    record = run({1: "exit_three"})
    assert (record.outcome, record.attempt) == ("error", 1)
    assert record.reason.startswith("rank 1 ended with exit code 3 (phase train, step 4)")
    assert record.reason.endswith("the ark has a hole")
    assert "missing ranks: 1" in record.flags


def test_an_exception_leaves_its_traceback_in_the_reason(run):
    record = run({0: "raise_error"})
    assert record.outcome == "error"
    assert "ValueError: a wrong turn" in record.reason


def test_the_other_ranks_get_some_time_to_finish_when_one_has_failed(run):
    record = run({0: "slow_work", 1: "exit_three"})
    assert [part.rank for part in record.parts] == [0]


def test_the_other_ranks_are_ended_when_they_do_not_follow_one_that_failed(run):
    begin = time.monotonic()
    record = run({0: "hang", 1: "exit_three"})
    assert record.reason.startswith("rank 1 ended with exit code 3")
    assert record.observed["ended_by_supervisor"] == [0]
    assert time.monotonic() - begin < 60  # not for the 600 s that the other one sleeps


def test_a_memory_error_without_part_is_out_of_host_memory(run):
    record = run({1: "memory_error"})
    assert (record.outcome, record.attempt) == ("oom", 1)
    assert record.reason.startswith("host memory: rank 1 ended with exit code 1")


def test_a_part_that_says_oom_decides_and_keeps_the_requested_bytes(run):
    record = run({0: "exit_three", 1: "say_oom"})
    assert (record.outcome, record.attempt) == ("oom", 1)
    assert "requested 2147483648 bytes" in record.reason


def test_exit_code_75_is_out_of_memory_even_without_a_part(run):
    assert run({1: "oom_without_part"}).outcome == "oom"


def test_out_of_memory_beside_other_trials_says_so(run):
    record = run({1: "say_oom"}, side_by_side=2)
    assert record.outcome == "oom"
    assert record.reason.endswith("; trials side by side shared the device's memory, so it says nothing of what the strategy needs")


def test_the_kernels_kill_for_want_of_memory_is_oom_and_not_error(run, memory_group):
    record = run({1: "exhaust_memory"}, facts={"cgroup": str(memory_group)})
    assert (record.outcome, record.reason) == ("oom", "host memory: the kernel killed rank 1 (phase start, step 0)")


@pytest.fixture
def memory_group():
    """A control group that allows 64 MiB."""
    root = Path("/sys/fs/cgroup/memory")
    group = root / f"coati-bench-test-{os.getpid()}"
    if os.geteuid() or not (root / "memory.limit_in_bytes").exists():
        pytest.skip("needs root and the memory controller of cgroup v1")
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(64 << 20))
    yield group
    group.rmdir()


def test_a_non_finite_loss_is_diverged_and_never_repeated(run):
    record = run({0: "diverge", 1: "diverge"})
    assert (record.outcome, record.attempt) == ("diverged", 1)
    assert record.reason == "rank 0, phase train, step 6: loss is not finite at step 6"


def test_a_rank_that_leaves_no_part_is_named(run):
    record = run({1: "no_part"})
    assert (record.outcome, record.reason) == ("error", "no part was left by rank 1")
    assert "missing ranks: 1" in record.flags


def test_a_process_that_left_session_environment_and_parents_is_dead_afterwards(run, tmp_path, gone):
    record = run({1: "leave_session"})
    assert record.outcome == "ok"
    assert gone([int((tmp_path / "stray1.pid").read_text())])


def test_a_broken_link_before_the_first_step_is_tried_again_in_a_clean_folder(run, tmp_path):
    record = run({0: "lose_link_once", 1: "lose_link_once"})
    assert (record.outcome, record.attempt) == ("ok", 2)
    assert "Connection reset by peer" in (tmp_path / "work" / "attempt1" / "rank1.log").read_text()
    assert not (tmp_path / "work" / "attempt1" / "attempt1").exists()


@pytest.mark.parametrize(("behaviour", "tries"), [("lose_link_late", 1), ("raise_error", 1)])
def test_nothing_else_is_tried_again(run, behaviour, tries):
    record = run({1: behaviour})
    assert (record.outcome, record.attempt) == ("error", tries)


def test_a_link_that_stays_broken_is_tried_three_times_in_all(run):
    record = run({0: "lose_link", 1: "lose_link"})
    assert (record.outcome, record.attempt) == ("error", 3)
    assert "Connection refused" in record.reason


def test_a_taken_port_is_a_launch_incident_and_the_next_try_takes_another(fake_trial, tmp_path):
    with socket.socket() as taken, socket.socket() as free:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free.bind(("127.0.0.1", 0))
        ports = iter([taken.getsockname()[1], free.getsockname()[1]])
        free.close()
        here = (str(Path(__file__).parent),)
        with ForkParent(tmp_path / "log", program="fake_rank", preload=(), search_path=here, choose_port=lambda: next(ports)) as parent:
            record = run_trial(fake_trial({0: "bind_port"}, ranks=1), tmp_path / "record.json", parent=parent)
    assert (record.outcome, record.attempt) == ("ok", 2)
    assert "Address already in use" in (tmp_path / "work" / "attempt1" / "rank0.log").read_text()


def test_a_patch_in_one_trial_never_reaches_the_next(fake_trial, fork_parent, tmp_path):
    told = []
    for number in range(2):
        record = run_trial(fake_trial({0: "patch", 1: "patch"}), tmp_path / f"{number}.json", parent=fork_parent)
        told.append([part.reason for part in record.parts])
    assert told == [["False", "False"], ["False", "False"]]


def test_a_full_disk_leaves_a_record_that_says_so(fake_trial, fork_parent, tmp_path):
    (tmp_path / "work").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", tmp_path / "work"], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
    try:
        record = run_trial(fake_trial({}), tmp_path / "record.json", parent=fork_parent)
    finally:
        subprocess.run(["umount", tmp_path / "work"], check=True)
    assert record.outcome == "error"
    assert "no space" in record.reason.lower()
    assert load_record(tmp_path / "record.json") == record


def test_torchrun_agents_give_the_same_record_as_the_fork_parent(fake_trial, agents, tmp_path):
    record = run_trial(fake_trial({1: "exit_three"}, launcher="torchrun"), tmp_path / "record.json", agents=agents)
    assert (record.outcome, record.attempt, record.launcher) == ("error", 1, "torchrun")
    assert record.reason.startswith("rank 1 ended with exit code 3 (phase train, step 4)")
    assert record.reason.endswith("the ark has a hole")


def test_two_agents_on_one_machine_are_two_simulated_nodes(fake_trial, agents, tmp_path):
    record = run_trial(fake_trial({}, launcher="torchrun", nodes=2), tmp_path / "record.json", agents=agents)
    assert (record.outcome, record.simulated_nodes) == ("ok", True)
    assert [(part.rank, part.node, part.local_rank) for part in record.parts] == [(0, 0, 0), (1, 1, 0)]
    assert len(record.provenance["machines"]) == 2


def test_torchrun_ranks_that_left_the_session_or_are_deaf_are_dead_after_another_failed(fake_trial, agents, tmp_path, gone):
    trial = fake_trial({0: "leave_session_and_hang", 1: "fail_after_stray"}, launcher="torchrun")
    record = run_trial(trial, tmp_path / "record.json", agents=agents)
    assert record.outcome == "error"
    assert record.reason.startswith("rank 1 ended with exit code 3")
    assert record.observed["exits"]["1"] == "exit code 3"
    assert record.observed["ended_by_supervisor"] == [0]
    assert gone([int((tmp_path / "stray0.pid").read_text()), *(read_process(Path(trial.work), rank).pid for rank in (0, 1))])


def test_a_port_that_stays_taken_under_torchrun_is_an_error_after_three_tries(fake_trial, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.launch.supervise.MOST_TRIES", 2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        agents = Agents(program="fake_rank", search_path=(str(Path(__file__).parent),), choose_port=lambda: taken.getsockname()[1])
        record = run_trial(fake_trial({}, launcher="torchrun"), tmp_path / "record.json", agents=agents)
    assert (record.outcome, record.attempt) == ("error", 2)
    assert record.reason.startswith("the torchrun agent of node 0 ended with exit code 1")
    assert "EADDRINUSE" in record.reason
