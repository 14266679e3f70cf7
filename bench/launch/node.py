"""One node's side of a trial on several hosts: its torchrun agent, in its container, under guard. Torch-free.

`python -m bench.launch.node TRIAL.json --port PORT` is what srun starts once on each node: which node it is and where the first one
is are the step's to say; the process waits for its agent and ends it, with all below it, when the step is ended.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from bench.launch.command import PORT, PROGRAM, agent_line, agent_log, contained, rank_command, start_guarded, visible_devices
from bench.launch.environment import host_threads, rank_environment
from bench.launch.guard import Guarded
from bench.measure.build_locks import break_stale_locks
from bench.trial import Trial, load_trial

WAIT_SECONDS = 0.5

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
"""gloo and tensorpipe take the address that the host's own name stands for, which is often a loopback one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Which node this is, and where the agents meet."""

    node: int
    address: str
    """Of node 0, as all nodes reach it."""
    port: int = PORT


def start_agent(
    trial: Trial, trial_file: Path, meeting: Meeting, *, devices: Sequence[str] = (), program: str = PROGRAM,
    search_path: tuple[str, ...] = (), keep: tuple[int, ...] = (),
) -> Guarded:  # fmt: skip
    """Start this node's agent on `devices` (UUIDs; none: all that are visible). Raises OSError where that is impossible."""
    if trial.parsed_cell.settings.device == "cuda":
        break_stale_locks()
    line = node_line(trial, trial_file, meeting, program)
    environment = agent_environment(meeting.address, devices, search_path, threads=host_threads(trial))
    entered = contained(line, trial, environment, node=meeting.node)
    return start_guarded(entered, agent_log(trial, meeting.node), keep)


def node_line(trial: Trial, trial_file: Path, meeting: Meeting, program: str = PROGRAM) -> list[str]:
    """The agent's line of one node."""
    ranks = rank_command(trial_file, program)
    return agent_line(trial.parsed_cell, meeting.node, ranks, address=meeting.address, port=meeting.port)


def agent_environment(address: str, devices: Sequence[str], search_path: tuple[str, ...], *, threads: int = 1) -> dict[str, str]:
    """The environment of ranks whose first node is at `address`; interfaces that the user chose stay."""
    interface = interface_towards(address)
    found = {name: interface for name in INTERFACE_VARIABLES if interface and name not in os.environ}
    return rank_environment({**found, **visible_devices(devices)}, search_path, threads=threads)


def interface_towards(address: str) -> str | None:
    """The network interface from which this host reaches `address` (its own one, where the address is its own); None if unknown.

    >>> interface_towards("127.0.0.1")
    'lo'
    """
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # a datagram socket sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if any(item.address.split("%")[0] == own for item in addresses)), None)


def main(arguments: list[str] | None = None) -> int:
    """Run the agent of the node that this step's task stands on, to its end."""
    parser = argparse.ArgumentParser(prog="bench.launch.node")
    parser.add_argument("trial", type=Path)
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--program", default=PROGRAM)
    parser.add_argument("--search-path", type=json.loads, default=[])
    options = parser.parse_args(arguments)
    trial = load_trial(options.trial)
    meeting = Meeting(node=int(os.environ["SLURM_PROCID"]), address=first_host(os.environ["SLURM_STEP_NODELIST"]), port=options.port)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _stop)
    agent = start_agent(trial, options.trial, meeting, program=options.program, search_path=tuple(options.search_path))
    try:
        while (ended := agent.wait(WAIT_SECONDS)) is None:
            pass
    except KeyboardInterrupt:
        agent.end()
        return 128 + signal.SIGTERM
    code = 1 if ended.code is None else ended.code
    return code if code >= 0 else 128 - code


def first_host(nodes: str) -> str:
    """The first host of a Slurm list such as `n[1-3]`, which is where task 0 of a step runs."""
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return done.stdout.split()[0]


def _stop(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    sys.exit(main())
