"""The line that runs a command in an image by podman or docker, with a lifeline and as little of the host as it needs. Torch-free.

Neither engine's container is a child of the one who asks for it (docker's hang below a daemon), so three things see to it that none
outlives its trial. Inside, all of it runs under a guard of its own (`bench.launch.guard`), whose standard input is the engine's client's:
whatever ends the client, by SIGKILL too, closes that lifeline, and the guard ends the tree. Outside, `bench.launch.attend` holds the
lifeline, waits until the engine has removed the container, and has it removed by force if need be. And process ids are the host's, so
that the supervisor sees and ends ranks as it does without an image.
"""

from __future__ import annotations

import csv
import io
import os
import resource
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.container.runtimes import Runtime
from bench.container.tools import user_name

MOST_PROCESSES = 32768
"""Upper limit that podman sets; its own default is one that not every machine can set."""

CLIENT_VARIABLES = ("HOME", "PATH", "TMPDIR", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "DBUS_SESSION_BUS_ADDRESS")
CLIENT_PREFIXES = ("DOCKER_", "CONTAINER_", "CONTAINERS_", "PODMAN_")
"""Where the engine's client finds its configuration and its daemon; they do not go inside."""


class Seat(NamedTuple):
    """Which of the containers of one job on this machine: one alone has no network, several share one loopback."""

    job: str
    """A name of the job that nobody else has."""
    number: int = 0
    of: int = 1

    @staticmethod
    def alone() -> Seat:
        """Of a job with one container."""
        return Seat(uuid.uuid4().hex[:12])

    @property
    def name(self) -> str:
        """The container's name."""
        return f"coati-bench-{self.job}-{self.number}"

    @property
    def first(self) -> str | None:
        """Name of the container whose network this one joins; None for that one itself."""
        return self._replace(number=0).name if self.number else None


def engine_line(
    runtime: Runtime, image: str, inside: Sequence[str], *, python: str, mounts: Iterable[tuple[Path, Path, bool]], home: Path,
    variables: Mapping[str, str], seat: Seat | None, gpu: bool, note: Path | None,
) -> list[str]:  # fmt: skip
    """`inside` (arguments of the image's `python`) in the image with id `image`, attended from outside and guarded inside.

    `mounts`: (path of the host, path inside, writable). `variables` are those inside; of most only the name is on the line, their values
    come with the client's environment (`client_environment`). `seat`: None takes the host's network, for ranks on several hosts.
    `note`: where the guard inside notes its process id.
    """
    name = (seat or Seat.alone()).name
    after = ["--after", seat.first] if seat and seat.first else []
    attend = [sys.executable, "-m", "bench.launch.attend", "--name", name, *after, "--"]
    guard = ["-m", "bench.launch.guard", *(["--note", str(note)] if note else []), "--", python, *inside]
    options = [
        "--interactive", "--rm", "--name", name, "--pull", "never", "--log-driver", "none", "--pid", "host", "--uts", "host",
        "--network", _network(seat), "--read-only", "--tmpfs", "/tmp:rw,exec,mode=1777",  # noqa: S108 (of the container)
        "--cap-drop", "all", "--security-opt", "no-new-privileges", "--security-opt", "label=disable",
        "--shm-size", str(_shared_memory()), "--workdir", str(home), *_identity(runtime), *_limits(runtime), *_devices(runtime, gpu=gpu),
    ]  # fmt: skip
    binds = [word for source, target, writable in mounts for word in ("--mount", _mount(source, target, writable=writable))]
    given = [word for key, value in _inside(variables, home).items() for word in ("--env", _handed(key, value))]
    return [*attend, runtime.program, "run", *options, *binds, *given, "--entrypoint", python, image, *guard]


def client_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of `engine_line`: of this process what the client needs, and `variables` for those that go in by name."""
    own = {key: value for key, value in os.environ.items() if key in CLIENT_VARIABLES or key.startswith(CLIENT_PREFIXES)}
    return {**variables, **own}


def _inside(variables: Mapping[str, str], home: Path) -> dict[str, str | None]:
    """Variables inside; None for those whose value is the client's own, too."""
    user = user_name()
    fixed = {"HOME": str(home), "USER": user, "LOGNAME": user, "PYTHONPATH": variables["PYTHONPATH"]}
    return {**dict.fromkeys(sorted(variables.keys() - {*CLIENT_VARIABLES, *fixed})), **fixed}


def _handed(key: str, value: str | None) -> str:
    return key if value is None else f"{key}={value}"


def _network(seat: Seat | None) -> str:
    if seat is None:
        return "host"
    return f"container:{seat.first}" if seat.first else "none"


def _identity(runtime: Runtime) -> list[str]:
    """The caller's user and groups; podman of an ordinary user maps ids so that they are the same inside."""
    ids = f"{os.getuid()}:{os.getgid()}"
    if runtime.kind == "podman" and os.geteuid() != 0:
        return ["--userns", "keep-id", "--user", ids]
    groups = [word for group in sorted(set(os.getgroups()) - {os.getgid()}) for word in ("--group-add", str(group))]
    return ["--userns", "host", "--user", ids, *groups]


def _limits(runtime: Runtime) -> list[str]:
    """Podman's default limits are refused where root lacks a capability; docker's daemon knows its own."""
    if runtime.kind != "podman":
        return []
    files = ":".join(str(MOST_PROCESSES if it < 0 else it) for it in resource.getrlimit(resource.RLIMIT_NOFILE))
    processes = ":".join(str(MOST_PROCESSES if it < 0 else min(it, MOST_PROCESSES)) for it in resource.getrlimit(resource.RLIMIT_NPROC))
    return ["--ulimit", f"nofile={files}", "--ulimit", f"nproc={processes}"]


def _devices(runtime: Runtime, *, gpu: bool) -> list[str]:
    """All GPUs; CUDA_VISIBLE_DEVICES chooses among them. podman by CDI, docker by NVIDIA's toolkit (it reads the variable)."""
    if not gpu:
        return []
    devices = ["--device", "nvidia.com/gpu=all"] if runtime.kind == "podman" else ["--gpus", "all"]
    return [*devices, "--env", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"]


def _shared_memory() -> int:
    """Size of /dev/shm here: what is not used is not taken."""
    found = os.statvfs("/dev/shm")  # noqa: S108 (its size)
    return found.f_blocks * found.f_frsize or 1 << 30


def _mount(source: Path, target: Path, *, writable: bool) -> str:
    """One bind mount in the engines' CSV, in which a path may hold anything."""
    text = io.StringIO()
    fields = ["type=bind", f"source={source}", f"target={target}", *([] if writable else ["readonly"])]
    csv.writer(text, lineterminator="").writerow(fields)
    return text.getvalue()
