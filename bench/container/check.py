"""Does this machine make the committed environment? It is built and looked at, then thrown away or made an image of. Torch-free."""

from __future__ import annotations

from pathlib import Path

from bench.container.build import build_environment, finish, image_folder, workshop
from bench.container.images import Image, committed
from bench.container.rootfs import ArchiveChangedError
from bench.container.site import build_problems
from bench.container.tools import missing_programs
from bench.container.verify import compared
from bench.errors import UserError

SKIPPED = "SKIPPED: "


def check_environment(image: Image, *, cache: Path | None = None, keep: bool = False) -> str:
    """Build the environment of `image` anew and say in one line that it is the committed one, or why it could not be tried.

    Such a line begins with SKIPPED: programs are missing, or Debian's archive is another than on the day of the commit. What was fetched
    stays in the cache; with `keep` the image is made of it, too. Raises UserError if another environment came out, MachineError where
    something failed.
    """
    before = committed(image.name)
    if before is None:
        raise UserError(f"image {image.name!r}: no digest is committed; `coati-bench container build {image.name} --commit` commits one")
    missing = [*build_problems(), *missing_programs("mmdebstrap", "buildah", "mksquashfs", "tar")]
    if missing:
        return f"{SKIPPED}{', '.join(missing)} missing, so the image {image.name} was not built"
    folder = image_folder(cache)
    with workshop(image, folder) as (scratch, tree):
        try:
            environment = build_environment(image, tree, scratch, folder)
        except ArchiveChangedError as error:
            return f"{SKIPPED}{error}"
        digest = environment.content.digest
        if problems := compared(f"{image.name}: another digest", before, digest, environment.inputs):
            raise UserError(problems[0])
        kept = f"; image: {finish(image, tree, environment, scratch, folder).squashfs}" if keep else ""
    return f"{image.name}: built anew, its environment is the committed one ({digest}){kept}"
