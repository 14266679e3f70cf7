"""`container verify`: a file against its note, the committed digest, and what it holds."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bench.cli import main
from bench.container import recomputed, verify
from bench.container.build import REVISION_FILE, SOURCE_FILE
from bench.container.buildah import tar_options
from bench.container.images import DEFINITIONS
from bench.container.inputs import package_digest, text_digest
from bench.container.kernels import kernels_in
from bench.container.manifest import Layer, environment_content, image_content, write_layout, written_layer
from bench.container.recomputed import HOME, KERNELS, LOCKS
from bench.data.cache import sha256_of
from bench.errors import UserError
from bench.measure.provenance import ENVIRONMENT_FILE

EPOCH = 1764547200
PYTHON = Path("opt/venv/bin/python")
INPUTS = {"wheels": "a" * 64, "epoch": "b" * 64}
pytestmark = pytest.mark.skipif(
    shutil.which("mksquashfs") is None or bool(recomputed.obstacles(Path("x.sqfs"))), reason="squashfs-tools, or root, are not here"
)


class Made:
    """A small image: its squashfs and archive, with a note that tells the truth."""

    def __init__(self, folder: Path, *, revision: bool = True, kernels: bool = False) -> None:
        self.folder, self.root, self.package = folder, folder / "root", folder / "package"
        files = {LOCKS / "wheels.txt": "torch==1\n", LOCKS / "sources.txt": "x==1\n", KERNELS / "__init__.py": "", PYTHON: "python"}
        for path, text in files.items():
            write(self.root / path, text)
        self.environment = environment_content(layer(self.root), text_digest("torch==1\nx==1\n"), EPOCH)
        shutil.copytree(DEFINITIONS / "package", self.package)
        write(self.package / HOME / "bench" / "a.py", "x = 1\n")
        source = package_digest(self.package / HOME)
        said = {SOURCE_FILE: source, ENVIRONMENT_FILE: self.environment.digest}
        for name, line in (said | {REVISION_FILE: "c0ffee"} if revision else said).items():
            write(self.package / HOME / name, f"{line}\n")
        if kernels:
            write(self.package / KERNELS / "fused_optim_cuda.so", "code")
        compiled = kernels_in(self.package / KERNELS, {"compiler": "c" * 64}) if kernels else None
        layers = [layer(self.root), layer(self.package)]
        self.content = image_content(
            layers, locks=text_digest("torch==1\nx==1\n"), revision="c0ffee", source=source,
            kernels=compiled.digest if compiled else "none", epoch=EPOCH,
        )  # fmt: skip
        self.note: dict[str, Any] = {
            "image": "cpu", "digest": self.content.digest, "environment_digest": self.environment.digest, "inputs": INPUTS,
            "package": source, "kernels": compiled.to_json() if compiled else None, "sha256": {},
        }  # fmt: skip

    @property
    def name(self) -> str:
        digest: str = self.note["digest"]
        return f"coati-bench-cpu-{digest.removeprefix('sha256:')[:12]}"

    def squashfs(self) -> Path:
        """Both layers as a squashfs, with the note beside it."""
        file, whole = self.folder / f"{self.name}.sqfs", self.folder / "whole"
        shutil.copytree(self.root, whole)
        shutil.copytree(self.package, whole, dirs_exist_ok=True)
        line = ["mksquashfs", str(whole), str(file), "-noappend", "-all-time", str(EPOCH), "-quiet", "-no-progress"]
        subprocess.run(line, check=True, capture_output=True)
        return self.noted(file)

    def archive(self) -> Path:
        """Both layers as an OCI archive, with the note beside it."""
        file, files = self.folder / f"{self.name}.oci.tar", [self.folder / "environment.tar", self.folder / "package.tar"]
        for folder, path in zip((self.root, self.package), files, strict=True):
            layer(folder, path)
        write_layout(self.folder / "layout", self.content, files, "cpu")
        with tarfile.open(file, "w") as tar:
            tar.add(self.folder / "layout", ".")
            for path in (self.folder / "layout").rglob("*"):
                if path.is_file():
                    tar.add(path, path.relative_to(self.folder / "layout"))
        return self.noted(file)

    def noted(self, file: Path) -> Path:
        self.note["sha256"][file.name] = sha256_of(file)
        (self.folder / f"{self.name}.json").write_text(json.dumps(self.note))
        return file


def layer(folder: Path, into: Path | None = None) -> Layer:
    """As buildah's trees write it."""
    return written_layer(["tar", *tar_options(EPOCH), "-C", str(folder), "-cf", "-", "."], {}, into)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class Done(NamedTuple):
    """How the verb ended."""

    code: str | int | None
    output: str


Run = Callable[..., Done]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Verify a file where that is committed which the note of `made` has, but for `before`."""

    def verified(file: Path, made: Made, **before: Any) -> Done:
        committed = {"digest": made.note["environment_digest"], "inputs": INPUTS, "kernels": made.note["kernels"], **before}
        monkeypatch.setattr(verify, "committed", lambda _: committed)
        with pytest.raises(SystemExit) as end:
            main(["container", "verify", str(file), "--cache", str(tmp_path / "cache")])
        return Done(end.value.code, "".join(capsys.readouterr()))

    return verified


@pytest.mark.parametrize("kernels", [False, True])
def test_of_a_good_file_everything_is_recomputed(tmp_path: Path, run: Run, kernels: bool) -> None:
    made = Made(tmp_path, kernels=kernels)
    done = run(made.squashfs(), made)
    assert done.code == 0, done.output
    assert f"cpu, {made.content.digest}; its environment is the committed one ({made.environment.digest})" in done.output
    assert done.output.endswith("recomputed from its files: environment, package, kernels, image\n")
    assert not list((tmp_path / "cache" / "images").glob(".build-*"))


def test_an_older_image_does_not_say_its_commit_and_so_not_all_of_it_is_recomputed(tmp_path: Path, run: Run) -> None:
    made = Made(tmp_path, revision=False)
    done = run(made.squashfs(), made)
    assert done.code == 0, done.output
    assert "recomputed from its files: environment, package, kernels; the digest of the image is what its note says" in done.output


def test_of_an_archive_the_layers_are_hashed(tmp_path: Path, run: Run) -> None:
    made = Made(tmp_path)
    file = made.archive()
    done = run(file, made)
    assert done.code == 0, done.output
    assert "recomputed from its files: environment, image; the digest of the package is what its note says; the digest of the kernels" in (
        done.output
    )
    swap(file, made.content.layers[0].digest)
    done = run(made.noted(file), made)
    assert done.code == 2
    assert "a part of it is not what its manifest says; seen: sha256:" in done.output


def swap(archive: Path, digest: str) -> None:
    """Put another content into the place of a blob."""
    with tarfile.open(archive) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    with tarfile.open(archive, "w") as tar:
        for name, content in (members | {f"blobs/{digest.replace(':', '/')}": b"forged"}).items():
            info = tarfile.TarInfo(name)
            info.size = len(content) if "forged" not in name else 6
            tar.addfile(info, io.BytesIO(content))


def test_another_environment_is_refused_with_the_inputs_that_differ(tmp_path: Path, run: Run) -> None:
    made = Made(tmp_path)
    done = run(made.squashfs(), made, digest="sha256:old", inputs={**INPUTS, "wheels": "f" * 64})
    assert done.code == 2
    assert f"its environment is not the committed one; seen: {made.environment.digest}; sha256:old is committed; " in done.output
    assert "inputs differ: wheels: ffffffffffff -> aaaaaaaaaaaa" in done.output


def test_other_kernels_are_refused_with_the_inputs_that_differ(tmp_path: Path, run: Run) -> None:
    made = Made(tmp_path, kernels=True)
    done = run(made.squashfs(), made, kernels={"digest": "sha256:old", "inputs": {"compiler": "d" * 64}})
    assert done.code == 2
    assert "its kernels are not the committed ones; seen: sha256:" in done.output
    assert "inputs differ: compiler: dddddddddddd -> cccccccccccc" in done.output


def test_an_image_without_the_committed_kernels_is_refused(tmp_path: Path, run: Run) -> None:
    made = Made(tmp_path)
    done = run(made.squashfs(), made, kernels={"digest": "sha256:old", "inputs": {"compiler": "d" * 64}})
    assert done.code == 2
    assert "its kernels are not the committed ones; seen: none; sha256:old is committed" in done.output


def test_without_a_committed_digest_the_command_that_commits_one_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "committed", lambda _: None)
    with pytest.raises(UserError, match=r"no digest is committed for the image 'cpu'; seen: sha256:.*; coati-bench container build cpu "):
        verify.check_committed(tmp_path / "x.sqfs", Made(tmp_path).note)


def test_a_tampered_file_is_refused(tmp_path: Path, run: Run) -> None:
    made = Made(tmp_path)
    file = made.squashfs()
    file.write_bytes(file.read_bytes() + b"more")
    done = run(file, made)
    assert done.code == 2
    assert "not the image that was built; seen: sha256 " in done.output


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (PYTHON, "environment"),
        (HOME / "bench" / "a.py", "package"),
        (KERNELS / "more.so", "kernels"),
        (HOME / "bench" / "__pycache__" / "a.pyc", "image"),
    ],
)
def test_a_forged_image_is_refused_though_its_note_has_the_sha256_of_its_file(tmp_path: Path, run: Run, changed: Path, named: str) -> None:
    made = Made(tmp_path)
    write(made.package / changed, "forged")
    done = run(made.squashfs(), made)
    assert done.code == 2
    assert "holds something else than its note says; seen: " in done.output
    assert f"{named} sha256:" in done.output or f"{named} {package_digest(made.package / HOME)}" in done.output
    assert ("environment sha256:" in done.output) == (named == "environment")


def test_what_is_no_image_of_this_project_is_said(tmp_path: Path, run: Run) -> None:
    made = Made(tmp_path)
    shutil.rmtree(made.root / LOCKS)
    done = run(made.squashfs(), made)
    assert done.code == 2
    assert "no image of this project; seen: /opt/coati-bench/locks: No such file or directory" in done.output


def test_where_nothing_can_be_recomputed_that_is_said(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(tmp_path)
    file = made.squashfs()
    monkeypatch.setattr(recomputed, "missing_programs", lambda *_: ["unsquashfs"])
    done = run(file, made)
    assert done.code == 0
    assert "not recomputed from its files (missing: unsquashfs): only its sha256 was compared, with that in its note" in done.output
