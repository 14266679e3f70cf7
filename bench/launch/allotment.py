"""How long Slurm lets this allocation last: what ends a trial then is not somebody's wish. Torch-free."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from datetime import datetime

from bench.launch.classify import Verdict
from bench.launch.srun import told_of

EARLY_SECONDS = 2.0
"""Slurm's times are whole seconds."""


@dataclass(frozen=True, slots=True)
class Allotment:
    """A job's start and the end of its time limit, seconds since the epoch."""

    job: str
    began: float
    ends: float

    @classmethod
    def here(cls) -> Allotment | None:
        """That of the job that this process runs in; None outside of one, without a limit, or where squeue does not answer."""
        job = os.environ.get("SLURM_JOB_ID")
        if job is None:
            return None
        try:
            began, ends = (datetime.fromisoformat(when).timestamp() for when in told_of(job, "%S %e"))
        except ValueError:
            return None
        return cls(job, began, ends)

    def verdict(self, asked: str) -> Verdict | None:
        """What became of a trial that had the whole allocation, if the signal `asked` came because its time is over."""
        if asked != signal.SIGTERM.name or time.time() < self.ends - EARLY_SECONDS:
            return None
        limit = round(self.ends - self.began)
        return Verdict(
            "timeout", f"the time limit of Slurm's job {self.job} ended it: {limit} s, all of which it had; a longer one would be right"
        )
