"""The table of images and their committed digests. Torch-free."""

from __future__ import annotations

import json
import tomllib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from bench.errors import UserError

SOURCE_TREE = Path(__file__).resolve().parents[2]
DEFINITIONS = SOURCE_TREE / "containers"
DIGESTS = DEFINITIONS / "digests.json"

FORGET_HOST = (
    'for name in hostname resolv.conf apt/sources.list; do rm -f "$1/etc/$name" && install -m 644 /dev/null "$1/etc/$name" || exit 1; done'
)
BOOTSTRAP_OPTIONS = ("--variant=minbase", "--skip=output/dev", f"--customize-hook={FORGET_HOST}")
"""mmdebstrap's, beside the packages.

It copies the building machine's name, name servers and mirror into the root file system. Device nodes only root can make, so that
root's image would be another than everybody else's; runtimes bring their own /dev.
"""

LAYER_OPTIONS = ("--sort=name", "--numeric-owner", "--format=gnu")
"""GNU tar's, beside the time of all files."""


class Rootfs(NamedTuple):
    """The operating system's part: a Debian release and packages of it."""

    release: str
    packages: tuple[str, ...]


class Image(NamedTuple):
    """One image of containers/images.toml."""

    name: str
    description: str
    locks: tuple[str, ...]
    """Files of envs/ with wheels."""
    sources: str
    """File of envs/ with what exists as source only."""
    epoch: int
    """Time of every file in it, seconds since 1970."""
    rootfs: Rootfs
    cuda: str | None = None
    driver: int | None = None
    """Lowest major version of the NVIDIA driver."""
    driver_limited: int | None = None
    """Lowest major version that runs it by CUDA's minor version compatibility, which leaves out what needs a newer driver."""
    architectures: tuple[str, ...] = ()
    """Compute capabilities that its torch was built for; a `+` after one: its PTX is there for newer ones."""
    compiler: str | None = None
    """File of envs/ with the CUDA compiler, where ColossalAI's kernels are compiled into the image."""


@cache
def images() -> dict[str, Image]:
    """Every image, by name."""
    table = tomllib.loads((DEFINITIONS / "images.toml").read_text(encoding="utf-8"))
    rootfs = Rootfs(table["rootfs"]["release"], tuple(table["rootfs"]["packages"]))
    return {
        name: Image(
            name=name, description=item["description"], locks=tuple(item["locks"]), sources=item["sources"], epoch=table["epoch"],
            rootfs=rootfs, cuda=item.get("cuda"), driver=item.get("driver"),
            driver_limited=item.get("driver_limited"), architectures=tuple(item.get("architectures", ())), compiler=item.get("compiler"),
        )
        for name, item in table["images"].items()
    }  # fmt: skip


def image_named(name: str) -> Image:
    """The image of that name. Raises UserError."""
    if name not in images():
        raise UserError(f"image {name!r}: there is no such image; one of {', '.join(images())} would be right")
    return images()[name]


def committed(name: str) -> dict[str, Any] | None:
    """What the last committed build of an image was: {digest, inputs: {name: sha256}}, with {kernels: the same} if it has any; or None."""
    if not DIGESTS.exists():
        return None
    found = json.loads(DIGESTS.read_text(encoding="utf-8")).get(name)
    return found if isinstance(found, dict) else None
