"""Which program runs images here: Apptainer, else podman, else docker; the variable COATI_BENCH_RUNTIME insists on one. Torch-free.

The choice is the machine's, so it is no setting of a suite: the same image is the same image under each of them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal, NamedTuple

from bench.errors import MachineError, UserError

RUNTIME_VARIABLE = "COATI_BENCH_RUNTIME"
Kind = Literal["apptainer", "podman", "docker"]
PROGRAMS: dict[Kind, tuple[str, ...]] = {"apptainer": ("apptainer", "singularity"), "podman": ("podman",), "docker": ("docker",)}
"""In order of choice, with the programs that each may be called."""

SQUASHFS, ARCHIVE = ".sqfs", ".oci.tar"
"""How the names of images end: what Apptainer runs as it is, and what podman and docker load first."""


class Runtime(NamedTuple):
    """A program that runs images."""

    kind: Kind
    program: str
    """Its path."""

    @property
    def suffix(self) -> str:
        """How the names of the image files end that it takes."""
        return SQUASHFS if self.kind == "apptainer" else ARCHIVE


def insisted() -> Kind | None:
    """The runtime that the environment insists on, if any. Raises UserError for a name that is none."""
    name = os.environ.get(RUNTIME_VARIABLE)
    if not name:
        return None
    kind = next((kind for kind in PROGRAMS if kind == name), None)
    if kind is None:
        raise UserError(f"{RUNTIME_VARIABLE}: no such container runtime; seen: {name!r}; one of {', '.join(PROGRAMS)} would be right")
    return kind


def insist(name: str) -> None:
    """Insist on a runtime, for this process and what it starts. Raises UserError for a name that is none."""
    os.environ[RUNTIME_VARIABLE] = name
    insisted()


def present() -> list[Runtime]:
    """The runtimes that are installed, in order of choice."""
    found = [(kind, next(filter(None, map(shutil.which, names)), None)) for kind, names in PROGRAMS.items()]
    return [Runtime(kind, program) for kind, program in found if program]


def choose(suffix: str | None = None) -> Runtime:
    """The runtime for trials here, or for image files that end in `suffix`. Raises MachineError where there is none, UserError."""
    wanted = insisted()
    for runtime in present():
        if wanted in (None, runtime.kind) and suffix in (None, runtime.suffix):
            return runtime
    raise MachineError(lacking(wanted, suffix))


def wants_archive() -> bool:
    """Whether the runtime for trials here takes images as OCI archives. Raises UserError."""
    try:
        return choose().suffix == ARCHIVE
    except MachineError:
        return False


def lacking(wanted: Kind | None, suffix: str | None = None) -> str:
    """What is missing where no runtime, not the one insisted on, or none for the image's kind of file is installed.

    >>> lacking("docker")
    'no container runtime docker; seen: not on PATH; another --runtime (or COATI_BENCH_RUNTIME), or none, would be right'
    """
    fitting = " or ".join(kind for kind in PROGRAMS if suffix in (None, Runtime(kind, "").suffix))
    if wanted is None:
        return f"no container runtime; seen: none on PATH; {fitting} would be right (Apptainer from 1.2), or `container: none`"
    if suffix and Runtime(wanted, "").suffix != suffix:
        return f"{wanted} runs no image in a file *{suffix}; seen: {RUNTIME_VARIABLE}={wanted}; {fitting} would be right"
    return f"no container runtime {wanted}; seen: not on PATH; another --runtime (or {RUNTIME_VARIABLE}), or none, would be right"


def beside(file: Path, suffix: str) -> Path:
    """The same image as another kind of file.

    >>> str(beside(Path("/a/coati-bench-cpu-0123.oci.tar"), ".sqfs"))
    '/a/coati-bench-cpu-0123.sqfs'
    """
    stem = next((file.name.removesuffix(end) for end in (SQUASHFS, ARCHIVE) if file.name.endswith(end)), file.name)
    return file.with_name(stem + suffix)
