"""What a scheduler still holds of a suite, for a driver that is begun, interrupted or begun again. Torch-free.

Jobs outlive the driver that submitted them. They carry a prefix that stands for the suite's folder, so that the next driver finds
them: it waits for what a killed one left, rather than making a block twice, and an interrupted one cancels its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import yaml

from bench.errors import MachineError, UserError

PLUGIN = "snakemake_executor_plugin_slurm"
LOOK_SECONDS = 5.0
QUERY_SECONDS = 60.0
HELD = "PENDING,RUNNING,COMPLETING,CONFIGURING,SUSPENDED"
"""States of jobs that will still do something."""


def uses_slurm(profile: Path) -> bool:
    """Whether this profile's folder submits to Slurm."""
    content = yaml.safe_load((profile / "config.yaml").read_text(encoding="utf-8"))
    return isinstance(content, dict) and content.get("executor") == "slurm"


def check_slurm() -> None:
    """Raise MachineError with what this machine lacks to submit jobs."""
    lacks = [program for program in ("sbatch", "squeue", "scancel") if shutil.which(program) is None]
    if importlib.util.find_spec(PLUGIN) is None:
        raise MachineError("the profile submits to Slurm; seen: no snakemake-executor-plugin-slurm; `make install-slurm` installs it")
    if lacks:
        raise MachineError(f"the profile submits to Slurm; seen: no {', '.join(lacks)} on PATH; a login node of the cluster would be right")


def check_partitions(profile: Path) -> None:
    """Raise UserError for a partition that this profile's folder asks for and the cluster does not have; nothing if sinfo is silent."""
    known = _partitions()
    unknown = [f"{name} ({where})" for where, name in asked_partitions(profile) if name not in known]
    if known and unknown:
        raise UserError(
            f"{profile / 'config.yaml'}: a partition that does not exist: {', '.join(unknown)}; "
            f"seen by sinfo: {', '.join(sorted(known))}; name one of these as slurm_partition"
        )


def asked_partitions(profile: Path) -> list[tuple[str, str]]:
    """Where in the profile each partition is asked for, and its name; `gpu,cpu` asks for two."""
    content = yaml.safe_load((profile / "config.yaml").read_text(encoding="utf-8")) or {}
    asked = {"default-resources": content.get("default-resources")}
    asked |= {f"set-resources: {rule}": resources for rule, resources in (content.get("set-resources") or {}).items()}
    return [
        (where, name.strip())
        for where, resources in asked.items()
        for name in str(_resources(resources).get("slurm_partition") or "").strip("'\"").split(",")
        if name.strip()
    ]


def _resources(written: object) -> dict[str, object]:
    """Resources as Snakemake takes them: a mapping, or a list of `name=value`."""
    if isinstance(written, list):
        pairs = (str(text).partition("=") for text in written)
        return {name.strip(): value.strip() for name, _, value in pairs}
    return written if isinstance(written, dict) else {}


def _partitions() -> set[str]:
    """Names of the cluster's partitions, hidden ones too; none if sinfo does not answer, of which squeue will speak."""
    try:
        done = subprocess.run(["sinfo", "--all", "-h", "-o", "%R"], capture_output=True, text=True, check=False, timeout=QUERY_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return set()
    return set(done.stdout.split()) if done.returncode == 0 else set()


class Queue:
    """The jobs of one suite."""

    def __init__(self, root: Path) -> None:
        self.prefix = f"coati-bench-{hashlib.sha256(str(root.absolute()).encode()).hexdigest()[:12]}"

    def held(self) -> list[str]:
        """Numbers of this user's jobs of the suite that are waiting or running. Raises MachineError if the scheduler does not answer."""
        return self._jobs(HELD)

    def preempted(self) -> list[str]:
        """Numbers of those that were preempted and are not held any more: Slurm does not start them again. Raises MachineError."""
        gone = self._jobs("PREEMPTED")
        held = set(self.held()) if gone else set()
        return [job for job in gone if job not in held]

    def _jobs(self, states: str) -> list[str]:
        command = ["squeue", "--me", "-h", "-t", states, "-o", "%i %j"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=QUERY_SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            text = getattr(error, "stderr", None) or str(error)
            raise MachineError(f"squeue does not answer: {str(text).strip()}; is this a login node, and slurmctld up?") from error
        jobs = (line.split(maxsplit=1) for line in done.stdout.splitlines())
        return [number for number, name in jobs if name.startswith(self.prefix)]

    def wait(self, say: Callable[[str], None], look: float = LOOK_SECONDS) -> None:
        """Wait until nothing is held that an earlier driver submitted."""
        told: list[str] = []
        while held := self.held():
            if held != told:
                say(f"jobs of an earlier run are still in the queue or running: {', '.join(held)}; waiting for them")
            told = held
            time.sleep(look)

    def cancel(self) -> list[str]:
        """Cancel what is held and return its numbers; a scheduler that does not answer is told as none."""
        try:
            held = self.held()
            if held:
                subprocess.run(["scancel", *held], capture_output=True, check=False, timeout=QUERY_SECONDS)
        except (MachineError, subprocess.TimeoutExpired):
            return []
        return held


class PreemptionWatch:
    """Sees jobs that were preempted for good since it was made.

    Snakemake's plugin leaves a preempted job to Slurm and waits for it, for ever where Slurm does not start it again.
    """

    def __init__(self, queue: Queue, look: float = 2 * LOOK_SECONDS) -> None:
        self._queue, self._look_seconds = queue, look
        self._known: set[str] = set()
        self._next = time.monotonic() + look
        with suppress(MachineError):
            self._known = set(queue.preempted())

    def lost(self) -> list[str]:
        """Their numbers, once nothing else of the suite is waiting or running; none while the scheduler does not answer."""
        if time.monotonic() < self._next:
            return []
        self._next = time.monotonic() + self._look_seconds
        try:
            found = [job for job in self._queue.preempted() if job not in self._known]
            return [] if not found or self._queue.held() else found
        except MachineError:
            return []
