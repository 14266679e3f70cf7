"""The root file system is the committed one, or nothing is built with it."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from bench.container import rootfs
from bench.container.images import FORGET_HOST, image_named
from bench.container.inputs import build_inputs
from bench.errors import MachineError

IMAGE = image_named("cpu")
CONTENT = b"Debian of the committed day"


@pytest.fixture
def debian(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """An archive whose root file system is `content`; the committed one is CONTENT's."""
    archive = {"content": CONTENT}
    inputs = {
        "packages of the system": build_inputs(IMAGE)["packages of the system"],
        "root file system": hashlib.sha256(CONTENT).hexdigest(),
    }
    monkeypatch.setattr(rootfs, "committed", lambda _: {"inputs": inputs})
    monkeypatch.setattr(rootfs, "bootstrap", lambda _, path: path.write_bytes(archive["content"]))
    return archive


def make(folder: Path, *, accept: bool = False) -> Path:
    (folder / "scratch").mkdir(exist_ok=True)
    return rootfs.make_rootfs(IMAGE, folder, folder / "scratch", accept=accept)


def test_it_is_made_once_and_kept(tmp_path: Path, debian: dict[str, bytes]) -> None:
    path = make(tmp_path)
    debian["content"] = b"a later day"
    assert make(tmp_path) == path
    assert path.read_bytes() == CONTENT


def test_one_that_was_changed_here_is_refused_and_stays_where_it_is(tmp_path: Path, debian: dict[str, bytes]) -> None:
    path = make(tmp_path)
    path.write_bytes(b"tampered")
    with pytest.raises(
        MachineError, match=r"not the committed root file system; seen: sha256 \w{64}; \w{64} would be right; remove the file"
    ):
        make(tmp_path)
    assert path.read_bytes() == b"tampered"


def test_an_archive_that_has_changed_is_told_apart_and_its_root_file_system_not_kept(tmp_path: Path, debian: dict[str, bytes]) -> None:
    debian["content"] = b"a later day"
    with pytest.raises(rootfs.ArchiveChangedError, match="Debian's archive has changed"):
        make(tmp_path)
    assert not list(tmp_path.glob("rootfs-*"))


def test_a_new_one_is_taken_where_it_is_to_be_committed(tmp_path: Path, debian: dict[str, bytes]) -> None:
    debian["content"] = b"a later day"
    assert make(tmp_path, accept=True).read_bytes() == b"a later day"


def test_another_list_of_packages_has_no_committed_root_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rootfs, "committed", lambda _: {"inputs": {"packages of the system": "0" * 64, "root file system": "1" * 64}})
    assert rootfs.committed_rootfs(IMAGE) is None


def test_nothing_of_the_building_machine_stays_in_it(tmp_path: Path) -> None:
    (tmp_path / "etc" / "apt").mkdir(parents=True)
    for name in ("hostname", "resolv.conf", "apt/sources.list"):
        (tmp_path / "etc" / name).write_text("of this machine")
        (tmp_path / "etc" / name).chmod(0o755)
    subprocess.run(["sh", "-c", FORGET_HOST, "hook", str(tmp_path)], check=True)
    for name in ("hostname", "resolv.conf", "apt/sources.list"):
        path = tmp_path / "etc" / name
        assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"", 0o644)
    assert subprocess.run(["sh", "-c", FORGET_HOST, "hook", str(tmp_path / "none")], check=False, capture_output=True).returncode
