"""What an image is: its configuration and layers, its manifest, and the digest of that; an OCI layout of them. Torch-free.

The manifest holds what the image is and not how it was made: no history, no tool's version, no name of a base. Layers are not
compressed, so it depends on no compressor either.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from bench.cell import canonical_json
from bench.container.images import DEFINITIONS
from bench.container.tools import DIES_WITH_US, failure
from bench.data.cache import sha256_of
from bench.errors import MachineError

MANIFEST, CONFIGURATION, LAYER = (f"application/vnd.oci.image.{name}" for name in ("manifest.v1+json", "config.v1+json", "layer.v1.tar"))
ANNOTATION = "org.opencontainers.image.ref.name"
LOCKS_LABEL = "io.coati-bench.locks"
BLOCK = 1 << 20


class Layer(NamedTuple):
    """One layer: a tar, known by its digest."""

    digest: str
    size: int


class Content(NamedTuple):
    """What an image is."""

    configuration: bytes
    layers: tuple[Layer, ...]

    @property
    def manifest(self) -> bytes:
        """The image's manifest, in canonical form."""
        configuration = Layer(digest_of(self.configuration), len(self.configuration))
        described = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": CONFIGURATION, **configuration._asdict()},
            "layers": [{"mediaType": LAYER, **layer._asdict()} for layer in self.layers],
        }
        return canonical_json(described).encode()

    @property
    def digest(self) -> str:
        """The digest by which the image is known."""
        return digest_of(self.manifest)


def content_of(layers: Sequence[Layer], labels: Mapping[str, str], epoch: int) -> Content:
    """An image of these layers: containers/configuration.json with them and the labels."""
    described = json.loads((DEFINITIONS / "configuration.json").read_text(encoding="utf-8"))
    described["created"] = datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    described["config"]["Labels"] = dict(labels)
    described["rootfs"] = {"type": "layers", "diff_ids": [layer.digest for layer in layers]}
    return Content(canonical_json(described).encode(), tuple(layers))


def environment_content(layer: Layer, locks: str, epoch: int) -> Content:
    """An environment, as it is committed; `locks`: sha256 of its requirement files."""
    return content_of([layer], {"org.opencontainers.image.title": "coati-bench environment", LOCKS_LABEL: locks}, epoch)


def image_content(layers: Sequence[Layer], *, locks: str, revision: str, source: str, kernels: str, epoch: int) -> Content:
    """A whole image; `source`: sha256 of the package in it, `kernels`: digest of its kernels, or `none`."""
    labels = {
        "org.opencontainers.image.title": "coati-bench", "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.revision": revision, LOCKS_LABEL: locks,
        "io.coati-bench.source": source, "io.coati-bench.kernels": kernels,
    }  # fmt: skip
    return content_of(layers, labels, epoch)


def digest_of(content: bytes) -> str:
    """The digest by which a manifest, and so an image, is known.

    >>> digest_of(b"")[:19]
    'sha256:e3b0c44298fc'
    """
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def written_layer(command: Sequence[str], environment: Mapping[str, str], into: Path | None = None) -> Layer:
    """The layer that a program writes, hashed on its way, and kept in the file `into` if one is given. Raises MachineError."""
    digest, size = hashlib.sha256(), 0
    with tempfile.TemporaryFile() as said, (into or Path(os.devnull)).open("wb") as kept:
        words = [*DIES_WITH_US, *command]
        with subprocess.Popen(words, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=said) as process:
            assert process.stdout is not None
            while block := process.stdout.read(BLOCK):
                digest.update(block)
                kept.write(block)
                size += len(block)
        said.seek(0)
        done = subprocess.CompletedProcess(words, process.returncode, "", said.read().decode(errors="replace"))
    if done.returncode:
        raise failure("layer", done)
    return Layer(f"sha256:{digest.hexdigest()}", size)


def write_layout(folder: Path, content: Content, layers: Sequence[Path], name: str) -> None:
    """An OCI layout of an image in `folder`, the layers' files moved into it. Raises MachineError if one is not what it should be."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for layer, path in zip(content.layers, layers, strict=True):
        if (seen := f"sha256:{sha256_of(path)}") != layer.digest:
            raise MachineError(f"{name}: a layer is not what its manifest says; seen: {seen}; {layer.digest} would be right")
        path.rename(blobs / layer.digest.removeprefix("sha256:"))
    for blob in (content.configuration, content.manifest):
        (blobs / digest_of(blob).removeprefix("sha256:")).write_bytes(blob)
    entry = {"mediaType": MANIFEST, "digest": content.digest, "size": len(content.manifest), "annotations": {ANNOTATION: name}}
    (folder / "index.json").write_text(canonical_json({"schemaVersion": 2, "manifests": [entry]}), encoding="utf-8")
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}', encoding="utf-8")
