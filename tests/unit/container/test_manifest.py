"""An image is known by what it is: its configuration and its layers, and nothing that tells how they were made."""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
from pathlib import Path

import pytest

from bench.container.engine import archive_manifest, read_ids
from bench.container.manifest import Content, Layer, content_of, digest_of, write_layout, written_layer
from bench.errors import MachineError

TAR = b"the tar of a layer"
EPOCH = 1764547200


def layer(content: bytes = TAR) -> Layer:
    return Layer(f"sha256:{hashlib.sha256(content).hexdigest()}", len(content))


def image(*layers: Layer, **labels: str) -> Content:
    return content_of(layers or [layer()], labels, EPOCH)


def test_layers_labels_and_time_decide_a_digest_and_nothing_else_does() -> None:
    assert image(x="y").digest == image(x="y").digest
    others = [image(layer(b"other"), x="y"), image(layer(), layer(b"more"), x="y"), image(x="z"), content_of([layer()], {"x": "y"}, 0)]
    assert len({image(x="y").digest, *(other.digest for other in others)}) == 5


def test_its_configuration_says_what_runs_and_names_its_layers() -> None:
    described = json.loads(image(layer(), layer(b"more"), x="y").configuration)
    assert described["config"]["Entrypoint"] == ["coati-bench"]
    assert described["config"]["Labels"] == {"x": "y"}
    assert described["created"] == "2025-12-01T00:00:00Z"
    assert described["rootfs"]["diff_ids"] == [layer().digest, layer(b"more").digest]
    assert "history" not in described


def test_a_layer_is_what_a_program_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", f"import sys; sys.stdout.buffer.write({TAR!r})"]
    assert written_layer(command, {}) == layer()
    assert written_layer(command, {}, tmp_path / "kept") == layer()
    assert (tmp_path / "kept").read_bytes() == TAR


def test_a_program_that_fails_makes_no_layer_and_says_why() -> None:
    command = ["sh", "-c", "echo half; echo 'tar: x: No space left on device' >&2; exit 2"]
    with pytest.raises(MachineError, match=r"^layer: the disk is full; .*; seen: sh ended with 2: tar: x: No space left on device$"):
        written_layer(command, {})


def test_an_archive_says_the_digest_of_its_image(tmp_path: Path) -> None:
    (tmp_path / "layer.tar").write_bytes(TAR)
    content = image()
    write_layout(tmp_path / "layout", content, [tmp_path / "layer.tar"], "cpu")
    names = {path.name for path in (tmp_path / "layout" / "blobs" / "sha256").iterdir()}
    assert {f"sha256:{name}" for name in names} == {layer().digest, digest_of(content.configuration), content.digest}
    with tarfile.open(tmp_path / "x.oci.tar", "w") as tar:
        for name in ("blobs", "index.json", "oci-layout"):
            tar.add(tmp_path / "layout" / name, name)
    assert archive_manifest(tmp_path / "x.oci.tar") == content.manifest
    assert read_ids(tmp_path / "x.oci.tar", content.digest).layers == (layer().digest,)


def test_a_layer_that_is_not_what_the_manifest_says_is_refused(tmp_path: Path) -> None:
    (tmp_path / "layer.tar").write_bytes(TAR[::-1])
    with pytest.raises(MachineError, match=r"cpu: a layer is not what its manifest says; seen: sha256:.*; sha256:.* would be right"):
        write_layout(tmp_path / "layout", image(), [tmp_path / "layer.tar"], "cpu")
