"""The first thing that runs in a rank, and what it leaves behind: `process<k>.json` beside its log.

`python -m bench.launch.rank TRIAL.json PROGRAM` is what torchrun starts: a forked child becomes the rank and runs PROGRAM
(a module, `bench.worker`) with TRIAL.json as its argument; this process waits and notes the end, also one by SIGKILL. Torch-free.
"""

from __future__ import annotations

import faulthandler
import json
import os
import runpy
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from bench.launch.processes import die_with_parent

DUMP_SIGNAL = signal.SIGUSR1
"""Makes a rank write the stacks of its threads into its log."""


SUPERVISOR = "supervisor.txt"
"""In the work folder: the host that the supervisor is on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankProcess:
    """One rank as the process that started it saw it."""

    rank: int
    pid: int
    hostname: str
    code: int | None = None
    """Exit code, negative for a signal; None while it runs."""
    ended: float | None = None
    """When, in seconds since the epoch."""


def process_path(work: Path, rank: int) -> Path:
    """Where the process of a rank is noted."""
    return work / f"process{rank}.json"


def note_process(process: RankProcess, work: Path) -> None:
    """Write or replace the note; a full disk is no reason to end a rank, so an OSError is told to the log only."""
    path = process_path(work, process.rank)
    try:
        path.with_suffix(".new").write_text(json.dumps(asdict(process)), encoding="utf-8")
        path.with_suffix(".new").replace(path)
    except OSError as error:
        with suppress(OSError):
            print(f"{path}: cannot be written: {error.strerror}", file=sys.stderr, flush=True)


def read_process(work: Path, rank: int) -> RankProcess | None:
    """The note of a rank, or None where there is none to read."""
    try:
        return RankProcess(**json.loads(process_path(work, rank).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def become_rank(log: Path, parent: int) -> None:
    """Make this process a rank: own process group, output into its log, dead with its parent, stacks at `DUMP_SIGNAL`."""
    os.setpgid(0, 0)
    die_with_parent(parent)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    target = _open_log(log)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    faulthandler.register(DUMP_SIGNAL, file=2, all_threads=True)
    faulthandler.enable(file=2)


def _open_log(log: Path) -> int:
    try:
        return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


def main(arguments: list[str]) -> None:
    """Become a rank and run the program, or wait for the rank and end as it ended."""
    trial, program = arguments
    work, rank = Path(trial).parent, int(os.environ["RANK"])
    waiter = os.getpid()
    pid = os.fork()
    if pid == 0:
        become_rank(work / f"rank{rank}.log", waiter)
        sys.argv = [program, trial]
        run_and_leave(program)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: os.kill(pid, received))
    process = RankProcess(rank=rank, pid=pid, hostname=socket.gethostname())
    note_process(process, work)
    code = _wait_on_node(pid, Path(trial), int(os.environ["GROUP_RANK"])) if os.environ["LOCAL_RANK"] == "0" else _wait(pid)
    note_process(RankProcess(rank=rank, pid=pid, hostname=process.hostname, code=code, ended=time.time()), work)
    sys.exit(code if code >= 0 else 128 - code)


def run_and_leave(program: str) -> NoReturn:
    """Run a module as this process's program and leave at once with its exit code.

    Whatever a rank has to say is in its part by then. To take the interpreter and all frameworks down in order costs a second more.
    """
    try:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        code: object = 0
    except SystemExit as end:
        code = end.code or 0
    if not isinstance(code, int):  # a message, as Python prints it
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _wait(pid: int) -> int:
    """Exit code of the rank, at its end."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _wait_on_node(pid: int, trial_file: Path, node: int) -> int:
    """As `_wait`; meanwhile note what the node is, and read its devices and host if the supervisor is on another one."""
    work = trial_file.parent
    if _is_supervised_here(work):
        note_node(work, node)
        return _wait(pid)
    from bench.launch.readings import reading_node

    with reading_node(trial_file, node):
        note_node(work, node)
        return _wait(pid)


def name_supervisor(work: Path) -> None:
    """Say that the supervisor is on this host."""
    (work / SUPERVISOR).write_text(socket.gethostname(), encoding="utf-8")


def _is_supervised_here(work: Path) -> bool:
    """Also where nobody said so: a trial that is run by hand, without a supervisor."""
    try:
        return (work / SUPERVISOR).read_text(encoding="utf-8") == socket.gethostname()
    except OSError:
        return True


def node_path(work: Path, node: int) -> Path:
    """Where a node notes what it is: {machine, versions, environment}, as seen inside its container."""
    return work / f"node{node}.json"


def note_node(work: Path, node: int) -> None:
    """Note what a node is, from inside the image that ranks run in, if any."""
    from bench.measure.provenance import environment, machine, versions

    note = {"machine": machine(), "versions": versions(), "environment": environment(dict(os.environ))}
    with suppress(OSError):
        node_path(work, node).write_text(json.dumps(note), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
