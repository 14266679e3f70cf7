"""The same files give the same layer, squashfs and archive, in any folder; what is mounted meanwhile leaves nothing behind."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.container.buildah import QUICK, Tree
from bench.container.engine import archive_manifest
from bench.container.manifest import Layer, content_of, digest_of
from bench.container.scratch import scratch_folder
from bench.errors import MachineError

EPOCH = 1764547200
needs_buildah = pytest.mark.skipif(
    not (shutil.which("buildah") and shutil.which("mksquashfs")), reason="buildah and squashfs-tools are not here"
)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder in which nothing stays mounted."""
    with scratch_folder(tmp_path) as folder:
        yield folder


def grown(folder: Path, content: str = "content") -> tuple[Tree, Path]:
    """A tree of one file, and a package for it."""
    (folder / "files").mkdir(parents=True)
    (folder / "files" / "file").write_text(content)
    (folder / "package" / "opt").mkdir(parents=True)
    (folder / "package" / "opt" / "more").write_text("more")
    tree = Tree.made(folder / "tree", EPOCH)
    with tarfile.open(folder / "rootfs.tar", "w") as tar:
        tar.add(folder / "files", ".")
    try:
        tree.unpack(folder / "rootfs.tar")
    except MachineError as error:
        pytest.skip(f"buildah does not work here: {error}")
    return tree, folder / "package"


def image(folder: Path) -> tuple[object, ...]:
    tree, package = grown(folder)
    layers = [tree.layer(), tree.layer_of(package)]
    content = content_of(layers, {"x": "y"}, EPOCH)
    tree.write_archive(content, package, "x", folder / "x.oci.tar")
    assert digest_of(archive_manifest(folder / "x.oci.tar")) == content.digest
    tree.add(package)
    tree.write_squashfs(folder / "x.sqfs", QUICK)
    return (*layers, content.digest, (folder / "x.oci.tar").read_bytes(), (folder / "x.sqfs").read_bytes())


@needs_buildah
def test_the_same_files_give_the_same_image_in_two_folders(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = image(scratch / "a")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    assert image(scratch / "b" / "c") == first
    listed = subprocess.run(["unsquashfs", "-lln", "-d", "", str(scratch / "a" / "x.sqfs")], text=True, capture_output=True, check=True)
    assert {line.split()[-1] for line in listed.stdout.splitlines() if line.startswith("-")} == {"/file", "/opt/more"}
    assert {line.split()[3] for line in listed.stdout.splitlines()} == {"2025-12-01"}


@needs_buildah
def test_another_content_gives_another_layer(scratch: Path) -> None:
    layers: set[Layer] = {grown(scratch / content, content)[0].layer() for content in ("content", "contenT")}
    assert len(layers) == 2


@needs_buildah
def test_what_is_mounted_while_a_command_runs_leaves_nothing_behind(scratch: Path) -> None:
    tree, _ = grown(scratch)
    (scratch / "outside").mkdir()
    of_this_machine = {Path(name): f"{name}:ro" for name in ("/usr", "/lib", "/lib64")}
    tree.run(["/usr/bin/cp", "/file", "/outside/copy"], {**of_this_machine, scratch / "outside": "/outside"}, what="copying")
    assert (scratch / "outside" / "copy").read_text() == "content"
    tree.layer(scratch / "layer.tar")
    with tarfile.open(scratch / "layer.tar") as tar:
        assert "./file" in tar.getnames()
        assert not {"./usr", "./lib", "./lib64", "./outside"} & set(tar.getnames())
