"""Finding and ending process trees."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from bench.launch.processes import MARKER, alive, descendants, end_processes, marked, proportional_bytes, resident_bytes, signal_name

SLEEP = "import time; time.sleep(60)"


def test_descendants_are_children_and_their_children_without_zombies():
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-S', '-c', {SLEEP!r}]); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True) as child:
        below = int(child.stdout.readline())
        try:
            assert set(descendants([os.getpid()])) >= {child.pid, below}
            assert descendants([child.pid]) == [below]
        finally:
            os.kill(below, signal.SIGKILL)
    assert not alive(below)


def test_a_zombie_is_not_alive():
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    deadline = time.monotonic() + 10
    while alive(child.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(child.pid)
    assert child.pid not in descendants([os.getpid()])
    child.wait()


def test_a_marker_finds_a_process_by_what_it_was_started_with():
    child = subprocess.Popen([sys.executable, "-S", "-c", SLEEP], env={MARKER: "abc"})
    try:
        deadline = time.monotonic() + 5
        while marked("abc") != [child.pid] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert marked("abc") == [child.pid]
        assert marked("ab") == []
    finally:
        child.kill()
        child.wait()


def test_who_obeys_sigterm_is_not_killed_and_who_does_not_is():
    deaf = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); {SLEEP}"
    children = [
        subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
        for code in (f"print('ready', flush=True); {SLEEP}", deaf)
    ]
    for child in children:
        child.stdout.readline()
    killed = end_processes(lambda: [child.pid for child in children if alive(child.pid)], grace=0.3)
    assert killed == [children[1].pid]
    assert [child.wait() for child in children] == [-signal.SIGTERM, -signal.SIGKILL]
    for child in children:
        child.stdout.close()


def test_sizes_are_in_bytes_and_shared_pages_count_less_in_the_proportional_one():
    resident, proportional = resident_bytes(os.getpid()), proportional_bytes(os.getpid())
    assert 5 << 20 < resident < 8 << 30
    assert 0 < proportional <= resident * 1.1
    assert resident_bytes(2**22 + 1) == 0


def test_exit_codes_are_told_for_people():
    assert [signal_name(code) for code in (0, 3, -11, -99)] == ["exit code 0", "exit code 3", "SIGSEGV", "signal 99"]
