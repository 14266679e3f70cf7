"""Heartbeats, the kernel's counters, and the pool of devices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from bench.cell import cell_from_json
from bench.errors import MachineError
from bench.launch.alone import alone
from bench.launch.oom import oom_kills
from bench.launch.pool import BusyError, LackingError, hold_devices
from bench.launch.supervise import clean, tail
from bench.launch.watch import Heartbeats, Place, Stop, listening
from bench.measure.nvml import visible
from bench.trial import make_trial

RAIN = """
import signal, threading
from bench.launch.watch import listening

def rain():
    for _ in range(10_000):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

with listening() as stop:
    cloud = threading.Thread(target=rain)
    cloud.start()
    while cloud.is_alive():
        stop.wait(0.0001)
        stop.asked = None  # so that it waits in earnest again
    cloud.join()
    stop.ask("SIGTERM")
    assert stop.wait(0)
    print(stop.asked)
"""


@pytest.fixture
def trial(tmp_path):
    cell = {"stage": "sft", "model": "bloom-tiny", "strategy": "ddp", "processes_per_node": 2, "steps": 3, "global_batch": 4}
    return make_trial(cell_from_json(cell), 0, work=str(tmp_path))


def test_silence_is_counted_from_the_last_change_on_our_own_clock(trial):
    beats = Heartbeats(trial, now=100.0)
    assert beats.silent(103.0, set()) == (0, 3.0)
    trial.heartbeat_path(0).write_text('{"phase": "load", "step": 0}')
    os.utime(trial.heartbeat_path(0), (5e9, 5e9))
    assert beats.silent(104.0, set()) == (1, 4.0), "a file server's clock in the future does not matter"
    assert beats.silent(110.0, {1}) == (0, 6.0)
    os.utime(trial.heartbeat_path(0), (1, 1))
    assert beats.silent(111.0, {1}) == (0, 0.0)
    assert beats.silent(111.0, {0, 1}) == (-1, 0.0)


def test_places_come_from_readable_heartbeats_only(trial):
    trial.heartbeat_path(0).write_text('{"phase": "train", "step": 3}')
    trial.heartbeat_path(1).write_text('{"phase": "tra')
    assert Heartbeats(trial, 0.0).places() == {0: Place("train", 3)}


def test_signals_are_heard_and_handlers_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with listening() as stop:
        assert not stop.wait(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(1)
        assert stop.asked == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_interrupts_the_wait_for_it_at_any_point_hangs_nothing():
    done = subprocess.run([sys.executable, "-c", RAIN], timeout=60, check=True, capture_output=True, text=True)
    assert done.stdout == "SIGTERM\n"


def test_all_who_wait_are_woken():
    stop, woken = Stop(), []
    waiters = [threading.Thread(target=lambda: woken.append(stop.wait(60))) for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    stop.ask("SIGTERM")
    for waiter in waiters:
        waiter.join(10)
    assert woken == [True] * 3


@pytest.mark.parametrize(
    ("line", "path", "text"),
    [
        ("0::/a/b", "sys/fs/cgroup/a/b/memory.events", "low 0\noom 5\noom_kill 2\noom_group_kill 0\n"),
        ("4:memory:/a/b", "sys/fs/cgroup/memory/a/b/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
    ],
)
def test_kills_are_counted_in_both_versions_of_control_groups_and_in_the_kernel(tmp_path, line, path, text):
    assert oom_kills(tmp_path) is None
    for name, content in (("proc/self/cgroup", line + "\n"), (path, text), ("proc/vmstat", "nr_free 1\noom_kill 40\n")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert oom_kills(tmp_path) == 42


def test_the_kernels_counter_can_be_read_here():
    assert oom_kills() is not None


class FakeDevice:
    def __init__(self, uuid, problem=None, used=0):
        self.uuid, self.problem, self.used = uuid, problem, used

    def used_bytes(self):
        return self.used

    def busy(self):
        return self.problem


@pytest.fixture
def pool(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices = [FakeDevice("GPU-a"), FakeDevice("GPU-b"), FakeDevice("GPU-c")]
    return devices, lambda count, **more: hold_devices(count, **{"seconds": 0.0, "devices": lambda: devices, "folder": tmp_path, **more})


def uuids(devices):
    return [device.uuid for device in devices]


def test_no_device_is_handed_out_twice_at_a_time(pool):
    _, hold = pool
    with hold(2) as first, hold(1) as second:
        assert uuids([*first, *second]) == ["GPU-a", "GPU-b", "GPU-c"]
        with pytest.raises(BusyError, match="device GPU-a is held by another trial"), hold(1):
            pass
    with hold(3) as all_of_them:
        assert len(all_of_them) == 3


def test_trials_that_share_take_the_emptiest_devices_busy_or_not_and_keep_measured_trials_away(pool):
    devices, hold = pool
    devices[0].used, devices[1].problem = 5 << 30, "device GPU-b is in use by process 17"
    with hold(2, shared=True) as first, hold(2, shared=True) as second:
        assert {*uuids(first)} == {*uuids(second)} == {"GPU-b", "GPU-c"}
        with pytest.raises(BusyError, match="device GPU-c is held by another trial"), hold(2):
            pass
    with hold(1), pytest.raises(BusyError, match="device GPU-a is held by another trial"), hold(3, shared=True):
        pass


def test_a_busy_device_is_passed_over_and_waited_for(pool):
    devices, hold = pool
    devices[0].problem = "device GPU-a is in use by process 17"
    with hold(2) as held:
        assert uuids(held) == ["GPU-b", "GPU-c"]
    with pytest.raises(BusyError, match="in use by process 17; waited 0 s"), hold(3):
        pass

    def becomes_idle(seconds):
        devices[0].problem = None
        return False

    with hold(3, seconds=5.0, stopped=becomes_idle) as held:
        assert len(held) == 3


def test_waiting_ends_when_somebody_asks(pool):
    devices, hold = pool
    devices[0].problem = "in use"
    with pytest.raises(BusyError), hold(3, seconds=60.0, stopped=lambda seconds: True):
        pass


def test_more_devices_than_there_are_is_not_waited_for(pool):
    _, hold = pool
    with pytest.raises(LackingError, match="4 devices are needed on this machine; seen: 3"), hold(4, seconds=60.0):
        pass


@pytest.mark.parametrize(
    ("variable", "expected"),
    [("1", ["GPU-b"]), ("2,0", ["GPU-c", "GPU-a"]), ("GPU-b", ["GPU-b"]), ("", []), ("7", []), (None, ["GPU-a", "GPU-b", "GPU-c"])],
)
def test_the_users_choice_of_devices_is_kept(pool, monkeypatch, variable, expected):
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert uuids(visible(pool[0])) == expected


def test_a_target_is_made_by_one_process_at_a_time(tmp_path):
    with (
        alone(tmp_path / "x.json"),
        pytest.raises(MachineError, match="another process is making it"),
        alone(tmp_path / "x.json", patience=0.0),
    ):
        pass
    with alone(tmp_path / "x.json", patience=0.0):
        pass


def test_each_try_starts_in_a_clean_folder_and_keeps_what_was_before(tmp_path):
    for number in (1, 2):
        (tmp_path / "rank0.log").write_text(f"try {number}")
        clean(tmp_path)
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []
    assert [(tmp_path / f"attempt{number}" / "rank0.log").read_text() for number in (1, 2)] == ["try 1", "try 2"]
    clean(tmp_path)
    assert not (tmp_path / "attempt3").exists()


def test_the_end_of_a_log_is_its_last_lines_whatever_bytes_are_in_it(tmp_path):
    (tmp_path / "log").write_bytes(b"first\n" * 10_000 + b"\xff\x00broken\n\nlast\n")
    lines = tail(tmp_path / "log").splitlines()
    assert len(lines) == 12
    assert lines[-2:] == ["\N{REPLACEMENT CHARACTER}broken", "last"]
    assert tail(tmp_path / "none") == ""
