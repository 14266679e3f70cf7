"""Running a command inside an image: by Apptainer, or podman or docker on a workstation. Torch-free.

The image is read-only; of the host it sees only what is bound: the trial's folders, its data and starts, the caches of kernels,
and the source tree where the image's own package is another one. Its environment is what the launch gives and nothing else; it has no
network but the loopback, unless its ranks are on several hosts. Process ids stay those of the host, since the supervisor watches and
ends ranks by them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from bench.container.build import built_here, image_folder, note_paths
from bench.container.engine import load
from bench.container.engine_line import Seat, client_environment, engine_line
from bench.container.images import SOURCE_TREE, image_named
from bench.container.inputs import package_digest
from bench.container.overlay import PACKAGE as OVERLAID
from bench.container.overlay import SITE_PACKAGES
from bench.container.runtimes import ARCHIVE, SQUASHFS, Runtime, beside, choose
from bench.container.verify import check_file, is_committed, load_note
from bench.errors import UserError
from bench.layout import CACHE_VARIABLE, cache_folder
from bench.measure.nvml import describe_devices
from bench.measure.provenance import IMAGE_HOME, IMAGE_VARIABLE, short_digest
from bench.trial import Trial

PYTHON = "/opt/venv/bin/python"
PACKAGE = str(IMAGE_HOME)
OWN_VARIABLES = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "VIRTUAL_ENV", "CUDA_HOME", "CC", "CXX",
        "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR",
    }
)  # fmt: skip
"""Of the launch's environment, what names places of the host; inside, the image's own hold, and caches lie in its home folder."""
ENGINE_GRACE_SECONDS = 20.0
"""What an engine gets to end and remove a container before what asked for it is killed."""


class Bind(NamedTuple):
    """A path of the host that is seen inside, under the same name unless `inside` gives another."""

    path: Path
    writable: bool = False
    inside: Path | None = None

    @property
    def option(self) -> str:
        """As Apptainer reads it."""
        return f"{self.path}:{self.inside or self.path}:{'rw' if self.writable else 'ro'}"


class Found(NamedTuple):
    """An image's file, checked."""

    file: Path
    digest: str
    environment_digest: str
    package: str
    """sha256 of the package inside."""
    committed: bool
    """Whether its environment is the committed one."""
    kernels: str | None = None
    """Digest of ColossalAI's kernels inside, if any were compiled."""


def find_image(setting: str) -> Found:
    """The file behind a cell's `container`, as the runtime here takes it: a path, or an image by name as built here.

    Raises UserError, also for a changed file and one that this runtime does not take, MachineError without a runtime.
    """
    runtime = choose()
    if setting.endswith((SQUASHFS, ARCHIVE)):
        return _found(Path(setting).expanduser().absolute(), runtime)
    image, folder = image_named(setting), image_folder()
    fitting = [built.squashfs for built in built_here(image, folder)]
    if not fitting:
        raise UserError(
            f"container {setting!r}: it was not built here from this checkout's locks; seen: {len(note_paths(image, folder))} other images "
            f"in {folder}; `coati-bench container build {setting}` builds it"
        )
    return _found(next((file for file in fitting if beside(file, runtime.suffix).exists()), fitting[0]), runtime)


@cache
def _found(named: Path, runtime: Runtime) -> Found:
    file = beside(named, runtime.suffix)
    if named.exists() and not file.exists():
        raise UserError(
            f"{named}: {runtime.kind} takes an image as {file.name}, which is not beside it; `coati-bench container build` "
            f"{'with --archive ' if runtime.suffix == ARCHIVE else ''}makes it, or bring it, or another runtime (COATI_BENCH_RUNTIME)"
        )
    # an archive is checked when it is loaded, by its digest
    note = _checked(file) if runtime.suffix == SQUASHFS else load_note(file)
    if runtime.suffix == ARCHIVE:
        load(runtime, file, note["digest"])
    kernels = (note.get("kernels") or {}).get("digest")
    return Found(file, note["digest"], note["environment_digest"], note["package"], is_committed(note), kernels)


def _checked(file: Path) -> dict[str, Any]:
    """The note of a squashfs, whose hash is computed once for as long as the file stays the same one (its change time says so)."""
    note, stamp = load_note(file), image_folder() / f".{file.name}.checked"
    seen = file.stat()
    now = f"{seen.st_dev} {seen.st_ino} {seen.st_size} {seen.st_ctime_ns} {note['sha256'].get(file.name)}"
    with suppress(OSError):
        if stamp.read_text(encoding="ascii") == now:
            return note
    check_file(file)
    with suppress(OSError):
        image_folder().mkdir(parents=True, exist_ok=True)
        stamp.write_text(now, encoding="ascii")
    return note


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
        digest=f"sha256:{trial.image.sha256}",
        binds=tuple([Bind(path, writable=True) for path in writable] + [Bind(path) for path in read if path.exists()] + over),
        gpu=trial.parsed_cell.settings.device == "cuda",
        own_package=trial.image.facts.get("package_sha256") == package_digest(),
        environment=trial.image.facts.get("environment_digest", ""),
    )


def home_inside(name: str = "") -> Path:
    """The folder of home folders, or that called `name`."""
    folder = cache_folder() / "home" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def capabilities() -> list[str]:
    """The compute capabilities of this machine's devices, once each."""
    return sorted({device["compute_capability"] for device in describe_devices() if device.get("compute_capability")})


class Entered(NamedTuple):
    """A line that runs inside an image."""

    line: list[str]
    environment: dict[str, str]
    grace: float | None = None
    """Seconds that ending it may take, where that is more than a process needs."""


class Container(NamedTuple):
    """An image file and what of the host is seen inside."""

    image: Path
    """A squashfs for Apptainer, an OCI archive for podman and docker."""
    binds: tuple[Bind, ...] = ()
    gpu: bool = False
    own_package: bool = True
    """Whether the package inside is the one that starts it; else the source tree is bound and comes first."""
    digest: str = ""
    """Of the image in the file."""
    environment: str = ""
    """Digest of the environment in the image."""

    @property
    def home(self) -> Path:
        """The home folder inside, one for each environment and kind of device: what is compiled at first use is kept there."""
        return home_inside("-".join([short_digest(self.environment or self.digest), *(capabilities() if self.gpu else [])]))

    @property
    def by_engine(self) -> bool:
        """Whether podman or docker runs it: not as a child of ours, and without descriptors of ours."""
        return self.image.name.endswith(ARCHIVE)

    def enter(self, line: Sequence[str], variables: Mapping[str, str], *, seat: Seat | None = None, note: Path | None = None) -> Entered:
        """`line`, whose program is a Python, inside the image with `variables`.

        Without a `seat` it has the host's network. `note`: where the topmost process inside notes its id, if podman or docker run it.
        Raises MachineError without a runtime, or where it cannot load the image.
        """
        runtime = choose(ARCHIVE if self.by_engine else SQUASHFS)
        inside = self.variables(variables) | {IMAGE_VARIABLE: f"{runtime.kind}:{self.image.name}"}
        if not self.by_engine:
            return Entered(self._apptainer_line(runtime, line, seat), inside | {"PATH": os.environ.get("PATH", os.defpath)})
        words = engine_line(
            runtime, load(runtime, self.image, self.digest), line[1:], python=PYTHON, home=self.home, variables=inside, seat=seat,
            mounts=[(bind.path, bind.inside or bind.path, bind.writable) for bind in [*self.mounts, Bind(home_inside(), writable=True)]],
            gpu=self.gpu, note=note,
        )  # fmt: skip
        environment = client_environment(inside) | {"PYTHONPATH": str(SOURCE_TREE)}
        return Entered(words, environment, grace=ENGINE_GRACE_SECONDS)

    def _apptainer_line(self, runtime: Runtime, line: Sequence[str], seat: Seat | None) -> list[str]:
        alone = seat is not None and seat.of == 1
        return [
            runtime.program, "exec", "--contain", "--home", str(self.home), *(["--nv"] if self.gpu else []),
            *(["--net", "--network", "none"] if alone else []),
            *(word for bind in self.mounts for word in ("--bind", bind.option)), str(self.image), PYTHON, *line[1:],
        ]  # fmt: skip

    def covers(self, other: Container) -> bool:
        """Whether what runs in this one sees all that `other` must see."""
        binds = {(bind.path, bind.inside): bind.writable for bind in self.binds}
        return (self.image, self.gpu, self.own_package) == (other.image, other.gpu, other.own_package) and all(
            (bind.path, bind.inside) in binds and binds[bind.path, bind.inside] >= bind.writable for bind in other.binds
        )

    def variables(self, variables: Mapping[str, str]) -> dict[str, str]:
        """The variables inside: what the launch gives, which is allow-listed, but for what names places of the host.

        Apptainer hands them on; its own `--env` does nothing for a bare squashfs, whose PATH comes from a script of the image.
        """
        kept = {key: value for key, value in variables.items() if key not in OWN_VARIABLES}
        return {
            **kept,
            CACHE_VARIABLE: str(cache_folder()),
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
