"""Launcher `srun`: inside an allocation of Slurm, one step with one task on each node, which starts that node's agent. Torch-free.

srun is outermost, then on every node `bench.launch.node`, the container and torchrun's agent. Slurm ends the whole step when a task
fails or srun is told to end, so nothing of a trial outlives it on any node; the block itself runs where Slurm started the job.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.launch.assemble import share_a_machine
from bench.launch.command import PORT, PROGRAM, Agents, AgentsJob, agent_log
from bench.launch.environment import host_threads, rank_environment
from bench.launch.guard import Guarded
from bench.launch.job import Launcher, LaunchError, free_port
from bench.launch.processes import alive, descendants
from bench.launch.rank import read_process
from bench.trial import Trial

GRACE_SECONDS = 20.0
"""What srun gets to end its step on all nodes."""

QUERY_SECONDS = 30.0
CONFIGURATION = "SLURM_CONF"
"""Names another configuration than /etc/slurm's, where a site has that."""


class SrunAgents:
    """One step for each try. Slurm decides which devices a node's task sees."""

    name = "srun"

    def __init__(
        self, job: str, *, program: str = PROGRAM, search_path: tuple[str, ...] = (), keep: tuple[int, ...] = (),
        choose_port: Callable[[], int] = free_port,
    ) -> None:  # fmt: skip
        self._job, self._program, self._search_path, self._keep = job, program, search_path, keep
        self._choose_port = choose_port

    def simulated_nodes(self, trial: Trial) -> bool:
        """Whether nodes share a machine, by what they noted."""
        return share_a_machine(trial)

    def devices_here(self, trial: Trial) -> int:
        """Devices of this node, where the first task runs."""
        return trial.parsed_cell.processes_per_node

    def command(self, trial: Trial, trial_file: Path, port: int = PORT) -> list[str]:
        """The step's line with the usual port."""
        return [shlex.join(self._line(trial, trial_file, port))]

    def start(self, trial: Trial, trial_file: Path, devices: Sequence[str]) -> SrunJob:  # noqa: ARG002 (Slurm hands them out)
        """Start the step."""
        log, environment = Path(trial.work) / "srun.log", self._environment(trial)
        try:
            step = Guarded(
                self._line(trial, trial_file, self._choose_port()), environment=environment, log=log, grace=GRACE_SECONDS, keep=self._keep
            )
        except OSError as error:
            raise LaunchError(f"srun could not be started: {error}") from error
        job = SrunJob(trial)
        job.add(step, log)
        return job

    def _line(self, trial: Trial, trial_file: Path, port: int) -> list[str]:
        nodes = str(trial.parsed_cell.nodes)
        return [
            "srun", "--jobid", self._job, "--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node", "1", "--kill-on-bad-exit=1",
            "--overlap", "--cpu-bind=none", "--mem=0", "--unbuffered", "--input=none",
            sys.executable, "-m", "bench.launch.node", str(trial_file), "--port", str(port), "--program", self._program,
            *(["--search-path", json.dumps(self._search_path)] if self._search_path else []),
        ]  # fmt: skip

    def _environment(self, trial: Trial) -> dict[str, str]:
        kept = {CONFIGURATION: os.environ[CONFIGURATION]} if CONFIGURATION in os.environ else {}
        return rank_environment(kept, self._search_path, threads=host_threads(trial))


class SrunJob(AgentsJob):
    """The running step; its ranks are children of Slurm's daemons, not of ours."""

    what = "the step of srun"

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self._trial = trial

    def pids(self) -> list[int]:
        """The ranks of this node and all below them, by what the ranks noted."""
        notes = (read_process(Path(self._trial.work), rank) for rank in range(self._trial.parsed_cell.world_size))
        here = socket.gethostname()
        ranks = [note.pid for note in notes if note and note.code is None and note.hostname == here and alive(note.pid)]
        return [*ranks, *descendants(ranks)]

    def log_paths(self) -> list[Path]:
        """Output of srun and of every node's agent."""
        return [*super().log_paths(), *(agent_log(self._trial, node) for node in range(self._trial.parsed_cell.nodes))]


def agents_here(nodes: int, *, program: str = PROGRAM, search_path: tuple[str, ...] = (), keep: tuple[int, ...] = ()) -> Launcher:
    """How cells of so many nodes are started here: by srun inside an allocation that has them, else as agents on this machine."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("srun") is None:
        return Agents(program=program, search_path=search_path, keep=keep)
    if (allocated := allocated_nodes(job, os.environ)) < nodes:
        print(f"the allocation {job} has {allocated} of {nodes} nodes; they are simulated by agents on this machine", flush=True)
        return Agents(program=program, search_path=search_path, keep=keep)
    return SrunAgents(job, program=program, search_path=search_path, keep=keep)


def allocated_nodes(job: str, variables: Mapping[str, str]) -> int:
    """How many nodes the allocation has, by the scheduler itself, else by the job's environment; 0 if nobody says."""
    told = told_of(job, "%D")
    number = told[0] if told else variables.get("SLURM_JOB_NUM_NODES", "0")
    return int(number) if number.isdigit() else 0


def told_of(job: str, columns: str) -> list[str]:
    """What squeue tells of a job, word by word; nothing where it does not answer."""
    try:
        line = ["squeue", "-h", "-j", job, "-o", columns]
        return subprocess.run(line, capture_output=True, text=True, check=False, timeout=QUERY_SECONDS).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return []
