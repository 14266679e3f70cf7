"""A real squashfs is looked into: what the locks name must be there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bench.container.contents import check_contents
from bench.container.images import image_named
from bench.container.requirements import read_lock, source_requirements, wheel_requirements
from bench.errors import MachineError

pytestmark = pytest.mark.skipif(not (shutil.which("mksquashfs") and shutil.which("unsquashfs")), reason="squashfs-tools are not here")
IMAGE = image_named("upstream")


def squashfs(folder: Path, without: str = "", version: str | None = None) -> Path:
    """An image file with the metadata folders of all locked packages but one, or with that one in another version."""
    site = folder / "root" / "opt/venv/lib/python3.11/site-packages"
    for item in read_lock(wheel_requirements(IMAGE)) + read_lock(source_requirements(IMAGE)):
        seen = version if item.name == without else item.version
        if seen is not None:
            (site / f"{item.name.replace('-', '_')}-{seen}.dist-info").mkdir(parents=True)
    file = folder / "image.sqfs"
    subprocess.run(["mksquashfs", str(folder / "root"), str(file), "-quiet", "-no-progress"], check=True, capture_output=True)
    return file


def test_an_image_with_all_that_is_locked_is_whole(tmp_path: Path) -> None:
    check_contents(IMAGE, squashfs(tmp_path))


@pytest.mark.parametrize("version", [None, "2.11.0"])
def test_a_package_that_is_missing_or_another_version_is_named(tmp_path: Path, version: str | None) -> None:
    with pytest.raises(MachineError, match=r"image.sqfs: 1 of \d+ locked packages are not in the image; missing: torch==2.5.1; the output"):
        check_contents(IMAGE, squashfs(tmp_path, "torch", version))


def test_what_is_no_squashfs_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.sqfs").write_bytes(b"no")
    with pytest.raises(MachineError, match="cannot be listed"):
        check_contents(IMAGE, tmp_path / "x.sqfs")
