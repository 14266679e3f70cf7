"""The supervisor's handle of a fork parent (`bench.launch.fork`), and the launcher that uses it. Torch-free."""

from __future__ import annotations

import json
import os
import select
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from bench.cell import Cell
from bench.container.engine_line import Seat
from bench.container.overlay import overlaid
from bench.container.runtime import Container, Entered, container_of, home_inside
from bench.launch.command import LOOPBACK, PROGRAM, start_guarded
from bench.launch.environment import rank_environment
from bench.launch.guard import GRACE_SECONDS, Ended
from bench.launch.job import LaunchError, free_port
from bench.launch.processes import descendants, signal_name
from bench.trial import Trial

PRELOAD = (
    "torch", "torch.distributed", "torch.nn.parallel", "transformers", "transformers.models.bloom.modeling_bloom",
    "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama", "transformers.models.opt.modeling_opt", "peft",
    "colossalai", "colossalai.booster", "colossalai.booster.plugin", "bench.models.build", "bench.data.collate",
)  # fmt: skip
"""Imported once, before any rank exists; what cannot be imported is left to the rank that needs it."""

ALONE = {"GLOO_SOCKET_IFNAME": "lo", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""Ranks of one machine; and no thread that old torch (seen: 2.5.1) starts for compilers on import, with which nothing can be forked."""

READY_SECONDS = 300.0
"""Longest wait for the imports."""

LOOK_SECONDS = 0.5
"""How often it is asked whether a container has ended before it began to answer."""


class ForkParent:
    """Launcher for the CPU: starts its parent process at the first trial, and again if it was killed. A context manager."""

    name = "fork"

    def __init__(
        self, log: Path, *, program: str = PROGRAM, preload: Sequence[str] = PRELOAD, search_path: tuple[str, ...] = (),
        choose_port: Callable[[], int] = free_port, keep: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self._log, self._program, self._search_path = log, program, search_path
        self._preload = (*preload, program)
        self._choose_port, self._keep = choose_port, keep
        self._process: _ParentProcess | None = None
        self._container: Container | None = None
        self._overlay: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The parent process, if one runs."""
        return self._process.pid if self._process else None

    def close(self) -> None:
        """End the parent process and all of its ranks."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def simulated_nodes(self, trial: Trial) -> bool:
        """True for every cell of several nodes."""
        return trial.parsed_cell.nodes > 1

    def devices_here(self, trial: Trial) -> int:  # noqa: ARG002 (as the protocol has it)
        """None; it is for the CPU."""
        return 0

    def command(self, trial: Trial, trial_file: Path) -> list[str]:
        """The parent's line; its ranks are forked from it."""
        return [f"{sys.executable} -m bench.launch.fork --program {self._program}  # {trial_file}, {trial.parsed_cell.world_size} ranks"]

    def start(self, trial: Trial, trial_file: Path, devices: Sequence[str]) -> ForkJob:
        """Fork the ranks of `trial`. Raises LaunchError if the parent process cannot do so."""
        assert not devices, "fork is for the CPU"
        process = self._running(trial)
        process.ask(trial=str(trial_file), ranks=rank_variables(trial.parsed_cell, self._choose_port()), grace=GRACE_SECONDS)
        answer = process.answer(30)
        if not answer or "started" not in answer or answer.get("problem"):
            self.close()
            raise LaunchError((answer or {}).get("problem") or f"the fork parent did not start the ranks; see {self._log}")
        return ForkJob(process, self._log, self.close)

    def _running(self, trial: Trial) -> _ParentProcess:
        """The parent process, in the trial's image if it has one; one that sees less than this trial needs is replaced."""
        container, overlay = container_of(trial), trial.overlay.path if trial.overlay else None
        fits = self._container is None if container is None else self._container is not None and self._container.covers(container)
        fits = fits and self._overlay == overlay
        if self._process is not None and (not fits or self._process.guard.wait(0) is not None):
            self.close()
        if self._process is None:
            self._container, self._overlay = container, overlay
            self._log.parent.mkdir(parents=True, exist_ok=True)
            environment = overlaid(trial, rank_environment(ALONE, self._search_path))
            line = [sys.executable, "-m", "bench.launch.fork", "--program", self._program, "--preload", json.dumps(self._preload)]
            self._process = _ParentProcess(line, environment, self._log, self._keep, container)
            answer = self._process.answer(READY_SECONDS) or {}
            if not answer.get("ready"):
                self.close()
                raise LaunchError(f"the fork parent did not get ready; see {self._log}")
            self._process.pid = answer["pid"]
        return self._process


def rank_variables(cell: Cell, port: int) -> list[dict[str, str]]:
    """What torchrun would put into the environment of each rank, in rank order."""
    shared = {
        "WORLD_SIZE": str(cell.world_size), "LOCAL_WORLD_SIZE": str(cell.processes_per_node), "GROUP_WORLD_SIZE": str(cell.nodes),
        "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port),
    }  # fmt: skip
    ranks = [divmod(rank, cell.processes_per_node) for rank in range(cell.world_size)]
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(local), "GROUP_RANK": str(node)} for rank, (node, local) in enumerate(ranks)]


class _ParentProcess:
    """The guarded process and its two pipes."""

    def __init__(self, line: list[str], environment: dict[str, str], log: Path, keep: tuple[int, ...], container: Container | None) -> None:
        self._pipes: Path | None = None
        theirs: tuple[int, ...] = ()
        if container is not None and container.by_engine:
            self._requests, self._replies, names = self._named_pipes()
        else:
            requests, self._requests = os.pipe()
            self._replies, replies = os.pipe()
            theirs = (requests, replies)
            names = (str(requests), str(replies))
        line = [*line, "--requests", names[0], "--replies", names[1]]
        try:
            entered = Entered(line, environment) if container is None else container.enter(line, environment, seat=Seat.alone())
            self.guard = start_guarded(entered, log, keep, hand_on=theirs)
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        self._buffer = b""
        self.pid = -1

    def _named_pipes(self) -> tuple[int, int, tuple[str, str]]:
        """Two descriptors of ours and the names of their other ends, which are seen inside a container."""
        self._pipes = Path(tempfile.mkdtemp(prefix="pipes-", dir=home_inside()))
        names = [self._pipes / name for name in ("requests", "replies")]
        for name in names:
            os.mkfifo(name)
        requests = os.open(names[0], os.O_RDWR | os.O_CLOEXEC)  # also for reading: else it waits for a reader
        replies = os.open(names[1], os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(replies, True)
        return requests, replies, (str(names[0]), str(names[1]))

    def ask(self, **content: Any) -> None:
        try:
            os.write(self._requests, (json.dumps(content) + "\n").encode())
        except BrokenPipeError:
            return  # the missing answer tells it

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """The next line; {} if none came in time; None if the process has gone."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._replies], [], [], min(left, LOOK_SECONDS) if self._pipes else left)[0]:
                if self._pipes and self.guard.wait(0) is not None:
                    return None  # nobody ever opened the named pipe, so nothing tells its end
                if time.monotonic() >= deadline:
                    return {}
                continue
            if not (data := os.read(self._replies, 65536)):
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def close(self) -> Ended:
        ended = self.guard.end()
        for descriptor in (self._requests, self._replies):
            os.close(descriptor)
        if self._pipes:
            shutil.rmtree(self._pipes, ignore_errors=True)
        return ended


class ForkJob:
    """The forked ranks of one try."""

    def __init__(self, process: _ParentProcess, log: Path, close_parent: Callable[[], None]) -> None:
        self._process, self._log, self._close_parent = process, log, close_parent
        self._ended = False
        self._trouble: str | None = None
        self._lost_at: float | None = None

    def wait(self, seconds: float) -> bool:
        """Whether all ranks have ended, or their parent has."""
        if not self._ended and (answer := self._process.answer(seconds)) != {}:
            self._ended = True
            if answer is None:
                self._lost()
        return self._ended

    def pids(self) -> list[int]:
        """The ranks and all below them; the fork parent is no part of the measured job."""
        return descendants([self._process.pid])

    def end(self) -> None:
        """End the ranks; the parent stays for the next trial unless it does not obey."""
        if not self._ended:
            self._process.ask(end=GRACE_SECONDS)
            if not self.wait(2 * GRACE_SECONDS + 15):
                self._close_parent()
                self._ended = True

    def trouble(self) -> str | None:
        """That the parent process itself has gone."""
        return self._trouble

    def first_sign(self) -> float | None:
        """When the parent process was seen to have gone."""
        return self._lost_at

    def log_paths(self) -> list[Path]:
        """Output of the parent process."""
        return [self._log]

    def _lost(self) -> None:
        self._lost_at = time.monotonic()
        ended = self._process.guard.wait(GRACE_SECONDS + 15)
        code = ended.code if ended else None
        self._trouble = f"the fork parent {'was killed' if code is None else f'ended with {signal_name(code)}'}"
        self._close_parent()
