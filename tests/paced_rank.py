"""The real worker with a known slowdown planted at the edge of its steps: the program of the ruler's real trials.

The facts of the trial's first input say how; without them this is the worker as it is.
`beat_seconds`: after the warm-up a step lasts exactly so long. The work is done as ever, the rest is waited for, and a late step is made
up for by the next ones: the time of a trial depends on the beat and not on what else the machine does. Where it is late in the end
although the rank has right of way (as far as it may take it), the trial ends as an error that says so: its truth is not known.
`more_work`: after each step, matrix products for this share of the step's own time: a slowdown of real work.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import bench.worker
from bench.measure.clock import synchronise
from bench.stages.base import StepReport
from bench.trial import Trial, load_trial

UNTIMED_STEPS = 5
"""Steps that are warm-up in any case (bench.report.windows), so that they need no beat."""
LATE_SHARE = 0.1
"""Of a beat, by which the last step may be late."""
LATE = "the machine did not keep the beat"


class Paced:
    """A stage whose steps end on a beat, or do more work than they need; all else is the stage's own."""

    def __init__(self, stage: Any, device: torch.device, *, beat_seconds: float = 0.0, more_work: float = 0.0) -> None:
        self._stage, self._device = stage, device
        self._beat, self._more = beat_seconds, more_work
        self._spent = 0.0
        self._matrix = torch.ones(64, 64, device=device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def advance(self, index: int) -> StepReport:
        """The stage's step, then what is planted."""
        if self._beat and index == UNTIMED_STEPS:
            _take_right_of_way()
        begin = time.perf_counter()
        report: StepReport = self._stage.advance(index)
        synchronise(self._device)
        self._work_until(time.perf_counter() + self._more * (time.perf_counter() - begin))
        if self._beat and index >= UNTIMED_STEPS:
            due = self._beat * (index + 1 - UNTIMED_STEPS)
            _wait_until(begin + due - self._spent)
            self._spent += time.perf_counter() - begin
            if index == self._stage.total - 1 and self._spent - due > LATE_SHARE * self._beat:
                raise TimeoutError(f"{LATE}: late by {self._spent - due:.3f} s after {index + 1} steps")
        return report

    def _work_until(self, end: float) -> None:
        while time.perf_counter() < end:
            torch.mm(self._matrix, self._matrix)
            synchronise(self._device)


def _take_right_of_way() -> None:
    """Real-time scheduling where that is allowed; most of the time this thread sleeps."""
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def _wait_until(end: float) -> None:
    """Sleep, and spin over the last bit: a sleep wakes up late."""
    while (left := end - time.perf_counter()) > 0:
        if left > 0.002:
            time.sleep(left - 0.001)


def run_rank(trial: Trial) -> int:
    """Run the rank with the planted facts of its trial."""
    build, facts = bench.worker.build_stage, trial.data[0].facts
    planted = {name: facts[name] for name in ("beat_seconds", "more_work") if name in facts}

    def paced(trial: Trial, strategy: Any, place: Any) -> Any:
        stage = build(trial, strategy, place)
        return Paced(stage, place.device, **planted) if planted else stage

    bench.worker.build_stage = paced
    return bench.worker.run_rank(trial)


if __name__ == "__main__":
    sys.exit(run_rank(load_trial(Path(sys.argv[1]))))
