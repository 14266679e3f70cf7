"""buildah's calls: stages built in a store of their own, their manifests, archive and squashfs. Torch-free.

The store lies in the build's scratch folder, so that nothing of other images is touched and nothing of this one stays. An image's
digest is that of a manifest which holds what the image is and not how it was made: no history, no version of buildah, no name of a
base; layers are not compressed, so it depends on no compressor either.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.cell import canonical_json
from bench.container.tools import run
from bench.data.cache import sha256_of
from bench.errors import MachineError

CONTAINERS_CONF = """[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
"""Limits that every machine can set."""
SMALL, QUICK = "-comp zstd -Xcompression-level 3", "-comp lz4 -no-fragments"
"""mksquashfs's options. What a program reads as it starts is unpacked at every mount: for that the second takes less than half of the
processor's time, in a file nearly half as large again.
"""
ANNOTATION = "org.opencontainers.image.ref.name"


class Store(NamedTuple):
    """buildah with an image store in a folder of its own."""

    folder: Path
    epoch: int
    """Time of everything that is built, seconds since 1970."""

    @classmethod
    def made(cls, folder: Path, epoch: int) -> Store:
        """An empty store in a new `folder`."""
        folder.mkdir()
        (folder / "containers.conf").write_text(CONTAINERS_CONF, encoding="utf-8")
        (folder / "tmp").mkdir()
        return cls(folder, epoch)

    @property
    def program(self) -> list[str]:
        """buildah, told where its store is."""
        return ["buildah", "--root", str(self.folder / "images"), "--runroot", str(self.folder / "run")]

    @property
    def environment(self) -> dict[str, str]:
        """For its calls."""
        return {"CONTAINERS_CONF": str(self.folder / "containers.conf"), "BUILDAH_ISOLATION": "chroot", "TMPDIR": str(self.folder / "tmp")}

    def build(self, context: Path, file: str, output: Sequence[str], arguments: Mapping[str, str], volumes: Sequence[str] = ()) -> None:
        """Build `file` of the folder `context` without a network; `output` are the options that say where to."""
        command = [
            *self.program, "build", "--quiet", "--timestamp", str(self.epoch), "--network", "none", "--layers=false",
            "--omit-history", "--identity-label=false", *(word for volume in volumes for word in ("--volume", volume)),
            *(word for key, value in arguments.items() for word in ("--build-arg", f"{key}={value}")),
            *output, "--file", str(context / file), str(context),
        ]  # fmt: skip
        run(command, what=file, environment=self.environment)

    def manifest(self, tag: str) -> bytes:
        """The image's manifest, bare of annotations, in canonical form."""
        printed = run([*self.program, "inspect", "--type", "image", "--format", "{{.Manifest}}", tag], environment=self.environment)
        return bare_manifest(json.loads(printed))

    def write_squashfs(self, tag: str, squashfs: Path, packing: str) -> None:
        """The image's files as a squashfs, which Apptainer runs as it is; `packing` is `SMALL` or `QUICK`."""
        script = (
            'squashfs=$1 tag=$2; shift 2; container=$("$@" from "$tag") && root=$("$@" mount "$container") || exit; '
            f'mksquashfs "$root" "$squashfs" -noappend {packing} -no-progress -quiet; code=$?; '
            '"$@" rm "$container" >/dev/null; exit $code'
        )
        prefix = [] if os.geteuid() == 0 else [*self.program, "unshare"]
        command = [*prefix, "sh", "-c", script, "sh", str(squashfs), tag, *self.program]
        run(command, what=squashfs.name, environment=self.environment | {"SOURCE_DATE_EPOCH": str(self.epoch)})

    def write_archive(self, tag: str, name: str, archive: Path) -> None:
        """An OCI archive of the image under the name `name`, the same bytes for the same image. Raises MachineError."""
        layout = self.folder / "layout"
        run([*self.program, "push", "-q", "--disable-compression", tag, f"dir:{layout}"], what=f"layers of {name}",
            environment=self.environment)  # fmt: skip
        as_oci_layout(layout, self.manifest(tag), name)
        order = ["--sort=name", f"--mtime=@{self.epoch}", "--owner=0", "--group=0", "--numeric-owner", "--mode=a=rX,u+w", "--format=gnu"]
        run(["tar", *order, "-C", str(layout), "-cf", str(archive), "blobs", "index.json", "oci-layout"], what=archive.name)
        shutil.rmtree(layout)


def digest_of(manifest: bytes) -> str:
    """The digest by which an image with this manifest is known."""
    return f"sha256:{hashlib.sha256(manifest).hexdigest()}"


def bare_manifest(content: Mapping[str, Any]) -> bytes:
    """What of a manifest is the image itself: configuration and layers.

    >>> bare_manifest({"schemaVersion": 2, "config": {}, "layers": [], "annotations": {"base.name": "localhost/x"}})
    b'{"config":{},"layers":[],"schemaVersion":2}'
    """
    return canonical_json({key: value for key, value in content.items() if key != "annotations"}).encode()


def as_oci_layout(folder: Path, manifest: bytes, name: str) -> None:
    """Make an OCI layout of what buildah wrote as `dir:`, in place. Raises MachineError if a blob is missing or not what it should be."""
    described = json.loads(manifest)
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for digest in {described["config"]["digest"], *(layer["digest"] for layer in described["layers"])}:
        path = folder / digest.removeprefix("sha256:")
        seen = sha256_of(path) if path.exists() else "no such file"
        if seen != path.name:
            raise MachineError(f"{name}: a layer is not what its manifest says; seen: {seen}; {digest} would be right")
        path.rename(blobs / path.name)
    digest = digest_of(manifest)
    (blobs / digest.removeprefix("sha256:")).write_bytes(manifest)
    entry = {"mediaType": described["mediaType"], "digest": digest, "size": len(manifest), "annotations": {ANNOTATION: name}}
    (folder / "index.json").write_text(canonical_json({"schemaVersion": 2, "manifests": [entry]}), encoding="utf-8")
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}', encoding="utf-8")
