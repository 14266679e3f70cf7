"""Jobs in lanes."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from bench.launch.lanes import in_lanes
from bench.launch.watch import Stop


def test_as_many_jobs_run_at_once_as_there_are_lanes_each_in_one_of_its_own_and_results_keep_their_order():
    together, taken = threading.Barrier(2), set()

    def run(job, lane):
        assert lane not in taken
        taken.add(lane)
        together.wait(30)  # broken, were they to run one after the other
        taken.remove(lane)
        together.wait(30)
        return job * 10

    assert in_lanes(range(4), ["left", "right"], run, Stop()) == [0, 10, 20, 30]


def test_after_a_stop_no_job_is_begun():
    stop, seen = Stop(), []

    def run(job, lane):
        seen.append(job)
        stop.ask("SIGINT")
        return job

    assert in_lanes(range(5), ["only"], run, stop) == [0]
    assert seen == [0]


def test_a_job_that_raises_is_the_last_to_begin_and_its_error_is_told():
    seen = []

    def run(job, lane):
        seen.append(job)
        raise ValueError(f"job {job}")

    with pytest.raises(ValueError, match="job 0"):
        in_lanes(range(50), ["only"], run, Stop())
    assert len(seen) < 50


def test_a_signal_that_another_thread_took_is_heard_while_jobs_run():
    taken = threading.Event()

    def run(job, lane):
        time.sleep(0.3)  # until the main thread waits for this one
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        return taken.wait(10)

    before = signal.signal(signal.SIGTERM, lambda *_: taken.set())
    try:
        assert in_lanes([0], ["only"], run, Stop()) == [True]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_jobs_beside_one_that_raised_end_before_its_error_is_told():
    together, seen = threading.Barrier(2), []

    def run(job, lane):
        together.wait(30)
        if job == 0:
            raise ValueError("job 0")
        time.sleep(0.3)
        seen.append(job)
        return job

    with pytest.raises(ValueError, match="job 0"):
        in_lanes(range(2), ["left", "right"], run, Stop())
    assert seen == [1]
