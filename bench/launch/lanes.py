"""Several jobs at once, each in a lane that it has for itself meanwhile. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import TypeVar

from bench.launch.watch import Stop

HEAR_SECONDS = 0.2
"""How often the main thread wakes: only it handles signals, and one that another thread took does not wake it."""

Job = TypeVar("Job")
Lane = TypeVar("Lane")
Result = TypeVar("Result")


def in_lanes(jobs: Sequence[Job], lanes: Sequence[Lane], run: Callable[[Job, Lane], Result], stop: Stop) -> list[Result]:
    """What `run(job, lane)` gives for every job, in the jobs' order; as many run at once as there are lanes.

    No job is begun once `stop` was asked for, and the results are those of the jobs that were, or once one has raised, which is raised
    here when those beside it have ended.
    """
    free: SimpleQueue[Lane] = SimpleQueue()
    for lane in lanes:
        free.put(lane)

    def in_a_lane(job: Job) -> list[Result]:
        if stop.asked:
            return []
        lane = free.get()
        try:
            return [run(job, lane)]
        finally:
            free.put(lane)

    with ThreadPoolExecutor(len(lanes)) as pool:
        futures = [pool.submit(in_a_lane, job) for job in jobs]
        running = set(futures)
        while running:
            ended, running = wait(running, HEAR_SECONDS, FIRST_EXCEPTION)
            if any(map(_error, ended)):
                for future in running:
                    future.cancel()
    for future in futures:
        if error := _error(future):
            raise error
    return [result for future in futures for result in future.result()]


def _error(future: Future[list[Result]]) -> BaseException | None:
    """What an ended job has raised; None also for one that was not begun."""
    return None if future.cancelled() else future.exception()
