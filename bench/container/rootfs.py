"""The root file system of images: Debian's packages by mmdebstrap, checked against the committed hash. Torch-free."""

from __future__ import annotations

from pathlib import Path

from bench.container.images import BOOTSTRAP_OPTIONS, Image, committed
from bench.container.inputs import build_inputs
from bench.container.tools import run
from bench.data.cache import sha256_of
from bench.errors import MachineError


class ArchiveChangedError(MachineError):
    """Debian's archive gives another root file system than the committed one: nothing here is at fault."""


def make_rootfs(image: Image, folder: Path, scratch: Path, *, accept: bool = False) -> Path:
    """The root file system as a tar in `folder`, made once; checked against the committed hash unless another one is to be accepted.

    Raises MachineError if the tar that is there is another; ArchiveChangedError if one made just now is, which is then not kept.
    """
    recipe = build_inputs(image)["packages of the system"]
    path = folder / f"rootfs-{image.rootfs.release}-{recipe[:12]}.tar"
    wanted = None if accept else committed_rootfs(image)
    if not path.exists():
        part = scratch / path.name
        bootstrap(image, part)
        if wanted not in (None, seen := sha256_of(part)):
            raise ArchiveChangedError(
                f"Debian's archive has changed: its root file system is not the committed one; seen: sha256 {seen}; {wanted} would be "
                f"right; to commit the new one: coati-bench container build {image.name} --commit"
            )
        part.rename(path)
    elif wanted not in (None, seen := sha256_of(path)):
        raise MachineError(
            f"{path}: not the committed root file system; seen: sha256 {seen}; {wanted} would be right; remove the file, and the next "
            "build makes it anew"
        )
    return path


def committed_rootfs(image: Image) -> str | None:
    """The sha256 that the committed build found, if its recipe was this one."""
    before = (committed(image.name) or {}).get("inputs", {})
    same = before.get("packages of the system") == build_inputs(image)["packages of the system"]
    return before.get("root file system") if same else None


def bootstrap(image: Image, path: Path) -> None:
    """Let mmdebstrap make it; raises MachineError."""
    packages = ",".join(sorted(image.rootfs.packages))
    command = ["mmdebstrap", "-q", f"--include={packages}", *BOOTSTRAP_OPTIONS, image.rootfs.release, str(path), *debian_mirror()]
    # mmdebstrap hands it on to the packages' scripts, some of which run Python: what that imports would leave byte code of another kind
    environment = {"SOURCE_DATE_EPOCH": str(image.epoch), "PYTHONDONTWRITEBYTECODE": "1"}
    run(command, what=f"root file system, Debian {image.rootfs.release}", environment=environment)


def debian_mirror() -> list[str]:
    """The mirror that this machine is set up with; where it has none, mmdebstrap knows Debian's own."""
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    lines = sources.read_text(encoding="utf-8").splitlines() if sources.exists() else []
    return [line.split()[1] for line in lines if line.startswith("URIs:")][:1]
