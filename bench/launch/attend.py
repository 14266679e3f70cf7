"""Attends one container of podman or docker, whose processes are not ours: starts it, holds its lifeline, sees it gone. Torch-free.

`python -m bench.launch.attend --name NAME [--after FIRST] -- ENGINE run --interactive --name NAME ...`, where a guard
(`bench.launch.guard`) runs inside. It ends as the guard says that the command inside ended. When it is told to end, or the client
ends, the container is gone before this process is; when it is killed itself, the lifeline (the client's standard input) closes, and
the guard inside ends all there is. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import FrameType

WAIT_SECONDS = 60.0
"""Longest wait for the container whose network this one joins."""
HEAR_SECONDS = 0.5
"""Longest until a signal is heard."""
END_SECONDS = 8.0
"""What the guard inside gets to end its tree, and the engine to remove the container, before that is done by force."""
ENGINE_SECONDS = 30.0
"""Longest answer of an engine."""
FAILED = 125
"""Exit code of both engines where they could not start a container."""


class Told(Exception):  # noqa: N818 (a request)
    """Somebody wants it to end."""


def main(arguments: list[str] | None = None) -> int:
    """Run the container to its end; the exit code of what ran inside."""
    parser = argparse.ArgumentParser(prog="bench.launch.attend")
    parser.add_argument("--name", required=True)
    parser.add_argument("--after", help="wait until this container runs")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    engine = options.command[0]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _tell)
    client = None
    try:
        if options.after and not wait_for(engine, options.after):
            print(f"{options.after}: the first node's container does not run; this one joins its network", file=sys.stderr)
            return FAILED
        client = subprocess.Popen(options.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return _attend(client)
    except Told:
        return 128 + signal.SIGTERM
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if client is not None:
            end(client)
        remove(engine, options.name)  # told while the client was being started, we do not know it, and it may have begun


def _tell(number: int, _: FrameType | None) -> None:
    raise Told(number)


def _attend(client: subprocess.Popen[bytes]) -> int:
    said = _read(client)
    code = client.wait()
    try:
        ended = json.loads(said.splitlines()[-1])["code"]
    except (IndexError, ValueError, KeyError, TypeError):
        return code  # the engine's own: it did not start, or the guard inside was killed
    code = 1 if ended is None else int(ended)
    return code if code >= 0 else 128 - code


def _read(client: subprocess.Popen[bytes]) -> bytes:
    """All that it prints. In slices: a signal that came just before a call that blocks is handled after it."""
    assert client.stdout is not None
    said = b""
    while True:
        if select.select([client.stdout], [], [], HEAR_SECONDS)[0]:
            if not (data := os.read(client.stdout.fileno(), 65536)):
                return said
            said += data


def wait_for(engine: str, name: str, seconds: float = WAIT_SECONDS) -> bool:
    """Whether the container comes to run within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if _ask(engine, "inspect", "--type", "container", "--format", "{{.State.Running}}", name).strip() == "true":
            return True
        time.sleep(0.1)
    return False


def end(client: subprocess.Popen[bytes]) -> None:
    """Close the lifeline and let the client see the end of its container."""
    assert client.stdin is not None
    with suppress(BrokenPipeError):
        client.stdin.close()
    try:
        client.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        client.kill()
        client.wait()


def remove(engine: str, name: str) -> None:
    """See the container gone: mostly it is, since the engine removes what has ended."""
    deadline = time.monotonic() + ENGINE_SECONDS
    while _ask(engine, "ps", "--all", "--quiet", "--filter", f"name=^{name}$").strip() and time.monotonic() < deadline:
        _ask(engine, "rm", "--force", name)


def _ask(engine: str, *words: str) -> str:
    """What the engine prints; nothing where it fails."""
    try:
        done = subprocess.run(
            [engine, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=ENGINE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())
