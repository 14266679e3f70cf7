"""The guard of a command."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from bench.launch.environment import rank_environment
from bench.launch.guard import Ended, Guarded
from bench.launch.processes import alive, descendants


@pytest.fixture
def start(tmp_path):
    started = []

    def start(code, **more):
        guarded = Guarded([sys.executable, "-S", "-c", code], environment=rank_environment(), log=tmp_path / "log", grace=0.5, **more)
        started.append(guarded)
        return guarded

    yield start
    for guarded in started:
        guarded.end()


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize(
    ("code", "expected"), [("raise SystemExit(0)", 0), ("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 11)", -11)]
)
def test_it_tells_how_its_command_ended(start, code, expected):
    assert start(code).wait(10) == Ended(code=expected)


def test_waiting_is_bounded(start):
    guarded = start("import time; time.sleep(60)")
    assert guarded.wait(0.05) is None
    assert guarded.end() == Ended(code=-signal.SIGTERM)
    assert guarded.end() == Ended(code=-signal.SIGTERM), "ending twice is no mistake"


def test_what_the_command_leaves_behind_is_ended_and_counted(start, tmp_path):
    note = tmp_path / "pid"
    code = (
        f"import os, signal, time\nnote = {str(note)!r}\nif os.fork() == 0:\n os.setsid()\n signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        " open(note, 'w').write(str(os.getpid()))\n time.sleep(60)\n"
        "while not (os.path.exists(note) and os.path.getsize(note)): time.sleep(0.01)"
    )
    assert start(code).wait(10) == Ended(code=0, killed=1)
    assert not alive(int(note.read_text()))


def test_sigterm_to_the_guard_ends_its_tree(start):
    guarded = start("import time; time.sleep(60)")
    wait_for(lambda: descendants([guarded.pid]))
    os.kill(guarded.pid, signal.SIGTERM)
    assert guarded.wait(10) == Ended(code=-signal.SIGTERM)


def test_a_guard_that_was_killed_is_told_as_an_unknown_end_and_its_tree_is_gone(start):
    guarded = start("import time; time.sleep(60)")
    wait_for(lambda: descendants([guarded.pid]))
    below = descendants([guarded.pid])
    os.kill(guarded.pid, signal.SIGKILL)
    assert guarded.wait(10).code is None
    assert not any(map(alive, below))


def test_its_commands_output_goes_to_the_log(start, tmp_path):
    start("import sys; print('out'); print('err', file=sys.stderr)").wait(10)
    assert sorted((tmp_path / "log").read_text().split()) == ["err", "out"]


def test_a_kept_descriptor_is_not_handed_to_the_command(start, tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        code = f"import os; open({str(tmp_path / 'seen')!r}, 'w').write(' '.join(os.readlink(f'/proc/self/fd/{{fd}}') for fd in (0, 1, 2, {lock.fileno()}) if os.path.exists(f'/proc/self/fd/{{fd}}')))"  # noqa: E501
        start(code, keep=(lock.fileno(),)).wait(10)
    assert str(tmp_path / "lock") not in Path(tmp_path / "seen").read_text().split()
