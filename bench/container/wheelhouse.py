"""Folders of the locked wheels and sources, every file checked against its hash. Torch-free.

pip fetches, from wherever it is configured to (a registry, a mirror, a folder), and refuses what the lock does not name.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path

from bench.container.images import Image
from bench.container.inputs import text_digest
from bench.container.requirements import compiler_requirements, source_requirements, wheel_requirements
from bench.container.tools import run
from bench.data.cache import sha256_of
from bench.errors import MachineError, UserError

_OLD = ("manylinux2014_x86_64", "manylinux1_x86_64", "linux_x86_64")
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)), *_OLD)
"""What the C library of Debian 12 and of anything newer runs: pip matches each name exactly."""

DONE = "complete"


def image_wheelhouse(image: Image, folder: Path) -> Path:
    """The wheels and sources of `image` under `folder`, fetched if they are not there yet; the path names their locks."""
    return filled(image.name, wheel_requirements(image), source_requirements(image), folder)


def compiler_wheelhouse(image: Image, folder: Path) -> Path:
    """The wheels of the compiler that the image's kernels are made with, likewise."""
    return filled(f"{image.name}-compiler", compiler_requirements(image), "", folder)


def filled(name: str, wheels: str, sources: str, folder: Path) -> Path:
    """A folder with what these hashed requirements name, fetched if it is not there yet. Raises MachineError, also for changed files."""
    house = folder / f"{name}-{text_digest(wheels + sources)[:12]}"
    if (house / DONE).exists():
        check_house(house, wheels + sources)
    else:
        house.mkdir(parents=True, exist_ok=True)
        fetch(wheels, house, python="3.11", what=f"fetching the locked wheels, {name}")
        if sources:
            fetch(sources, house, python=None, what=f"fetching the locked sources, {name}")
        (house / DONE).touch()
    return house


def check_house(house: Path, requirements: str) -> None:
    """Raise MachineError if a file that was fetched is none of those that the requirements name; the next build fetches what is gone."""
    locked = set(re.findall(r"--hash=sha256:(\w+)", requirements))
    for path in sorted(house.iterdir()):
        if path.name != DONE and (seen := sha256_of(path)) not in locked:
            (house / DONE).unlink()
            raise MachineError(
                f"{path}: not a locked file; seen: sha256 {seen}, which no lock names; remove it, and the next build fetches it again"
            )


def fetch(requirements: str, house: Path, *, python: str | None, what: str) -> None:
    """Let pip fetch hashed requirements into `house`: wheels for CPython `python`, or sources if None. Raises MachineError."""
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch) / "requirements.txt"
        listed.write_text(requirements, encoding="utf-8")
        command = [
            sys.executable, "-m", "pip", "download", "-q", "--no-cache-dir", "--no-deps", "--require-hashes",
            "-r", str(listed), "-d", str(house),
        ]  # fmt: skip
        if python is None:
            command += ["--no-binary", ":all:", "--no-build-isolation"]
        else:
            command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python]
            command += [word for platform in PLATFORMS for word in ("--platform", platform)]
        run(command, what=what)


def make_wheelhouse(image: Image, output: Path, *, python: str, cache: Path) -> Path:
    """Every wheel that `image` needs, sources built, and a hashed requirements.txt for `pip install --no-index`, in `output`.

    For hosts without a network whose Python is `python` ("3.12"). Raises UserError if `output` has something in it, or if a source has
    compiled code, which is built for the Python that runs here, and that is another.
    """
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output}: not empty; seen: {len(list(output.iterdir()))} entries; a new folder would be right")
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        house = Path(scratch) / "wheelhouse"
        house.mkdir()
        fetch(wheel_requirements(image), house, python=python, what=f"fetching the locked wheels for CPython {python}")
        build_sources(image, house)
        check_tags(house, python)
        (house / "requirements.txt").write_text(requirements_of(house), encoding="utf-8")
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists():
            output.rmdir()
        shutil.move(house, output)
    return output


def build_sources(image: Image, house: Path) -> None:
    """Build the image's sources as wheels, without isolation: this environment's locked setuptools builds them."""
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch) / "sources.txt"
        listed.write_text(source_requirements(image), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--require-hashes", "-r", str(listed)]
        run([*command, "-w", str(house)], what="building wheels of the sources", environment={"SOURCE_DATE_EPOCH": str(image.epoch)})


def check_tags(house: Path, python: str) -> None:
    """Raise UserError, naming it, if a wheel is for another CPython than `python`, as one that was built here of compiled code may be."""
    wanted = f"cp{python.replace('.', '')}"
    for wheel in sorted(house.glob("*.whl")):
        _, interpreter, abi, _ = wheel.stem.rsplit("-", 3)
        if interpreter.startswith("cp") and abi != "abi3" and wanted not in interpreter.split("."):
            raise UserError(
                f"{wheel.name}: built here from source, for another Python; seen: {interpreter}; {wanted} would be right: the same command "
                f"under CPython {python}"
            )


def requirements_of(house: Path) -> str:
    """A hashed requirement file of the wheels in a folder."""
    lines = []
    for wheel in sorted(house.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        lines.append(f"{name.replace('_', '-')}=={version} --hash=sha256:{sha256_of(wheel)}\n")
    return "".join(lines)
