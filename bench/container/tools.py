"""The programs that building and running images takes: are they here, and running them with errors one can act on. Torch-free."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.errors import MachineError

PACKAGES = {
    "mmdebstrap": "mmdebstrap",
    "buildah": "buildah",
    "skopeo": "skopeo",
    "mksquashfs": "squashfs-tools",
    "unsquashfs": "squashfs-tools",
    "apptainer": "apptainer",
    "podman": "podman",
    "tar": "tar",
}
"""Program -> the Debian or Ubuntu package that has it."""

_WORDS = (
    ("No space left on device", "the disk is full; free some space and run the same command again"),
    (
        "newuidmap",
        "no subordinate ids for user namespaces; on Debian and Ubuntu: apt install uidmap, then a line in /etc/subuid and /etc/subgid",
    ),
    (
        "unshare: ",
        "the kernel refuses user namespaces (sysctl user.max_user_namespaces); build elsewhere and `container verify` the file here",
    ),
    ("DO NOT MATCH THE HASHES", "a file is not the locked one: it, or the lock, was changed"),
)
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
"""Put before a program: a build that is killed leaves none behind that goes on writing into its folder (util-linux, man 1 setpriv)."""
_NOISE = ("subprocess exited with", "Error: exit status")
"""How lines of buildah begin that say only that a command failed."""


def missing_programs(*programs: str) -> list[str]:
    """Those of `programs` that are not on PATH."""
    return [program for program in programs if shutil.which(program) is None]


def require(*programs: str) -> None:
    """Raise MachineError, naming all of them, if some of `programs` are not here."""
    if missing := missing_programs(*programs):
        packages = " ".join(sorted({PACKAGES[program] for program in missing}))
        raise MachineError(
            f"images cannot be made here; missing: {', '.join(missing)}; on Debian and Ubuntu: apt install {packages}; "
            "or build the image on another machine and bring the file"
        )


def require_space(folder: Path, needed: int) -> None:
    """Raise MachineError unless `folder`, or what will hold it, has `needed` bytes free."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise MachineError(
            f"{existing}: too little space for the image; seen: {free / 1e9:.1f} GB free; {needed / 1e9:.0f} GB would be right"
        )


def run(
    command: Sequence[str], *, what: str | None = None, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> str:
    """Run a program to its end and return what it printed; `what` it does is said, with the time. Raises MachineError."""
    begin = time.monotonic()
    if what:
        print(f"  {what} ...", flush=True)
    done = subprocess.run(
        [*DIES_WITH_US, *command],
        env={**os.environ, **(environment or {})},
        cwd=folder,
        text=True,
        capture_output=True,
        check=False,
        errors="replace",
    )
    if done.returncode:
        raise failure(what or command[0], done)
    if what:
        print(f"  {what}: {time.monotonic() - begin:.0f} s", flush=True)
    return done.stdout


def as_root(*command: str) -> list[str]:
    """`command` as one who may give files to anybody: as it is for root, else in a user namespace of this user's subordinate ids."""
    return [*([] if os.geteuid() == 0 else ["buildah", "unshare"]), *command]


def failure(what: str, done: subprocess.CompletedProcess[str]) -> MachineError:
    """The error that says how a program failed, and what would be right."""
    program = done.args[len(DIES_WITH_US)]
    return MachineError(f"{what}: {explain(done.stdout + done.stderr)}; seen: {program} ended with {done.returncode}: {tail(done)}")


def user_name() -> str:
    """Name of this process's user, its number where it has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def explain(output: str) -> str:
    """What would be right, by the words of a failed program.

    >>> explain("OSError: [Errno 28] No space left on device")
    'the disk is full; free some space and run the same command again'
    """
    return next((advice for words, advice in _WORDS if words in output), "it failed")


def tail(done: subprocess.CompletedProcess[str]) -> str:
    """The last words of a failed program, on one line."""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(_NOISE)]
    return " | ".join((telling or lines)[-4:])[-800:] or "nothing printed"
