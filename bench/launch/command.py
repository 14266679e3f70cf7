"""The line that starts one node's torchrun agent, and the launcher that runs such lines on this machine. Torch-free.

Ranks meet by static rendezvous at the first node's address. Two nodes on one machine are two agents on the loopback.
"""

from __future__ import annotations

import shlex
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.cell import Cell
from bench.container.engine_line import Seat
from bench.container.overlay import overlaid
from bench.container.runtime import Entered, container_of
from bench.launch.environment import host_threads, rank_environment
from bench.launch.guard import GRACE_SECONDS, Ended, Guarded
from bench.launch.job import LINGER_SECONDS, LaunchError, free_port
from bench.launch.processes import descendants, signal_name
from bench.trial import Trial

PROGRAM = "bench.worker"
"""The module that a rank runs: `main` under torchrun, `run_rank` under fork."""

LOOPBACK = "127.0.0.1"
PORT = 29500


def agent_line(
    cell: Cell, node: int, rank_command: Sequence[str], *, address: str = LOOPBACK, port: int = PORT, python: str = sys.executable
) -> list[str]:
    """The torchrun agent of node `node` of `cell`; `rank_command` is a module and its arguments."""
    return [
        python, "-m", "torch.distributed.run", "--nnodes", str(cell.nodes), "--node-rank", str(node),
        "--nproc-per-node", str(cell.processes_per_node), "--master-addr", address, "--master-port", str(port),
        "--max-restarts", "0", "-m", *rank_command,
    ]  # fmt: skip


def command_lines(cell: Cell, cell_file: Path, *, trial: int = 0, port: int = PORT) -> list[str]:
    """What one types on every node, a line each, node 0 first; several nodes meet at the variable HEAD, node 0's host name.

    Where the ranks are forked on one machine, or there is one node, it is one line.
    """
    line = shlex.join(["coati-bench", "trial", str(cell_file), *(["--trial", str(trial)] if trial else [])])
    if cell.nodes == 1 or cell.settings.launcher == "fork":
        return [line]
    return [f"{line} --nodes {cell.nodes} --node-rank {node} --rendezvous $HEAD:{port}" for node in range(cell.nodes)]


def rank_command(trial_file: Path, program: str) -> list[str]:
    """The module that an agent runs for every rank, and its arguments."""
    return ["bench.launch.rank", str(trial_file), program]


def agent_log(trial: Trial, node: int) -> Path:
    """Where a node's agent writes."""
    return Path(trial.work) / f"agent{node}.log"


def visible_devices(devices: Sequence[str]) -> dict[str, str]:
    """The variable that shows an agent these devices (UUIDs) and no others; nothing without devices."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}


def inside_note(trial: Trial, node: int) -> Path:
    """Where the topmost process in a node's container notes its id, if that is no child of ours."""
    return Path(trial.work) / f"inside{node}.pid"


def contained(line: list[str], trial: Trial, environment: dict[str, str], *, node: int = 0, seat: Seat | None = None) -> Entered:
    """`line` and its environment inside the trial's image, or as they are but for its overlay.

    `seat`: None for ranks on several hosts, which need the host's network. Raises MachineError without a runtime.
    """
    container = container_of(trial)
    if container is None:
        return Entered(line, overlaid(trial, environment))
    return container.enter(line, environment, seat=seat, note=inside_note(trial, node))


class Agents:
    """Launcher: one guarded torchrun agent for each node, all on this machine.

    `outer` and `inner` are put before the agent's line (srun, then a container). `keep` are descriptors of locks, held until
    the last process is gone.
    """

    name = "torchrun"

    def __init__(
        self, *, program: str = PROGRAM, search_path: tuple[str, ...] = (), outer: tuple[str, ...] = (), inner: tuple[str, ...] = (),
        choose_port: Callable[[], int] = free_port, variables: Mapping[str, str] | None = None, keep: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self._program, self._search_path, self._prefix = program, search_path, (*outer, *inner)
        self._choose_port, self._variables, self._keep = choose_port, dict(variables or {}), keep

    def simulated_nodes(self, trial: Trial) -> bool:
        """True for every cell of several nodes, as all agents run here."""
        return trial.parsed_cell.nodes > 1

    def devices_here(self, trial: Trial) -> int:
        """One for every rank, as all agents run here."""
        return trial.parsed_cell.world_size

    def command(self, trial: Trial, trial_file: Path, port: int = PORT) -> list[str]:
        """The agents' lines with the usual port; a run chooses a free one."""
        lines = self._lines(trial.parsed_cell, trial_file, port)
        seats = (Seat("JOB", node, len(lines)) for node in range(len(lines)))
        return [shlex.join(contained(line, trial, {}, node=seat.number, seat=seat).line) for line, seat in zip(lines, seats, strict=True)]

    def start(self, trial: Trial, trial_file: Path, devices: Sequence[str]) -> AgentsJob:
        """Start one agent for each node."""
        cell, port, name = trial.parsed_cell, self._choose_port(), uuid.uuid4().hex[:12]
        job = AgentsJob()
        try:
            for node, line in enumerate(self._lines(cell, trial_file, port)):
                mine = devices[node * cell.processes_per_node : (node + 1) * cell.processes_per_node]
                log = agent_log(trial, node)
                entered = contained(line, trial, self._environment(trial, mine), node=node, seat=Seat(name, node, cell.nodes))
                job.add(start_guarded(entered, log, self._keep), log, inside_note(trial, node))
        except OSError as error:
            job.end()
            raise LaunchError(f"the agent of node {len(job.log_paths())} could not be started: {error}") from error
        return job

    def _lines(self, cell: Cell, trial_file: Path, port: int) -> list[list[str]]:
        ranks = rank_command(trial_file, self._program)
        return [[*self._prefix, *agent_line(cell, node, ranks, port=port)] for node in range(cell.nodes)]

    def _environment(self, trial: Trial, devices: Sequence[str]) -> dict[str, str]:
        extra = {"GLOO_SOCKET_IFNAME": "lo", **self._variables, **visible_devices(devices)}
        return rank_environment(extra, self._search_path, threads=host_threads(trial, simulated_nodes=True))


def start_guarded(entered: Entered, log: Path, keep: tuple[int, ...], hand_on: tuple[int, ...] = ()) -> Guarded:
    """Start a line, in its image or not, under guard. Raises OSError."""
    grace = GRACE_SECONDS if entered.grace is None else entered.grace
    return Guarded(entered.line, environment=entered.environment, log=log, keep=keep, hand_on=hand_on, grace=grace)


class _Agent(NamedTuple):
    guarded: Guarded
    log: Path
    inside: Path | None
    """Where its container's topmost process notes its id, if it does."""

    @property
    def top(self) -> int:
        """The process that everything of it is below."""
        return noted(self.inside) or self.guarded.pid


class AgentsJob:
    """The running agents of one try."""

    what = "the torchrun agent of node {}"

    def __init__(self) -> None:
        self._agents: list[_Agent] = []
        self._by_itself: list[Ended | None] = []
        self._failed_at: float | None = None

    def add(self, agent: Guarded, log: Path, inside: Path | None = None) -> None:
        """Take in one more agent; `inside` is where its container's topmost process notes its id, if it does."""
        self._agents.append(_Agent(agent, log, inside))

    def wait(self, seconds: float) -> bool:
        """Whether all agents have ended, or one badly and the others had `LINGER_SECONDS` to follow."""
        share = seconds / len(self._agents)
        self._by_itself = [agent.guarded.wait(share) for agent in self._agents]
        if self._failed_at is None and any(ended is not None and ended.code != 0 for ended in self._by_itself):
            self._failed_at = time.monotonic()
        lingered = self._failed_at is not None and time.monotonic() > self._failed_at + LINGER_SECONDS
        return lingered or None not in self._by_itself

    def pids(self) -> list[int]:
        """Agents and ranks; the guards are no part of the measured job."""
        return descendants([agent.top for agent in self._agents])

    def end(self) -> None:
        """End all agents and all below them."""
        for agent in self._agents:
            agent.guarded.ask_to_end()
        for agent in self._agents:
            agent.guarded.end()

    def trouble(self) -> str | None:
        """How the first agent ended that ended badly by itself."""
        for node, ended in enumerate(self._by_itself):
            if ended is not None and ended.code != 0:
                how = "was killed together with its guard" if ended.code is None else f"ended with {signal_name(ended.code)}"
                return f"{self.what.format(node)} {how}"
        return None

    def first_sign(self) -> float | None:
        """When the first agent was seen to have ended badly."""
        return self._failed_at

    def log_paths(self) -> list[Path]:
        """Output of the agents."""
        return [agent.log for agent in self._agents]


def noted(note: Path | None) -> int | None:
    """The process id in a note, or None."""
    try:
        return None if note is None else int(note.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
