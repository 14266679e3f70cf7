"""Running a command inside an image: Apptainer, or podman or docker on a workstation. Torch-free.

The image is read-only; of the host it sees only what is bound: the trial's folders, its data and starts, the caches of kernels,
and the source tree where the image's own package is another one. Its environment is what the launch gives and nothing else.
Process ids stay those of the host, since the supervisor watches and ends ranks by them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from bench.container.build import built_here, image_folder, note_paths
from bench.container.images import SOURCE_TREE, image_named
from bench.container.inputs import package_digest
from bench.container.overlay import PACKAGE as OVERLAID
from bench.container.overlay import SITE_PACKAGES
from bench.container.verify import check_file
from bench.errors import MachineError, UserError
from bench.layout import cache_folder
from bench.trial import Trial

PYTHON = "/opt/venv/bin/python"
PACKAGE = "/opt/coati-bench"
OWN_VARIABLES = frozenset(
    {"PATH", "HOME", "USER", "LOGNAME", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "VIRTUAL_ENV", "CUDA_HOME", "CC", "CXX"}
)
"""Of the launch's environment, what names places of the host; inside, the image's own hold."""


class Bind(NamedTuple):
    """A path of the host that is seen inside, under the same name unless `inside` gives another."""

    path: Path
    writable: bool = False
    inside: Path | None = None

    @property
    def option(self) -> str:
        """As Apptainer and podman read it."""
        return f"{self.path}:{self.inside or self.path}:{'rw' if self.writable else 'ro'}"


class Found(NamedTuple):
    """An image's file, checked."""

    file: Path
    digest: str
    environment_digest: str
    package: str
    """sha256 of the package inside."""
    kernels: str | None = None
    """Digest of ColossalAI's kernels inside, if any were compiled."""


def find_image(setting: str) -> Found:
    """The file behind a cell's `container`: a path, or an image by name as built here. Raises UserError, also for a changed file."""
    if setting.endswith(".sqfs"):
        return _found(Path(setting).expanduser().absolute())
    image, folder = image_named(setting), image_folder()
    fitting = built_here(image, folder)
    if not fitting:
        raise UserError(
            f"container {setting!r}: it was not built here from this checkout's locks; seen: {len(note_paths(image, folder))} other images "
            f"in {folder}; `coati-bench container build {setting}` builds it"
        )
    return _found(fitting[0].squashfs)


@cache
def _found(file: Path) -> Found:
    note = check_file(file)
    return Found(file, note["digest"], note["environment_digest"], note["package"], (note.get("kernels") or {}).get("digest"))


def container_of(trial: Trial) -> Container | None:
    """What the trial's ranks run in, with what they must see; None for this environment."""
    if trial.image is None:
        return None
    work = Path(trial.work)
    suite = work.parents[2] if len(work.parents) > 2 and work.parents[1].name == "logs" else work
    writable = [suite, work, *([Path(trial.save_to).parent] if trial.save_to else [])]
    read = [Path(item.path).parent for item in trial.data] + [Path(item.path) for item in trial.starts] + [cache_folder()]
    over = [Bind(Path(trial.overlay.path) / OVERLAID, inside=SITE_PACKAGES / OVERLAID)] if trial.overlay else []
    return Container(
        image=Path(trial.image.path),
        binds=tuple([Bind(path, writable=True) for path in writable] + [Bind(path) for path in read if path.exists()] + over),
        gpu=trial.parsed_cell.settings.device == "cuda",
        own_package=trial.image.facts.get("package_sha256") == package_digest(),
    )


def _home() -> Path:
    """The home folder inside: kernels that were built at first use are kept there."""
    folder = cache_folder() / "home"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Container(NamedTuple):
    """An image file and what of the host is seen inside."""

    image: Path
    """A squashfs for Apptainer."""
    binds: tuple[Bind, ...] = ()
    gpu: bool = False
    own_package: bool = True
    """Whether the package inside is the one that starts it; else the source tree is bound and comes first."""

    def command(self, line: Sequence[str]) -> list[str]:
        """`line`, whose program is a Python, inside the image. Raises MachineError without a runtime."""
        program = shutil.which("apptainer") or shutil.which("singularity")
        if program is None:
            raise MachineError(
                "no container runtime; seen: neither apptainer nor singularity; Apptainer 1.2 or newer would be right, or `container: none`"
            )
        return [
            program, "exec", "--contain", "--home", str(_home()), *(["--nv"] if self.gpu else []),
            *(word for bind in self.mounts for word in ("--bind", bind.option)), str(self.image), PYTHON, *line[1:],
        ]  # fmt: skip

    def covers(self, other: Container) -> bool:
        """Whether what runs in this one sees all that `other` must see."""
        binds = {(bind.path, bind.inside): bind.writable for bind in self.binds}
        return (self.image, self.gpu, self.own_package) == (other.image, other.gpu, other.own_package) and all(
            (bind.path, bind.inside) in binds and binds[bind.path, bind.inside] >= bind.writable for bind in other.binds
        )

    def variables(self, variables: Mapping[str, str]) -> dict[str, str]:
        """The environment of `command`: what the launch gives, which is allow-listed, but for what names places of the host.

        Apptainer hands it on; its own `--env` does nothing for a bare squashfs, whose PATH comes from a script of the image.
        """
        kept = {key: value for key, value in variables.items() if key not in OWN_VARIABLES}
        return {
            **kept,
            "PATH": os.environ.get("PATH", os.defpath),
            "PYTHONPATH": PACKAGE if self.own_package else f"{SOURCE_TREE}:{PACKAGE}",
        }

    @property
    def mounts(self) -> list[Bind]:
        """All that is bound, this package's source tree included where the image's is another."""
        source = [] if self.own_package else [Bind(SOURCE_TREE)]
        return [*source, *outermost(self.binds)]


def outermost(binds: Iterable[Bind]) -> list[Bind]:
    """Each path once, in order of depth, so that a writable folder inside a read-only one is bound after it.

    >>> [str(it.path) for it in outermost([Bind(Path("/a/b"), True), Bind(Path("/a")), Bind(Path("/a"))])]
    ['/a', '/a/b']
    """
    merged: dict[Path, Bind] = {}
    for bind in binds:
        place = bind.inside or bind.path
        merged[place] = bind._replace(writable=bind.writable or (place in merged and merged[place].writable))
    return [merged[place] for place in sorted(merged, key=lambda place: (len(place.parts), place))]
