"""The guard: a small process between the supervisor and what it starts, so that nothing of it outlives its trial.

It runs one command (a torchrun agent, an srun, the fork parent), inherits every orphan below it, and ends the whole tree
* when its standard input closes: the supervisor is gone, by SIGKILL too;
* when it is told to, or gets SIGTERM;
* when the command has ended, whatever the command left behind.

Last of all it writes how the command ended to its standard output, as JSON: {code, killed}. Torch-free, standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.launch.processes import MARKER, become_subreaper, descendants, die_with_parent, end_processes, marked, reap_children

GRACE_SECONDS = 2.0
"""Between SIGTERM and SIGKILL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a guarded command ended."""

    code: int | None
    """Exit code, negative for a signal; None if the guard itself was killed and nobody knows."""
    killed: int = 0
    """Processes that had to be killed."""


class Guarded:
    """The supervisor's handle of one guarded command.

    `keep` are descriptors that the guard holds until the tree is gone (locks); `hand_on` are given to the command.
    """

    def __init__(
        self, command: Sequence[str], *, environment: dict[str, str], log: Path,
        grace: float = GRACE_SECONDS, keep: tuple[int, ...] = (), hand_on: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self.command = tuple(command)
        self.marker = uuid.uuid4().hex
        self._grace = grace
        line = [sys.executable, "-m", "bench.launch.guard", "--grace", str(grace), "--hand-on", json.dumps(hand_on), "--", *command]
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, start_new_session=True, pass_fds=(*keep, *hand_on),
                env={**environment, MARKER: self.marker},
            )  # fmt: skip
        self._ended: Ended | None = None

    @property
    def pid(self) -> int:
        """The guard's own process."""
        return self._process.pid

    def wait(self, seconds: float) -> Ended | None:
        """How it ended, as soon as it has, or None after `seconds`."""
        assert self._process.stdout is not None
        if self._ended is None and select.select([self._process.stdout], [], [], seconds)[0]:
            self._collect()
        return self._ended

    def ask_to_end(self) -> None:
        """Have the tree ended, without waiting for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def end(self) -> Ended:
        """End the tree now and return how."""
        self.ask_to_end()
        if self.wait(self._grace + 15) is None:
            self._process.kill()
        while self._ended is None:
            self._collect()
        return self._ended

    def _collect(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        text = self._process.stdout.read()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        if text:
            self._ended = Ended(**json.loads(text))
        else:
            self._ended = Ended(code=None, killed=len(end_processes(partial(marked, self.marker), self._grace)))


def main(arguments: list[str]) -> int:
    """Run a command under guard until the end of its tree."""
    parser = argparse.ArgumentParser(prog="bench.launch.guard")
    parser.add_argument("--grace", type=float, default=GRACE_SECONDS)
    parser.add_argument("--hand-on", type=json.loads, default=[])
    parser.add_argument("--note", type=Path, help="where to write this process's id")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    become_subreaper()
    if options.note:
        options.note.write_text(str(os.getpid()), encoding="ascii")
    wake = _wakeup()
    child = subprocess.Popen(
        options.command, stdin=subprocess.DEVNULL, stdout=sys.stderr, pass_fds=options.hand_on,
        preexec_fn=partial(_prepare_child, os.getpid()),  # noqa: PLW1509 (the guard has one thread)
    )  # fmt: skip
    for descriptor in options.hand_on:
        os.close(descriptor)
    child.returncode = _watch(child.pid, wake)
    killed = end_processes(partial(descendants, [os.getpid()]), options.grace)
    late = reap_children().get(child.pid)
    code = late if child.returncode is None else child.returncode
    with suppress(BrokenPipeError):
        print(json.dumps({"code": code, "killed": len(killed)}), flush=True)
    return 0


def _prepare_child(guard: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent(guard, signal.SIGTERM)


def _wakeup() -> int:
    """A descriptor that becomes readable at SIGCHLD and SIGTERM."""
    read_end, write_end = os.pipe()
    for end in (read_end, write_end):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(write_end)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return read_end


def _watch(command: int, wake: int) -> int | None:
    """The command's exit code when it has ended, or None when it is to be ended."""
    while True:
        ready = select.select([0, wake], [], [])[0]
        told = wake in ready and signal.SIGTERM in os.read(wake, 4096)
        if (code := reap_children().get(command)) is not None:
            return code
        if told or 0 in ready:
            return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
