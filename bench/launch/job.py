"""What the supervisor asks of a launcher. Torch-free.

A launcher knows how ranks come to life (torchrun agents on this machine, the fork parent; srun or a container around an
agent); the supervisor knows nothing of that and all of time limits, outcomes and records.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from bench.trial import Trial

LINGER_SECONDS = 3.0
"""What the other ranks get to write their parts, once one has failed."""


class LaunchError(Exception):
    """The launcher could not start the ranks; an incident, so it is tried again."""


class AbsentError(Exception):
    """A node that the trial needs did not come, or is not there; waiting again is no use."""

    def __init__(self, text: str, waited_seconds: float | None = None) -> None:
        self.waited_seconds = waited_seconds
        super().__init__(text)


class Job(Protocol):
    """One try at a trial, running."""

    def wait(self, seconds: float) -> bool:
        """Whether it has ended by itself, as soon as that is so, at the latest after `seconds`."""

    def pids(self) -> list[int]:
        """Its live processes on this machine."""

    def end(self) -> None:
        """End all of it: SIGTERM, a short grace, SIGKILL. Nothing of it runs afterwards, whether or not it had ended by itself."""

    def trouble(self) -> str | None:
        """What went wrong in the launcher itself, after `end`; None if nothing did, or if only a rank failed."""

    def first_sign(self) -> float | None:
        """When what is wrong in the launcher itself first showed, by the monotonic clock: a node's last beat, an agent's end."""

    def log_paths(self) -> list[Path]:
        """Logs of the launcher itself."""


class Launcher(Protocol):
    """A way to start the ranks of a trial."""

    name: str
    """`torchrun` or `fork`; `srun` or `manual` for torchrun agents on several hosts."""

    def simulated_nodes(self, trial: Trial) -> bool:
        """Whether several nodes of the cell are agents on one machine."""

    def devices_here(self, trial: Trial) -> int:
        """How many devices of this machine the trial needs."""

    def start(self, trial: Trial, trial_file: Path, devices: Sequence[str]) -> Job:
        """Start the ranks on `devices` (UUIDs of this machine, in order; none on the CPU).

        Raises LaunchError where that fails at once, AbsentError where a node is missing.
        """

    def command(self, trial: Trial, trial_file: Path) -> list[str]:
        """The lines that it runs, one for each node."""


def free_port() -> int:
    """A port of the loopback that nobody uses now; somebody may take it before we do, which is a launch incident."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
