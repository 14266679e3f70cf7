"""Which ways to an image, and of running trials in one, this machine allows, and what the others lack. Torch-free."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from bench.container.runtimes import PROGRAMS, Kind, insisted, present
from bench.container.tools import PACKAGES, user_name
from bench.errors import MachineError

ANSWER_SECONDS = 20.0
"""Longest answer of a runtime, its daemon included."""
BUILD_PROGRAMS = ("mmdebstrap", "buildah", "mksquashfs", "unsquashfs", "tar")
APPTAINER_LEAST = (1, 2)


class Way(NamedTuple):
    """One way, and what it lacks here."""

    name: str
    needs: list[str]
    """Empty where it can be gone."""
    note: str | None = None
    """What one should know who goes it."""


def ways() -> list[Way]:
    """All ways on this machine; images first, then what runs them, then those without an image."""
    runtimes: dict[Kind, str | None] = {kind: problem_of(kind) for kind in PROGRAMS}
    running = None in runtimes.values()
    return [
        Way("build an image as root", [*_missing(), *([] if os.geteuid() == 0 else ["root"])]),
        Way("build an image as an ordinary user", [*_missing(), *rootless_problems()]),
        Way(
            "an image built elsewhere",
            [] if running else ["a container runtime that works: Apptainer, podman or docker"],
            "bring its file and the .json beside it; `coati-bench container verify FILE` checks them on arrival",
        ),
        *(Way(f"trials in {kind}", [problem] if problem else [], _note(kind)) for kind, problem in runtimes.items()),
        Way("trials in Enroot by Pyxis", _lacks("enroot", "srun"), "`coati-bench container pyxis` renders the line; untested"),
        Way("the hashed environment on a shared path", [], "`make install` in a checkout that every node sees; `container: none`"),
    ]


def problem_of(kind: Kind) -> str | None:
    """Why a runtime runs nothing here, or None."""
    runtime = next((item for item in present() if item.kind == kind), None)
    if runtime is None:
        return f"{' or '.join(PROGRAMS[kind])} on PATH"
    words = {"apptainer": ["--version"], "podman": ["info", "--format", "{{.Host.OCIRuntime.Name}}"],
             "docker": ["version", "--format", "{{.Server.Version}}"]}[kind]  # fmt: skip
    try:
        done = subprocess.run([runtime.program, *words], capture_output=True, text=True, check=False, timeout=ANSWER_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{kind} that answers; seen: {error}"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"{kind} that works{' (its daemon)' if kind == 'docker' else ''}; seen: {last}"
    if kind == "apptainer" and (seen := _version(done.stdout)) and seen < APPTAINER_LEAST:
        return f"Apptainer 1.2 or newer; seen: {done.stdout.strip()}"
    return None


def rootless_problems() -> list[str]:
    """What an ordinary user lacks for a build: namespaces, and ids to fill them with. Of root's machine: what any user would lack."""
    problems = [f"{name} (Debian: apt install uidmap)" for name in ("newuidmap", "newgidmap") if shutil.which(name) is None]
    if reason := namespaces_problem():
        problems.append(f"user namespaces; seen: {reason}")
    if os.geteuid() != 0:
        problems += [
            f"a line for {user_name()} in {file} (as root: usermod --add-sub{kind}s 200000-265535 {user_name()})"
            for kind, file in (("uid", "/etc/subuid"), ("gid", "/etc/subgid"))
            if not has_subordinate_ids(Path(file))
        ]
    return problems


def build_problems() -> list[str]:
    """What this user lacks for a build, programs apart; root lacks nothing."""
    return [] if os.geteuid() == 0 else rootless_problems()


def require_namespaces() -> None:
    """Raise MachineError where this user is not root and lacks what a build without root takes."""
    if problems := build_problems():
        raise MachineError(
            f"no image can be built here without root; missing: {'; '.join(problems)}; or build it on another machine, bring its file and "
            "the .json beside it, and check them: `coati-bench container verify FILE`"
        )


def namespaces_problem() -> str | None:
    """Why an ordinary user gets no user namespace, or None."""
    settings = {"user/max_user_namespaces": "0", "kernel/unprivileged_userns_clone": "0"}
    for name, forbids in settings.items():
        if _read(f"/proc/sys/{name}") == forbids:
            return f"sysctl {name.replace('/', '.')}={forbids}"
    if os.geteuid() == 0:
        return None
    done = subprocess.run(["unshare", "--user", "--map-root-user", "true"], capture_output=True, text=True, check=False)
    return done.stderr.strip() or "unshare failed" if done.returncode else None


def has_subordinate_ids(file: Path, least: int = 65536) -> bool:
    """Whether this user has as many ids as an image may hold, by a line NAME:FIRST:COUNT of /etc/subuid or /etc/subgid."""
    lines = [line.split(":") for line in (_read(str(file)) or "").splitlines()]
    mine = {user_name(), str(os.getuid())}
    return any(len(line) == 3 and line[0] in mine and line[2].isdigit() and int(line[2]) >= least for line in lines)


def _note(kind: Kind) -> str:
    chosen = insisted() or next((runtime.kind for runtime in present()), None)
    return f"{'this one is taken; ' if kind == chosen else ''}with GPUs untested"


def _missing() -> list[str]:
    return [f"{name} (Debian: apt install {PACKAGES[name]})" for name in BUILD_PROGRAMS if shutil.which(name) is None]


def _lacks(*programs: str) -> list[str]:
    return [f"{name} on PATH" for name in programs if shutil.which(name) is None]


def _version(text: str) -> tuple[int, ...] | None:
    found = re.search(r"(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None
