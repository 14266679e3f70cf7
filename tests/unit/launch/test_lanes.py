"""Jobs in lanes."""

from __future__ import annotations

import threading

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
