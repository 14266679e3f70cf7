"""An image is known by what it is: its manifest without what tells how it was made."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from bench.container.buildah import QUICK, Store, as_oci_layout, bare_manifest, digest_of
from bench.container.engine import archive_manifest
from bench.errors import MachineError

CONFIG, LAYER = b'{"os":"linux"}', b"layer"


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def written_by_buildah(folder: Path) -> bytes:
    """A `dir:` as buildah pushes one; its manifest."""
    folder.mkdir()
    for content in (CONFIG, LAYER):
        (folder / sha(content)).write_bytes(content)
    described = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"digest": f"sha256:{sha(CONFIG)}", "size": len(CONFIG)},
        "layers": [{"digest": f"sha256:{sha(LAYER)}", "size": len(LAYER)}],
        "annotations": {"org.opencontainers.image.base.name": "localhost/x:123"},
    }
    return bare_manifest(described)


def test_the_name_of_a_base_does_not_decide_a_digest() -> None:
    manifest = {"schemaVersion": 2, "config": {}, "layers": [], "annotations": {"org.opencontainers.image.base.name": "localhost/x:123"}}
    other = {**manifest, "annotations": {"org.opencontainers.image.base.name": "localhost/x:456"}}
    assert digest_of(bare_manifest(manifest)) == digest_of(bare_manifest(other))
    assert digest_of(bare_manifest(manifest)) != digest_of(bare_manifest({**manifest, "layers": [{"digest": "sha256:aa"}]}))


def test_an_archive_says_the_digest_of_its_image(tmp_path: Path) -> None:
    manifest = written_by_buildah(tmp_path / "layout")
    as_oci_layout(tmp_path / "layout", manifest, "cpu")
    assert {path.name for path in (tmp_path / "layout" / "blobs" / "sha256").iterdir()} == {sha(CONFIG), sha(LAYER), sha(manifest)}
    with tarfile.open(tmp_path / "x.oci.tar", "w") as tar:
        for name in ("blobs", "index.json", "oci-layout"):
            tar.add(tmp_path / "layout" / name, name)
    assert digest_of(archive_manifest(tmp_path / "x.oci.tar")) == digest_of(manifest)


@pytest.mark.parametrize("damage", ["tampered", "gone"])
def test_a_layer_that_is_not_what_the_manifest_says_is_refused(tmp_path: Path, damage: str) -> None:
    manifest = written_by_buildah(tmp_path / "layout")
    path = tmp_path / "layout" / sha(LAYER)
    path.write_bytes(b"layex") if damage == "tampered" else path.unlink()
    with pytest.raises(MachineError, match=r"cpu: a layer is not what its manifest says; seen: .*; sha256:.* would be right"):
        as_oci_layout(tmp_path / "layout", manifest, "cpu")


@pytest.mark.skipif(not (shutil.which("buildah") and shutil.which("mksquashfs")), reason="buildah and squashfs-tools are not here")
def test_the_same_files_give_the_same_image_in_two_stores(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        context = tmp_path / name
        context.mkdir()
        (context / "file").write_text("content")
        (context / "Containerfile").write_text("ARG BASE=scratch\nFROM $BASE\nCOPY file /file\nLABEL x=y\n")
        store = Store.made(tmp_path / f"store-{name}", 1764547200)
        try:
            store.build(context, "Containerfile", ["--tag", f"localhost/{name}"], {})
        except MachineError as error:
            pytest.skip(f"buildah does not work here: {error}")
        store.write_squashfs(f"localhost/{name}", context / "x.sqfs", QUICK)
        store.write_archive(f"localhost/{name}", "x", context / "x.oci.tar")
        found.append((digest_of(store.manifest(f"localhost/{name}")), sha((context / "x.sqfs").read_bytes()),
                      sha((context / "x.oci.tar").read_bytes()), digest_of(archive_manifest(context / "x.oci.tar"))))  # fmt: skip
    assert found[0] == found[1]
    assert found[0][0] == found[0][3]
    listed = subprocess.run(["unsquashfs", "-l", "-d", "", str(tmp_path / "a" / "x.sqfs")], text=True, capture_output=True, check=True)
    assert "/file" in listed.stdout
    assert json.loads(store.manifest("localhost/b"))["layers"][0]["mediaType"] == "application/vnd.oci.image.layer.v1.tar"
