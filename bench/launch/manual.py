"""Launcher `manual`: the same command typed on every node, in any order, where there is no scheduler. Torch-free.

Node 0 supervises: it waits for the others, says when to start and when to stop, judges and leaves the record. Every node keeps its
own agent under guard, so that whatever ends a node's command ends its ranks; all files are in a folder that all nodes share.
"""

from __future__ import annotations

import shlex
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from bench.errors import MachineError
from bench.launch.assemble import share_a_machine
from bench.launch.command import PROGRAM, agent_log
from bench.launch.guard import GRACE_SECONDS, Guarded
from bench.launch.job import LINGER_SECONDS, AbsentError, LaunchError
from bench.launch.meeting import SILENT_SECONDS, Beacon, Sight
from bench.launch.node import Meeting, node_line, start_agent
from bench.launch.pool import BusyError, LackingError, hold_devices
from bench.launch.processes import descendants, signal_name
from bench.launch.watch import Stop
from bench.trial import Trial

LOOK_SECONDS = 0.1
PARTING_SECONDS = GRACE_SECONDS + 20.0
"""Longest wait for the other nodes to have ended their ranks."""


class Rendezvous(NamedTuple):
    """Where the nodes of one trial meet."""

    nodes: int
    node: int
    address: str
    port: int

    @property
    def meeting(self) -> Meeting:
        """As the agents need it."""
        return Meeting(node=self.node, address=self.address, port=self.port)


class Program(NamedTuple):
    """What the ranks run."""

    name: str = PROGRAM
    search_path: tuple[str, ...] = ()


RANKS = Program()


def meeting_folder(work: Path) -> Path:
    """Where the nodes of the trial with this work folder say what they do; beside it, since a try begins with an empty one."""
    return work.with_name(f"{work.name}-nodes")


class ManualNodes:
    """Launcher of node 0. A context manager: while it is open, the other nodes see that a trial is to be run."""

    name = "manual"

    def __init__(
        self, trial: Trial, rendezvous: Rendezvous, stop: Stop, *, patience: float, program: Program = RANKS, keep: tuple[int, ...] = ()
    ) -> None:
        self._rendezvous, self._stop, self._patience = rendezvous, stop, patience
        self._program, self._keep = program, keep
        folder = meeting_folder(Path(trial.work))
        self._beacon = Beacon(folder / "node0.json", node=0, host=socket.gethostname(), phase="gather", number=0)
        self._others = {node: Sight(folder / f"node{node}.json") for node in range(1, rendezvous.nodes)}
        self._number = 0

    def __enter__(self) -> Self:
        self._beacon.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._beacon.__exit__()

    def conclude(self, outcome: str, reason: str | None) -> None:
        """Tell the other nodes how it ended."""
        self._beacon.say(phase="over", outcome=outcome, reason=(reason or "")[:600])

    def devices_here(self, trial: Trial) -> int:
        """Devices of this node."""
        return trial.parsed_cell.processes_per_node

    def simulated_nodes(self, trial: Trial) -> bool:
        """Whether nodes share a machine, by what they noted."""
        return share_a_machine(trial)

    def command(self, trial: Trial, trial_file: Path) -> list[str]:
        """Every node's agent."""
        places = (
            Meeting(node=node, address=self._rendezvous.address, port=self._rendezvous.port) for node in range(self._rendezvous.nodes)
        )
        return [shlex.join(node_line(trial, trial_file, place, self._program.name)) for place in places]

    def start(self, trial: Trial, trial_file: Path, devices: Sequence[str]) -> ManualJob:
        """Wait for all nodes, then start. Raises AbsentError if one does not come in time, LaunchError if this node's agent cannot."""
        self._number += 1
        self._beacon.say(phase="gather", number=self._number)
        self._gather()
        self._beacon.say(phase="run")
        try:
            name, search_path = self._program
            own = start_agent(
                trial, trial_file, self._rendezvous.meeting, devices=devices, program=name, search_path=search_path, keep=self._keep
            )
        except OSError as error:
            self._beacon.say(phase="gather")
            raise LaunchError(f"the agent of node 0 could not be started: {error}") from error
        return ManualJob(own, self._beacon, self._others, self._number, [agent_log(trial, node) for node in range(self._rendezvous.nodes)])

    def _gather(self) -> None:
        begin = time.monotonic()
        while absent := [node for node, sight in self._others.items() if not sight.look().alive or sight.words.get("phase") != "wait"]:
            if self._stop.wait(LOOK_SECONDS):
                raise AbsentError("asked to stop before all nodes had come")
            if time.monotonic() > begin + self._patience:
                came = {
                    0: socket.gethostname(),
                    **{node: sight.words.get("host") for node, sight in self._others.items() if node not in absent},
                }
                raise AbsentError(
                    f"node{'s' * (len(absent) > 1)} {', '.join(map(str, absent))} never came: waited {self._patience:g} s; seen: "
                    f"{', '.join(f'node {node} ({host})' for node, host in came.items())}; the same line with --node-rank "
                    f"{absent[0]} is to be typed there, in a folder that all nodes share",
                    waited_seconds=time.monotonic() - begin,
                )


class ManualJob:
    """One try on all nodes, as node 0 sees it."""

    def __init__(self, own: Guarded, beacon: Beacon, others: dict[int, Sight], number: int, logs: list[Path]) -> None:
        self._own, self._beacon, self._others, self._number, self._logs = own, beacon, others, number, logs
        self._bad: dict[int, tuple[str, float]] = {}
        """What is wrong with a node, and when that first showed, by the monotonic clock."""
        self._failed_at: float | None = None

    def wait(self, seconds: float) -> bool:
        """Whether the agents of all nodes have ended, or one badly and the others had `LINGER_SECONDS` to follow."""
        ended = self._own.wait(seconds)
        if ended is not None and ended.code != 0:
            how = "was killed together with its guard" if ended.code is None else f"ended with {signal_name(ended.code)}"
            self._blame(0, f"the agent of node 0 {how}")
        done = [self._is_done(node, sight.look()) for node, sight in self._others.items()]
        if self._bad and self._failed_at is None:
            self._failed_at = time.monotonic()
        lingered = self._failed_at is not None and time.monotonic() > self._failed_at + LINGER_SECONDS
        return lingered or (ended is not None and all(done))

    def _is_done(self, node: int, sight: Sight) -> bool:
        words = sight.words
        if not sight.alive:
            silent = f"was silent for more than {SILENT_SECONDS:g} s: its command or its link is gone"
            self._blame(node, f"node {node} ({words.get('host')}) {silent}", sight.last_beat)
        elif words.get("phase") == "left":
            self._blame(node, f"the command of node {node} ({words.get('host')}) was ended there")
        elif words.get("number") == self._number and words.get("problem"):
            self._blame(node, f"node {node} ({words.get('host')}): {words['problem']}")
        elif words.get("number") != self._number or words.get("phase") != "ended":
            return False
        return True

    def _blame(self, node: int, what: str, since: float | None = None) -> None:
        """Keep what is wrong with a node, and since when, if that is not only now."""
        self._bad.setdefault(node, (what, time.monotonic() if since is None else since))

    def first_sign(self) -> float | None:
        """The last beat of a node that fell silent, or when anything else was noticed."""
        return min((since for _, since in self._bad.values()), default=None)

    def pids(self) -> list[int]:
        """Agent and ranks of this node."""
        return descendants([self._own.pid])

    def end(self) -> None:
        """End this node's agent and have the others end theirs; those that still speak are waited for."""
        self._beacon.say(phase="gather")
        self._own.end()
        deadline = time.monotonic() + PARTING_SECONDS
        while time.monotonic() < deadline and any(self._still_runs(sight.look()) for sight in self._others.values()):
            time.sleep(LOOK_SECONDS)

    @staticmethod
    def _still_runs(sight: Sight) -> bool:
        return sight.alive and sight.words.get("phase") in ("run", "ended")

    def trouble(self) -> str | None:
        """What was wrong with the first node that was in trouble."""
        return self._bad[min(self._bad)][0] if self._bad else None

    def log_paths(self) -> list[Path]:
        """Output of every node's agent."""
        return list(self._logs)


class Over(NamedTuple):
    """How a trial ended, as another node than node 0 heard it."""

    outcome: str
    reason: str | None


def follow(
    trial: Trial, rendezvous: Rendezvous, stop: Stop, *, patience: float, finished: Callable[[], Over | None],
    program: Program = RANKS, keep: tuple[int, ...] = (),
) -> Over:  # fmt: skip
    """Be another node than node 0: run the agent when node 0 says so, until it says that the trial is over.

    `finished` looks for the trial's record, which is there when this node came too late. Raises MachineError if node 0 never comes, or
    is gone.
    """
    folder, node = meeting_folder(Path(trial.work)), rendezvous.node
    lead = Sight(folder / "node0.json")
    with Beacon(folder / f"node{node}.json", node=node, host=socket.gethostname(), phase="wait", number=0) as beacon:
        try:
            last: Try | None = None
            while not (over := _await_try(lead, last, stop, patience, finished)):
                last = Try.of(lead)
                _take_part(trial, rendezvous, lead, beacon, stop, program, keep)
                if stop.asked:
                    return Over("cancelled", f"the command of node {node} got {stop.asked}")
            return over
        finally:
            beacon.say(phase="left")


class Try(NamedTuple):
    """One try of one command of node 0, which may itself be repeated."""

    session: str
    number: int

    @classmethod
    def of(cls, lead: Sight) -> Try:
        """The one that node 0 speaks of."""
        return cls(str(lead.words.get("session")), int(lead.words.get("number", 0)))


def _await_try(lead: Sight, last: Try | None, stop: Stop, patience: float, finished: Callable[[], Over | None]) -> Over | None:
    """Wait until node 0 starts another try than `last` (None), or until the trial is over."""
    deadline = time.monotonic() + patience
    was_here = last is not None
    while True:
        lead.look()
        was_here = was_here or lead.alive
        words = lead.words
        if was_here and words.get("phase") == "over":
            return Over(str(words.get("outcome")), words.get("reason") or None)
        if lead.alive and words.get("phase") == "run" and Try.of(lead) != last:
            return None
        if not lead.alive and (over := finished()):
            return over
        if stop.wait(LOOK_SECONDS):
            return Over("cancelled", f"this node's command got {stop.asked}")
        if lead.alive:
            deadline = time.monotonic() + patience
        elif time.monotonic() > deadline:
            seen = "its command is gone" if was_here else "no command with --node-rank 0 for this trial in this folder"
            raise MachineError(f"node 0 did not come: waited {patience:g} s; seen: {seen}; all nodes must share the folder of the results")


def _take_part(
    trial: Trial, rendezvous: Rendezvous, lead: Sight, beacon: Beacon, stop: Stop, program: Program, keep: tuple[int, ...]
) -> None:
    """One try: run the agent until it ends by itself or node 0 wants it ended; returns when nothing of it runs."""
    this = Try.of(lead)
    beacon.say(phase="run", number=this.number, problem=None)
    try:
        with _devices(trial, stop) as devices:
            file = Path(trial.work) / "trial.json"
            agent = start_agent(
                trial, file, rendezvous.meeting, devices=devices, program=program.name, search_path=program.search_path, keep=keep
            )
            try:
                _keep_company(agent, this, lead, beacon, stop)
            finally:
                agent.end()
    except (BusyError, LackingError, MachineError, OSError) as error:
        beacon.say(phase="ended", problem=str(error)[:600])
        while _is_on(lead, this) and not stop.wait(LOOK_SECONDS):
            continue
    beacon.say(phase="wait")


@contextmanager
def _devices(trial: Trial, stop: Stop) -> Iterator[list[str]]:
    cell = trial.parsed_cell
    if cell.settings.device == "cpu":
        yield []
        return
    with hold_devices(cell.processes_per_node, stopped=stop.wait) as devices:
        yield [device.uuid for device in devices]


def _keep_company(agent: Guarded, this: Try, lead: Sight, beacon: Beacon, stop: Stop) -> None:
    """Wait until node 0 ends the try, is gone, or somebody ends this command; tell how the agent ended, if it did by itself."""
    told = False
    while _is_on(lead, this) and not stop.asked:
        ended = agent.wait(LOOK_SECONDS)
        if ended is None:
            continue
        if not told:
            bad: dict[str, Any] = {} if ended.code == 0 else {"problem": _how(ended.code)}
            beacon.say(phase="ended", **bad)
            told = True
        stop.wait(LOOK_SECONDS)


def _how(code: int | None) -> str:
    return f"its agent {'was killed together with its guard' if code is None else f'ended with {signal_name(code)}'}"


def _is_on(lead: Sight, this: Try) -> bool:
    """Whether node 0 lives and this try is to go on."""
    lead.look()
    return lead.alive and lead.words.get("phase") == "run" and Try.of(lead) == this
