"""What an image's file holds, recomputed from its content as a build computes it: the note beside a file may say anything. Torch-free.

A squashfs is unpacked, and its two layers are written again by the same tar: that gives the digests of its environment and of the image.
Of an archive the layers are hashed. Extended attributes count for nothing, since layers have none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.container.build import HOME, KERNELS, NONE, REVISION_FILE, SOURCE_FILE
from bench.container.buildah import tar_options
from bench.container.engine import archive_manifest, checked_configuration
from bench.container.images import DEFINITIONS
from bench.container.inputs import PACKAGE, package_digest
from bench.container.kernels import kernels_in
from bench.container.manifest import LOCKS_LABEL, Layer, digest_of, environment_content, image_content, written_layer
from bench.container.runtimes import ARCHIVE
from bench.container.scratch import scratch_folder
from bench.container.site import build_problems
from bench.container.tools import as_root, missing_programs, require_space, run
from bench.container.verify import kernels_of
from bench.errors import UserError
from bench.measure.provenance import ENVIRONMENT_FILE, locks_sha256

UNPACKED = 4
"""Times the size of a squashfs: room for what is in it (seen: 2.2)."""
NO_IMAGE = "{file}: no image of this project; seen: {seen}; a file of `coati-bench container build` would be right"
LOCKS = HOME / "locks"


def recompute(file: Path, note: Mapping[str, Any], folder: Path) -> str:
    """What was recomputed of an image's file, unpacked meanwhile in `folder`, and what only its note says, in a sentence.

    Raises UserError if the file holds another image than the note says.
    """
    if problems := obstacles(file):
        return f"not recomputed from its files (missing: {'; '.join(problems)}): only its sha256 was compared, with that in its note"
    found, said = held(file, folder), claimed(note)
    wrong = [f"{name} {digest}, where its note says {said[name]}" for name, digest in found.items() if digest != said[name]]
    if wrong:
        raise UserError(f"{file}: holds something else than its note says; seen: {'; '.join(wrong)}; bring or build it again")
    left = [f"the digest of the {name} is what its note says" for name in said if name not in found]
    return "; ".join([f"recomputed from its files: {', '.join(found)}", *left])


def obstacles(file: Path) -> list[str]:
    """What is missing here to recompute a file."""
    if file.name.endswith(ARCHIVE):
        return []
    return [*missing_programs("unsquashfs", "tar", *([] if os.geteuid() == 0 else ["buildah"])), *build_problems()]


def claimed(note: Mapping[str, Any]) -> dict[str, str]:
    """Digests by what they are of, as a note says them."""
    digests = {"environment": note["environment_digest"], "image": note["digest"], "package": note["package"]}
    return {**digests, "kernels": kernels_of(note)["digest"]}


def held(file: Path, folder: Path) -> dict[str, str]:
    """The same of what a file holds; without that of the image where it does not say of which commit it is. Raises UserError."""
    if file.name.endswith(ARCHIVE):
        return held_by_archive(file)
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, UNPACKED * file.stat().st_size)
    with scratch_folder(folder) as scratch:
        return held_by_squashfs(file, scratch)


def held_by_squashfs(file: Path, scratch: Path) -> dict[str, str]:
    """Of a squashfs, which is unpacked in the folder `scratch`."""
    root, package = scratch / "root", scratch / "package"
    unpack(file, root)
    own = package_paths(root)
    unpack(file, package, own)
    locks, epoch = locks_of(root, file)
    layer, source, modules = layer_of(root, epoch, without=own), package_digest(package / HOME), kernels_in(package / KERNELS, {})
    kernels = modules.digest if modules.modules else NONE
    found = {"environment": environment_content(layer, locks, epoch).digest, "package": source, "kernels": kernels}
    if (said := package / HOME / REVISION_FILE).exists():
        layers, revision = [layer, layer_of(package, epoch)], said.read_text(encoding="utf-8").strip()
        found["image"] = image_content(layers, locks=locks, revision=revision, source=source, kernels=kernels, epoch=epoch).digest
    return found


def locks_of(root: Path, file: Path) -> tuple[str, int]:
    """sha256 of the requirement files in an unpacked image, and the time of all its files. Raises UserError where there are none."""
    try:
        return locks_sha256(root / HOME), int((root / LOCKS / "wheels.txt").stat().st_mtime)
    except OSError as error:
        raise UserError(NO_IMAGE.format(file=file, seen=f"/{LOCKS}: {error.strerror}")) from None


def unpack(file: Path, target: Path, only: Sequence[str] = ()) -> None:
    """Unpack a squashfs, or of it these paths, into the new folder `target`, with the owners that files have in it."""
    words = ["unsquashfs", "-quiet", "-no-progress", "-no-xattrs", "-dest", str(target), str(file), *only]
    run(as_root(*words), what=None if only else f"unpacking {file.name}")


def package_paths(root: Path) -> list[str]:
    """What comes on the environment in an unpacked image: this package, what it says of itself, and kernels."""
    files = sorted(path.relative_to(DEFINITIONS / "package") for path in (DEFINITIONS / "package").rglob("*") if path.is_file())
    said = [HOME / name for name in (*PACKAGE, SOURCE_FILE, ENVIRONMENT_FILE, REVISION_FILE)]
    return [str(path) for path in (*files, *said, *(KERNELS / module.name for module in sorted((root / KERNELS).glob("*.so"))))]


def layer_of(folder: Path, epoch: int, *, without: Sequence[str] = ()) -> Layer:
    """The files of a folder as a layer, but for the paths `without`, with their owners as they are."""
    left_out = ["--anchored", "--no-wildcards", *(f"--exclude=./{path}" for path in without)]
    return written_layer(as_root("tar", *tar_options(epoch), *left_out, "-C", str(folder), "-cf", "-", "."), {})


def held_by_archive(archive: Path) -> dict[str, str]:
    """Of an OCI archive, whose layers are hashed; the upper one is not looked into for package and kernels. Raises UserError."""
    manifest = archive_manifest(archive)
    described = json.loads(manifest)
    layers = [Layer(layer["digest"], layer["size"]) for layer in described["layers"]]
    configuration = json.loads(checked_configuration(archive, described["config"]["digest"], [layer.digest for layer in layers]))
    try:
        locks, created = configuration["config"]["Labels"][LOCKS_LABEL], datetime.fromisoformat(configuration["created"])
    except KeyError as error:
        raise UserError(NO_IMAGE.format(file=archive, seen=f"no {error} in its configuration")) from None
    return {"environment": environment_content(layers[0], locks, int(created.timestamp())).digest, "image": digest_of(manifest)}
