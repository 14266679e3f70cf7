"""A stand-in for docker: a daemon in the test's process whose containers are no children of the client, and the client's program."""

from __future__ import annotations

import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

CLIENT = """#!{python}
import json, os, signal, socket, sys, threading

def relay():
    while data := os.read(0, 65536):
        os.write(ours, data)
    os.close(ours)

daemon = socket.socket(socket.AF_UNIX)
daemon.connect({socket!r})
theirs, ours = os.pipe()
said = json.dumps({{"words": sys.argv[1:], "environment": dict(os.environ)}}).encode() + b"\\n"
socket.send_fds(daemon, [said], [theirs, 1, 2])
os.close(theirs)
signal.signal(signal.SIGTERM, lambda *_: daemon.sendall(b"TERM\\n"))
threading.Thread(target=relay, daemon=True).start()
sys.stdout.flush()
os._exit(json.loads(daemon.makefile().readline())["code"])
"""
WITHOUT_VALUE = {"--interactive", "--rm", "--read-only"}
IMAGE = f"sha256:{'c' * 64}"


class Engine(socketserver.ThreadingUnixStreamServer):
    """The daemon; a context manager. `running`: container's name -> its process; `lines`: what clients asked for."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.lines: list[list[str]] = []
        super().__init__(str(folder / "engine.sock"), Handler)
        self.program = folder / "bin" / "docker"
        self.program.parent.mkdir()
        self.program.write_text(CLIENT.format(python=sys.executable, socket=str(folder / "engine.sock")))
        self.program.chmod(0o755)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def start(self, words: list[str], environment: dict[str, str], files: list[int]) -> tuple[str, subprocess.Popen[bytes]]:
        """Run `docker run` as asked, its image's Python being this one."""
        options, rest = _split(words)
        given = (value.partition("=") for key, value in options if key == "--env")
        inside = {key: value if equals else environment.get(key, "") for key, equals, value in given}
        (name,) = (value for key, value in options if key == "--name")
        line = [sys.executable, *(sys.executable if word == "/opt/venv/bin/python" else word for word in rest[1:])]
        process = subprocess.Popen(line, stdin=files[0], stdout=files[1], stderr=files[2], env=inside, start_new_session=True)
        self.running[name] = process
        return name, process


class Handler(socketserver.BaseRequestHandler):
    server: Engine

    def handle(self) -> None:
        said, files, _, _ = socket.recv_fds(self.request, 1 << 20, 3)
        asked: dict[str, Any] = json.loads(said)
        self.server.lines.append(asked["words"])
        verb, words = asked["words"][0], asked["words"][1:]
        try:
            code = getattr(self, f"do_{verb}")(words, asked["environment"], files)
        except OSError as error:
            os.write(files[-1], f"{error}\n".encode())
            code = 125
        for file in files:
            os.close(file)
        self.request.sendall(json.dumps({"code": code}).encode() + b"\n")

    def do_run(self, words: list[str], environment: dict[str, str], files: list[int]) -> int:
        name, process = self.server.start(words, environment, files)
        os.close(files[0])
        files.pop(0)
        threading.Thread(target=self._hear, args=(process,), daemon=True).start()
        code = process.wait()
        self.server.running.pop(name, None)
        return code if code >= 0 else 128 - code

    def _hear(self, process: subprocess.Popen[bytes]) -> None:
        """Hand on the client's signal."""
        try:
            heard = self.request.recv(64)
        except OSError:
            return
        if b"TERM" in heard:
            process.send_signal(signal.SIGTERM)

    def do_ps(self, words: list[str], _: dict[str, str], files: list[int]) -> int:
        name = words[-1].removeprefix("name=^").removesuffix("$")
        os.write(files[1], f"{name}\n".encode() if name in self.server.running else b"")
        return 0

    def do_rm(self, words: list[str], *_: object) -> int:
        if process := self.server.running.get(words[-1]):
            process.kill()
        return 0

    def do_inspect(self, words: list[str], _: dict[str, str], files: list[int]) -> int:
        os.write(files[1], b"true\n" if words[-1] in self.server.running else b"")
        return 0

    def do_image(self, words: list[str], _: dict[str, str], files: list[int]) -> int:
        os.write(files[1], f"{words[-1]}\n".encode())
        return 0


def _split(words: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Options with their values, and the image with what it runs."""
    options, rest = [], list(words)
    while rest[0].startswith("--"):
        key = rest.pop(0)
        options.append((key, "" if key in WITHOUT_VALUE else rest.pop(0)))
    return options, rest
