"""The fork parent: a process that imports the frameworks once and forks one fresh process a rank and trial (CPU only).

`python -m bench.launch.fork --requests FD --replies FD --program bench.worker --preload JSON` (a path of a named pipe may stand for a
descriptor, where none can be handed on: in podman's and docker's containers) reads one request a line,
{trial, ranks: [{RANK: ..., LOCAL_RANK: ...}, ...], grace}, and answers {ready, pid}, {started: [pid]}, {ended: [code]}.
The line {end: grace} ends a trial early. Every rank runs `run_rank(trial)` of the program and leaves by `os._exit`.

This process never touches a process group or a tensor and has one thread, so that a fork is safe; strategies patch the
frameworks after the fork, in their own rank. It imports torch by name only, when it runs.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import random
import select
import signal
import socket
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from bench.launch.processes import become_subreaper, descendants, end_processes, reap_children, send
from bench.launch.rank import RankProcess, become_rank, note_node, note_process


class Server:
    """The loop of the fork parent."""

    def __init__(self, requests: int, replies: int, program: str) -> None:
        self._requests, self._replies, self._program = requests, replies, program
        self._buffer = b""
        self._wake, self._wake_write = _wakeup()

    def serve(self) -> None:
        """Run trials until the request pipe closes."""
        while (request := self._next()) is not None:
            if "trial" in request:
                self._run(request)

    def say(self, **content: Any) -> None:
        """Answer the supervisor."""
        os.write(self._replies, (json.dumps(content) + "\n").encode())

    def _next(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next request; {} when `timeout` passed or a child ended; None when the pipe closed."""
        while b"\n" not in self._buffer:
            ready = select.select([self._requests, self._wake], [], [], timeout)[0]
            if self._wake in ready:
                os.read(self._wake, 4096)
            if self._requests not in ready:
                return {}
            data = os.read(self._requests, 65536)
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _run(self, request: dict[str, Any]) -> None:
        threads = sum(1 for _ in Path("/proc/self/task").iterdir())
        if threads != 1:
            self.say(started=[], problem=f"the fork parent has {threads} threads; it must have one to fork safely")
            self.say(ended=[])
            return
        work = Path(request["trial"]).parent
        for node in sorted({int(variables["GROUP_RANK"]) for variables in request["ranks"]}):
            note_node(work, node)
        pids = [self._fork(request["trial"], variables) for variables in request["ranks"]]
        for rank, pid in enumerate(pids):
            note_process(RankProcess(rank=rank, pid=pid, hostname=socket.gethostname()), work)
        self.say(started=pids)
        codes = self._wait(pids, work, request["grace"])
        end_processes(partial(descendants, [os.getpid()]), request["grace"])
        reap_children()
        self.say(ended=codes)

    def _fork(self, trial: str, variables: dict[str, str]) -> int:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become(trial, variables, parent)
        return pid

    def _become(self, trial: str, variables: dict[str, str], parent: int) -> None:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            for descriptor in (self._requests, self._replies, self._wake, self._wake_write):
                os.close(descriptor)
            become_rank(Path(trial).parent / f"rank{variables['RANK']}.log", parent)
            os.environ.update(variables)
            random.seed()
            code = run_program(self._program, trial)
        except SystemExit as request:
            code = request.code if isinstance(request.code, int) else 1
        except BaseException:  # noqa: BLE001 (a rank ends here, whatever it raised)
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except OSError:
                    continue
            os._exit(code)

    def _wait(self, pids: list[int], work: Path, grace: float) -> list[int]:
        """Exit codes of all ranks. At an {end} request, or when the supervisor has gone, they get SIGTERM, `grace` seconds, SIGKILL."""
        codes: dict[int, int] = {}
        kill_at = None
        while self._collect(pids, work, codes) < len(pids):
            request = self._next(None if kill_at is None else max(0.0, kill_at - time.monotonic()))
            left = [pid for pid in pids if pid not in codes]
            if kill_at is None and (request is None or "end" in request):
                grace = grace if request is None else request["end"]
                send(left, signal.SIGTERM)
                kill_at = time.monotonic() + grace
            elif kill_at is not None and time.monotonic() >= kill_at:
                send(left, signal.SIGKILL)
                kill_at = time.monotonic() + 1
        return [codes[pid] for pid in pids]

    def _collect(self, pids: list[int], work: Path, codes: dict[int, int]) -> int:
        """Note the ranks that have ended; how many that makes."""
        for pid, code in reap_children().items():
            if pid in pids:
                codes[pid] = code
                note_process(RankProcess(rank=pids.index(pid), pid=pid, hostname=socket.gethostname(), code=code, ended=time.time()), work)
        return len(codes)


def run_program(program: str, trial: str) -> int:
    """Run one rank: `run_rank` of the module `program` on the trial in a file; its exit code."""
    from bench.trial import load_trial

    return int(importlib.import_module(program).run_rank(load_trial(Path(trial))))


def preload(names: list[str]) -> dict[str, str]:
    """Import modules; return those that cannot be imported, with the reason."""
    problems = {}
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 (a framework may raise anything at import; the rank that needs it fails and says so)
            problems[name] = f"{type(error).__name__}: {error}"
    return problems


def _descriptor(text: str, flags: int) -> int:
    return int(text) if text.isdigit() else os.open(text, flags | os.O_CLOEXEC)


def _wakeup() -> tuple[int, int]:
    read_end, write_end = os.pipe()
    for end in (read_end, write_end):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(write_end)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return read_end, write_end


def main(arguments: list[str]) -> int:
    """Import the frameworks, then fork ranks on request."""
    parser = argparse.ArgumentParser(prog="bench.launch.fork")
    parser.add_argument("--requests", required=True)
    parser.add_argument("--replies", required=True)
    parser.add_argument("--program", required=True)
    parser.add_argument("--preload", type=json.loads, required=True)
    options = parser.parse_args(arguments)
    become_subreaper()
    problems = preload(options.preload)
    gc.collect()
    gc.freeze()
    server = Server(_descriptor(options.requests, os.O_RDONLY), _descriptor(options.replies, os.O_WRONLY), options.program)
    server.say(ready=True, pid=os.getpid(), problems=problems)
    server.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
