"""Building an image: root file system, wheels, two stages, archive and squashfs. Torch-free.

Twice from the same inputs gives the same digest, whatever the host's name, clock and folders: every file's time is the
image's epoch, byte code is checked by nothing that changes, and the build has no network (what it needs was fetched and checked).
Nothing half made is left under the final names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench.container.contents import check_contents
from bench.container.images import DEFINITIONS, DIGESTS, SOURCE_TREE, Image, committed
from bench.container.inputs import build_inputs, package_digest, package_files, text_digest
from bench.container.requirements import source_requirements, wheel_requirements
from bench.container.tools import require, require_space, run
from bench.container.wheelhouse import image_wheelhouse
from bench.data.cache import sha256_of
from bench.errors import MachineError, UserError
from bench.layout import cache_folder

SPACE = {"cpu": 8_000_000_000}
"""Bytes that a build takes at its peak; an image that is not named takes the CUDA size."""
CUDA_SPACE = 24_000_000_000
STAGES = ("environment", "package")
"""In the order that they are built in."""

CONTAINERS_CONF = """[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


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

    def to_json(self) -> dict[str, Any]:
        """As `container build --format json` prints it."""
        return {
            "image": self.image.name, "digest": self.digest, "environment_digest": self.environment_digest, "inputs": self.inputs,
            "squashfs": str(self.squashfs), "squashfs_bytes": self.squashfs.stat().st_size,
            "archive": None if self.archive is None else str(self.archive), "package": self.package,
        }  # fmt: skip

    @classmethod
    def of(cls, image: Image, note: dict[str, Any]) -> Built:
        """What `to_json` gave."""
        archive = None if note["archive"] is None else Path(note["archive"])
        return cls(image, note["environment_digest"], note["digest"], note["inputs"], note["package"], Path(note["squashfs"]), archive)


def image_folder(cache: Path | None = None) -> Path:
    """Where images and what they are made from lie."""
    return cache_folder(cache) / "images"


def build(image: Image, *, cache: Path | None = None, archive: bool = False, any_package: bool = False) -> Built:
    """Make `image`, or find it made from the same inputs and package (`any_package`: or another); `archive`: as an OCI archive too.

    Raises MachineError, UserError.
    """
    require("mmdebstrap", "buildah", "mksquashfs", "unsquashfs", "tar")
    folder = image_folder(cache)
    if found := find_built(image, folder, archive=archive, any_package=any_package):
        print(f"  {found.squashfs}: up to date; nothing to do", flush=True)
        return found
    require_space(folder, SPACE.get(image.name, CUDA_SPACE))
    folder.mkdir(parents=True, exist_ok=True)
    rootfs = make_rootfs(image, folder)
    wheelhouse = image_wheelhouse(image, folder / "wheelhouse")
    inputs = build_inputs(image) | {"root file system": sha256_of(rootfs)}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch, storage() as environment:
        context = make_context(image, rootfs, Path(scratch) / "context")
        digests = {}
        for stage in STAGES:
            tag = stage_tag(image, stage)
            run(buildah_command(image, stage, tag, context, wheelhouse), what=f"stage {stage}", environment=environment)
            digests[stage] = export(image, tag, Path(scratch) / stage, environment)
        return keep(image, digests, inputs, Path(scratch), folder, environment, archive=archive)


# -- what goes in ----------------------------------------------------------------------------------------------------


def make_rootfs(image: Image, folder: Path) -> Path:
    """The root file system as a tar, made once; checked against the committed hash. Raises MachineError."""
    recipe = build_inputs(image)["packages of the system"]
    path = folder / f"rootfs-{image.rootfs.release}-{recipe[:12]}.tar"
    if not path.exists():
        part = path.with_suffix(".part.tar")
        part.unlink(missing_ok=True)
        command = ["mmdebstrap", "-q", "--variant=minbase", f"--include={','.join(sorted(image.rootfs.packages))}"]
        run(
            [*command, image.rootfs.release, str(part), *debian_mirror()],
            what=f"root file system, Debian {image.rootfs.release}", environment={"SOURCE_DATE_EPOCH": str(image.epoch)},
        )  # fmt: skip
        part.rename(path)
    check_rootfs(image, path)
    return path


def check_rootfs(image: Image, path: Path) -> None:
    """Raise MachineError if the root file system is not the one of the committed image, where the recipe is."""
    before = (committed(image.name) or {}).get("inputs", {})
    seen, wanted = sha256_of(path), before.get("root file system")
    if wanted and before.get("packages of the system") == build_inputs(image)["packages of the system"] and seen != wanted:
        raise MachineError(
            f"{path}: not the committed root file system; seen: sha256 {seen}; {wanted} would be right; remove the file if it was "
            f"changed here, or, where Debian has changed, commit the new one: coati-bench container build {image.name} --commit"
        )


def debian_mirror() -> list[str]:
    """The mirror that this machine is set up with; where it has none, mmdebstrap knows Debian's own."""
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    lines = sources.read_text(encoding="utf-8").splitlines() if sources.exists() else []
    return [line.split()[1] for line in lines if line.startswith("URIs:")][:1]


def make_context(image: Image, rootfs: Path, context: Path) -> Path:
    """The folder that buildah sees."""
    context.mkdir()
    os.link(rootfs, context / "rootfs.tar")
    for name in ("Containerfile", "90-environment.sh"):
        shutil.copy(DEFINITIONS / name, context / name)
    (context / "wheels.txt").write_text(wheel_requirements(image), encoding="utf-8")
    (context / "sources.txt").write_text(source_requirements(image), encoding="utf-8")
    for path in package_files():
        target = context / "package" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SOURCE_TREE / path, target)
    (context / "package" / "source.sha256").write_text(package_digest() + "\n", encoding="utf-8")
    for path in context.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return context


# -- buildah ---------------------------------------------------------------------------------------------------------


@contextmanager
def storage() -> Iterator[dict[str, str]]:
    """Environment of buildah's calls: limits that every machine can set."""
    with tempfile.TemporaryDirectory() as scratch:
        conf = Path(scratch) / "containers.conf"
        conf.write_text(CONTAINERS_CONF, encoding="utf-8")
        yield {"CONTAINERS_CONF": str(conf), "BUILDAH_ISOLATION": "chroot"}


def stage_tag(image: Image, stage: str) -> str:
    """The name of a stage in buildah's store, this process's own."""
    return f"localhost/coati-bench-{image.name}-{stage}:{os.getpid()}"


def buildah_command(image: Image, stage: str, tag: str, context: Path, wheelhouse: Path) -> list[str]:
    """The call that builds one stage."""
    arguments = {"SOURCE_DATE_EPOCH": str(image.epoch), "LOCKS": locks_digest(image), "SOURCE": package_digest(), "REVISION": revision()}
    target = ["--target", "environment"] if stage == "environment" else []
    return [
        "buildah", "build", "--timestamp", str(image.epoch), "--network", "none", "--volume", f"{wheelhouse}:/wheelhouse:ro",
        "--layers", *target, *(word for key, value in arguments.items() for word in ("--build-arg", f"{key}={value}")),
        "--tag", tag, "--file", str(context / "Containerfile"), str(context),
    ]  # fmt: skip


def locks_digest(image: Image) -> str:
    """sha256 of the requirement files that are installed."""
    return text_digest(wheel_requirements(image) + source_requirements(image))


def revision() -> str:
    """The commit of the source tree, `unknown` outside a checkout."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=SOURCE_TREE, text=True, capture_output=True, check=False)
    return done.stdout.strip() or "unknown"


def export(image: Image, tag: str, folder: Path, environment: dict[str, str]) -> str:
    """Write the image as an OCI folder and return its manifest's digest.

    Layers are not compressed: their digests then depend on no compressor, and the squashfs is what travels.
    """
    command = ["buildah", "push", "-q", "--disable-compression", tag, f"oci:{folder}:{image.name}"]
    run(command, what=f"layers of {tag}", environment=environment)
    return manifest_digest(folder)


def manifest_digest(folder: Path) -> str:
    """Digest of the only manifest in an OCI folder. Raises UserError."""
    try:
        (entry,) = json.loads((folder / "index.json").read_text(encoding="utf-8"))["manifests"]
        return str(entry["digest"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: no OCI image; {error}; index.json with one manifest would be right") from None


# -- what comes out --------------------------------------------------------------------------------------------------


def keep(
    image: Image,
    digests: dict[str, str],
    inputs: dict[str, str],
    scratch: Path,
    folder: Path,
    environment: dict[str, str],
    *,
    archive: bool,
) -> Built:
    """Put the squashfs, the archive if wanted, and a note of what they are into `folder`, the note last."""
    name = f"coati-bench-{image.name}-{digests['package'].removeprefix('sha256:')[:12]}"
    files = [folder / f"{name}.sqfs", *([folder / f"{name}.oci.tar"] if archive else [])]
    write_squashfs(image, stage_tag(image, "package"), scratch / files[0].name, environment)
    check_contents(image, scratch / files[0].name)
    if archive:
        write_archive(image, scratch / "package", scratch / files[1].name)
    sums = {path.name: sha256_of(scratch / path.name) for path in files}
    for path in files:
        (scratch / path.name).replace(path)
    built = Built(image, digests["environment"], digests["package"], inputs, package_digest(), *files)
    part = scratch / "note.json"
    part.write_text(json.dumps(built.to_json() | {"sha256": sums}, indent=2) + "\n", encoding="utf-8")
    part.replace(folder / f"{name}.json")
    remove_tags(image, environment)
    return built


def remove_tags(image: Image, environment: dict[str, str]) -> None:
    """Take this build's names off buildah's store; layers that a later build can use again stay."""
    run(["buildah", "rmi", *(stage_tag(image, stage) for stage in reversed(STAGES))], what="tidying up", environment=environment)


def write_archive(image: Image, layout: Path, archive: Path) -> None:
    """An OCI archive, the same bytes for the same image."""
    order = ["--sort=name", f"--mtime=@{image.epoch}", "--owner=0", "--group=0", "--numeric-owner", "--format=gnu"]
    run(["tar", *order, "-C", str(layout), "-cf", str(archive), "blobs", "index.json", "oci-layout"], what=archive.name)


def write_squashfs(image: Image, tag: str, squashfs: Path, environment: dict[str, str]) -> None:
    """The image's files as a squashfs, which Apptainer runs as it is."""
    script = (
        'container=$(buildah from "$1") && root=$(buildah mount "$container") || exit; '
        'mksquashfs "$root" "$2" -noappend -comp zstd -Xcompression-level 3 -no-progress -quiet; code=$?; '
        'buildah rm "$container" >/dev/null; exit $code'
    )
    prefix = [] if os.geteuid() == 0 else ["buildah", "unshare"]
    command = [*prefix, "sh", "-c", script, "sh", tag, str(squashfs)]
    run(command, what=squashfs.name, environment=environment | {"SOURCE_DATE_EPOCH": str(image.epoch)})


def find_built(image: Image, folder: Path, *, archive: bool = False, any_package: bool = False) -> Built | None:
    """The image that was made here from the same inputs and, unless `any_package`, the same package, if its files are there."""
    package = package_digest()
    fitting = (built for built in built_here(image, folder) if any_package or built.package == package)
    return next((built for built in fitting if not archive or (built.archive is not None and built.archive.exists())), None)


def built_here(image: Image, folder: Path) -> list[Built]:
    """What was made here from the same inputs and is still there: first with this package, then the newest."""
    inputs, package = build_inputs(image), package_digest()
    notes = [(path.stat().st_mtime, json.loads(path.read_text(encoding="utf-8"))) for path in note_paths(image, folder)]
    fitting = [
        (note["package"] == package, time, Built.of(image, note)) for time, note in notes if inputs.items() <= note["inputs"].items()
    ]
    return [built for _, _, built in sorted(fitting, key=lambda item: item[:2], reverse=True) if built.squashfs.exists()]


def note_paths(image: Image, folder: Path) -> list[Path]:
    """The notes of all builds of an image."""
    return sorted(folder.glob(f"coati-bench-{image.name}-*.json"))


def commit_digest(built: Built) -> None:
    """Write what was built into containers/digests.json, for others to check theirs against."""
    known = json.loads(DIGESTS.read_text(encoding="utf-8")) if DIGESTS.exists() else {}
    known[built.image.name] = {"digest": built.environment_digest, "inputs": built.inputs}
    DIGESTS.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
