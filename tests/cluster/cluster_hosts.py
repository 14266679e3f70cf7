"""Hosts on one machine: network namespaces joined by a bridge, each with its own address, name and /etc/hosts. Needs root.

All names begin with `cbn-`; nothing is added to the machine's own network.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

ON_HOST = str(Path(__file__).with_name("on_host.sh"))
BRIDGE_HOST = "cbn-ctl"
NET = "10.77.41"
ETC = Path("/etc/netns")
"""Where on_host.sh looks for what a host sees in its /etc."""


def host_name(number: int) -> str:
    """Compute host `number`, from 1."""
    return f"cbn-n{number}"


class NoClusterError(Exception):
    """This machine cannot simulate a cluster, and why. No code of the product runs before a cluster is up, so it is never its fault."""


def check() -> None:
    """Raise NoClusterError where it is plain from the start that this machine cannot have such hosts."""
    if os.geteuid() != 0:
        raise NoClusterError("root is needed")
    if tools := [tool for tool in ("ip", "unshare", "nsenter", "mount") if shutil.which(tool) is None]:
        raise NoClusterError(f"not installed: {', '.join(tools)}")


class Hosts:
    """`count` compute hosts and one with the bridge, up while the context lasts. `etc` are files that every host sees in /etc."""

    def __init__(self, count: int, etc: dict[str, Path] | None = None) -> None:
        self.names = [host_name(number) for number in range(1, count + 1)]
        self._etc = etc or {}

    def __enter__(self) -> Self:
        """Raises NoClusterError, with nothing left behind."""
        self.__exit__()
        try:
            self._lay_out()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _lay_out(self) -> None:
        for name in (BRIDGE_HOST, *self.names):
            run_here("ip", "netns", "add", name)
            run_here("ip", "-n", name, "link", "set", "lo", "up")
            try:
                self._lay_out_etc(name)
            except OSError as error:
                raise NoClusterError(f"{error.filename}: {error.strerror}") from error
        run_here("ip", "-n", BRIDGE_HOST, "link", "add", "br0", "type", "bridge")
        run_here("ip", "-n", BRIDGE_HOST, "addr", "add", f"{NET}.1/24", "dev", "br0")
        run_here("ip", "-n", BRIDGE_HOST, "link", "set", "br0", "up")
        for number, name in enumerate(self.names, 1):
            run_here("ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{number}", "netns", BRIDGE_HOST)
            run_here("ip", "-n", BRIDGE_HOST, "link", "set", f"port{number}", "master", "br0", "up")
            run_here("ip", "-n", name, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            run_here("ip", "-n", name, "link", "set", "eth0", "up")
            self._check(name)

    def _check(self, name: str) -> None:
        """That a command runs there as on a host of its own."""
        try:
            done = self.run(name, "sh", "-c", "hostname; cat /etc/hosts")
        except subprocess.TimeoutExpired as error:
            raise NoClusterError(f"a command on a host does not end: {error}") from error
        if done.returncode or done.stdout.split()[0] != name or self.address(name) not in done.stdout:
            raise NoClusterError(f"no command can run on a host of its own: {(done.stderr or done.stdout).strip()[-300:]}")

    def __exit__(self, *_: object) -> None:
        for name in _known():
            end(self.pids(name))
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            shutil.rmtree(ETC / name, ignore_errors=True)

    def address(self, name: str) -> str:
        """The address of a host."""
        return f"{NET}.1" if name == BRIDGE_HOST else f"{NET}.{10 + 1 + self.names.index(name)}"

    def popen(self, name: str, *command: str, log: Path | None = None, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a command on a host; its output goes to `log`."""
        with open(log or os.devnull, "ab") as output:
            return subprocess.Popen(
                [ON_HOST, name, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, start_new_session=True
            )

    def run(self, name: str, *command: str, seconds: float = 60.0, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end."""
        return subprocess.run([ON_HOST, name, *command], capture_output=True, text=True, check=False, timeout=seconds, env=env)

    def cut(self, name: str) -> None:
        """Take the link of a host away."""
        run_here("ip", "-n", BRIDGE_HOST, "link", "set", f"port{self.names.index(name) + 1}", "down")

    def mend(self, name: str) -> None:
        """Give it back."""
        run_here("ip", "-n", BRIDGE_HOST, "link", "set", f"port{self.names.index(name) + 1}", "up")

    @staticmethod
    def pids(name: str) -> list[int]:
        """Every process in the host's network."""
        done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
        return [int(word) for word in done.stdout.split()]

    def with_text(self, *texts: str) -> list[int]:
        """Processes on compute hosts whose command line has one of `texts`."""
        return [pid for name in self.names for pid in self.pids_of(name, *texts)]

    def pids_of(self, name: str, *texts: str) -> list[int]:
        """Processes on one host whose command line has one of `texts`."""
        return [pid for pid in self.pids(name) if any(text in command_of(pid) for text in texts)]

    def _lay_out_etc(self, name: str) -> None:
        folder = ETC / name
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{self.address(host)} {host}" for host in (BRIDGE_HOST, *self.names))]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        for file, source in self._etc.items():
            shutil.copytree(source, folder / file) if source.is_dir() else shutil.copy(source, folder / file)


def end(pids: Iterable[int], *, patience: float = 3.0) -> None:
    """SIGTERM, `patience` seconds, SIGKILL."""
    pids = list(pids)
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 3.0)):
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + seconds
        while any(command_of(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)


def command_of(pid: int) -> str:
    """The command line of a process; empty for one that is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _known() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout.splitlines()
    return [line.split()[0] for line in listed if line.startswith(("cbn-n", BRIDGE_HOST))]


def run_here(*command: str) -> None:
    """Run a command on the machine itself. Raises NoClusterError with what it said if it fails."""
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    except subprocess.CalledProcessError as error:
        raise NoClusterError(f"`{' '.join(command)}` failed: {error.stderr.strip()[-300:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoClusterError(f"`{' '.join(command)}` failed: {error}") from error
