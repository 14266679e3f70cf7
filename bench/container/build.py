"""Building an image: root file system, wheels, environment, kernels, package, archive and squashfs. Torch-free.

Twice from the same inputs gives the same digest, whatever the host's name, clock and folders: every file's time is the
image's epoch, byte code is checked by nothing that changes, and the build has no network (what it needs was fetched and checked).
Nothing half made is left under the final names.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench.container.buildah import QUICK, SMALL, Tree
from bench.container.contents import check_contents
from bench.container.images import DEFINITIONS, DIGESTS, SOURCE_TREE, Image
from bench.container.inputs import build_inputs, kernel_inputs, package_digest, package_files, text_digest
from bench.container.kernels import Kernels, kernels_for
from bench.container.manifest import Content, environment_content, image_content
from bench.container.overlay import SITE_PACKAGES
from bench.container.requirements import source_requirements, wheel_requirements
from bench.container.rootfs import make_rootfs
from bench.container.scratch import scratch_folder
from bench.container.site import require_namespaces
from bench.container.tools import require, require_space
from bench.container.wheelhouse import image_wheelhouse
from bench.data.cache import sha256_of
from bench.layout import cache_folder
from bench.measure.provenance import ENVIRONMENT_FILE, IMAGE_HOME, short_digest

SPACE = {"cpu": 8_000_000_000}
"""Bytes that a build takes at its peak, archive included; an image that is not named takes the CUDA size."""
CUDA_SPACE = 26_000_000_000
HOME = IMAGE_HOME.relative_to("/")
"""Where the image keeps this package, its locks and what it says of itself."""
KERNELS = SITE_PACKAGES.relative_to("/") / "colossalai" / "_C"
"""Where it keeps ColossalAI's kernels."""
SOURCE_FILE, REVISION_FILE = "source.sha256", "revision"
NONE = "none"
"""What an image says of kernels where it has none."""


class Environment(NamedTuple):
    """What is committed of an image: Debian and the locked packages."""

    content: Content
    inputs: dict[str, str]
    """What decided it."""


class Built(NamedTuple):
    """An image that was made."""

    image: Image
    environment_digest: str
    """Manifest digest of the environment: Debian and the locked packages. It is the one that is committed."""
    digest: str
    """Manifest digest of the whole image."""
    inputs: dict[str, str]
    package: str
    """sha256 of the package inside."""
    squashfs: Path
    archive: Path | None = None
    """The OCI archive, where it was asked for."""
    kernels: Kernels | None = None
    """ColossalAI's kernels inside, if any were compiled."""

    def to_json(self) -> dict[str, Any]:
        """As `container build --format json` prints it."""
        return {
            "image": self.image.name, "digest": self.digest, "environment_digest": self.environment_digest, "inputs": self.inputs,
            "squashfs": str(self.squashfs), "squashfs_bytes": self.squashfs.stat().st_size,
            "archive": None if self.archive is None else str(self.archive), "package": self.package,
            "kernels": None if self.kernels is None else self.kernels.to_json(),
        }  # fmt: skip

    @classmethod
    def of(cls, image: Image, note: dict[str, Any]) -> Built:
        """What `to_json` gave."""
        archive = None if note["archive"] is None else Path(note["archive"])
        kernels = Kernels.of(note["kernels"]) if note.get("kernels") else None
        digests = note["environment_digest"], note["digest"], note["inputs"], note["package"]
        return cls(image, *digests, Path(note["squashfs"]), archive, kernels)


def image_folder(cache: Path | None = None) -> Path:
    """Where images and what they are made from lie."""
    return cache_folder(cache) / "images"


def build(image: Image, *, cache: Path | None = None, archive: bool = False, any_package: bool = False, new_rootfs: bool = False) -> Built:
    """Make `image`, or find it made from the same inputs and package (`any_package`: or another); `archive`: as an OCI archive too.

    `new_rootfs` takes a root file system that is not the committed one. Raises MachineError, UserError.
    """
    require("mmdebstrap", "buildah", "mksquashfs", "unsquashfs", "tar")
    folder = image_folder(cache)
    if found := find_built(image, folder, archive=archive, any_package=any_package):
        print(f"  {found.squashfs}: up to date; nothing to do", flush=True)
        return found
    require_namespaces()
    with workshop(image, folder) as (scratch, tree):
        environment = build_environment(image, tree, scratch, folder, new_rootfs=new_rootfs)
        return finish(image, tree, environment, scratch, folder, archive=archive)


@contextmanager
def workshop(image: Image, folder: Path) -> Iterator[tuple[Path, Tree]]:
    """A scratch folder in `folder` with an empty tree, gone at the end. Raises MachineError where the disk has no room for a build."""
    require_space(folder, SPACE.get(image.name, CUDA_SPACE))
    folder.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder) as scratch:
        yield scratch, Tree.made(scratch / "tree", image.epoch)


def build_environment(image: Image, tree: Tree, scratch: Path, folder: Path, *, new_rootfs: bool = False) -> Environment:
    """Build the environment in `tree`. What is fetched stays in `folder`."""
    with ThreadPoolExecutor(1) as pool:  # it waits for the network, as the other does
        wheels = pool.submit(image_wheelhouse, image, folder / "wheelhouse")
        rootfs = make_rootfs(image, folder, scratch, accept=new_rootfs)
        wheelhouse = wheels.result()
    context = scratch / "environment"
    context.mkdir()
    for name in ("environment.sh", "90-environment.sh"):
        shutil.copy(DEFINITIONS / name, context / name)
    (context / "wheels.txt").write_text(wheel_requirements(image), encoding="utf-8")
    (context / "sources.txt").write_text(source_requirements(image), encoding="utf-8")
    tree.unpack(rootfs)
    mounts = {context: "/environment:ro", wheelhouse: "/wheelhouse:ro"}
    tree.run(["sh", "/environment/environment.sh"], mounts, what="environment.sh", variables={"SOURCE_DATE_EPOCH": str(image.epoch)})
    content = environment_content(tree.layer(), locks_digest(image), image.epoch)
    return Environment(content, build_inputs(image) | {"root file system": sha256_of(rootfs)})


def finish(image: Image, tree: Tree, environment: Environment, scratch: Path, folder: Path, *, archive: bool = False) -> Built:
    """Add what comes on an environment that lies in `tree`, and keep the image in `folder`."""
    (layer,) = environment.content.layers
    found = kernels_for(image, tree, layer, scratch, folder)
    package = scratch / "package"
    commit = revision()
    source = make_package(tree, package, found, {ENVIRONMENT_FILE: environment.content.digest, REVISION_FILE: commit})
    kernels = found[0] if found else None
    content = image_content(
        [layer, tree.layer_of(package)], locks=locks_digest(image), revision=commit, source=source,
        kernels=kernels.digest if kernels else NONE, epoch=image.epoch,
    )  # fmt: skip
    return keep(image, tree, Made(environment, content, package, source, kernels), scratch, folder, archive=archive)


def make_package(tree: Tree, package: Path, kernels: tuple[Kernels, Path] | None, said: Mapping[str, str]) -> str:
    """Make the layer that comes on the environment in the new folder `package`: this package, whose sha256 is returned, and kernels.

    `said`: what the image says of itself, file name -> line, beside the package.
    """
    shutil.copytree(DEFINITIONS / "package", package)
    source = copy_package(package / HOME)
    for name, line in said.items():
        (package / HOME / name).write_text(f"{line}\n", encoding="utf-8")
    if kernels:
        modules = package / KERNELS
        modules.mkdir(parents=True)
        for name in kernels[0].modules:
            shutil.copy(kernels[1] / name, modules / name)
    byte_code = [
        "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "-s", "/package", "-p", "/", "/package/opt/coati-bench/bench",
    ]  # fmt: skip
    tree.run(["/opt/venv/bin/python", *byte_code], {package: "/package"}, what="package")
    set_modes(package)
    return source


def copy_package(target: Path) -> str:
    """Copy this package, and return the sha256 of the copy: the source tree may be edited meanwhile."""
    for path in package_files():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SOURCE_TREE / path, target / path)
    digest = package_digest(target)
    (target / SOURCE_FILE).write_text(digest + "\n", encoding="utf-8")
    return digest


def set_modes(folder: Path) -> None:
    """Give what becomes a layer the same modes on every machine; what its owner may run, everybody may."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


def locks_digest(image: Image) -> str:
    """sha256 of the requirement files that are installed."""
    return text_digest(wheel_requirements(image) + source_requirements(image))


def revision() -> str:
    """The commit of the source tree, `unknown` outside a checkout."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=SOURCE_TREE, text=True, capture_output=True, check=False)
    return done.stdout.strip() or "unknown"


# -- what comes out --------------------------------------------------------------------------------------------------


class Made(NamedTuple):
    """What lies in the build's scratch folder, before it is kept."""

    environment: Environment
    content: Content
    package: Path
    """The layer on the environment, as a folder."""
    source: str
    """sha256 of the package in it."""
    kernels: Kernels | None


def keep(image: Image, tree: Tree, made: Made, scratch: Path, folder: Path, *, archive: bool) -> Built:
    """Put the squashfs, the archive if wanted, and a note of what they are into `folder`, the note last."""
    digest = made.content.digest
    name = f"coati-bench-{image.name}-{short_digest(digest)}"
    files = [folder / f"{name}.sqfs", *([folder / f"{name}.oci.tar"] if archive else [])]
    if archive:
        tree.write_archive(made.content, made.package, image.name, scratch / files[1].name)
    tree.add(made.package)
    tree.write_squashfs(scratch / files[0].name, SMALL if image.cuda else QUICK)
    check_contents(image, scratch / files[0].name)
    sums = {path.name: sha256_of(scratch / path.name) for path in files}
    for path in files:
        (scratch / path.name).replace(path)
    archived = files[1] if archive else None
    built = Built(image, made.environment.content.digest, digest, made.environment.inputs, made.source, files[0], archived, made.kernels)
    part = scratch / "note.json"
    part.write_text(json.dumps(built.to_json() | {"sha256": sums}, indent=2) + "\n", encoding="utf-8")
    part.replace(folder / f"{name}.json")
    return built


def find_built(image: Image, folder: Path, *, archive: bool = False, any_package: bool = False) -> Built | None:
    """The image that was made here from the same inputs and, unless `any_package`, the same package, if its files are there."""
    package = package_digest()
    fitting = (built for built in built_here(image, folder) if any_package or built.package == package)
    return next((built for built in fitting if not archive or (built.archive is not None and built.archive.exists())), None)


def built_here(image: Image, folder: Path) -> list[Built]:
    """What was made here from the same inputs and is still there: first with this package, then the newest."""
    inputs, kernels, package = build_inputs(image), kernel_inputs(image), package_digest()
    notes = [(path.stat().st_mtime, json.loads(path.read_text(encoding="utf-8"))) for path in note_paths(image, folder)]
    found = [(note["package"] == package, time, Built.of(image, note)) for time, note in notes]
    return [
        built
        for _, _, built in sorted(found, key=lambda item: item[:2], reverse=True)
        if inputs.items() <= built.inputs.items() and kernels == (built.kernels.inputs if built.kernels else {}) and built.squashfs.exists()
    ]


def note_paths(image: Image, folder: Path) -> list[Path]:
    """The notes of all builds of an image."""
    return sorted(folder.glob(f"coati-bench-{image.name}-*.json"))


def commit_digest(built: Built) -> None:
    """Write what was built into containers/digests.json, for others to check theirs against."""
    known = json.loads(DIGESTS.read_text(encoding="utf-8")) if DIGESTS.exists() else {}
    known[built.image.name] = {"digest": built.environment_digest, "inputs": built.inputs}
    if built.kernels:
        known[built.image.name]["kernels"] = {"digest": built.kernels.digest, "inputs": built.kernels.inputs}
    DIGESTS.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
