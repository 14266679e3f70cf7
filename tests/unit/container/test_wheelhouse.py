"""Wheels for hosts without a network: pip itself, with a folder of this test in the place of a registry."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.container import wheelhouse
from bench.container.commands import wheelhouse as verb
from bench.container.images import image_named
from bench.container.wheelhouse import filled, make_wheelhouse
from bench.data.cache import sha256_of
from bench.errors import MachineError, UserError

IMAGE = image_named("cpu")
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
OTHER = "3.12" if HERE != "3.12" else "3.11"
PURE = "from setuptools import setup\nsetup(name='fromsource', version='1.0', py_modules=['fromsource'])\n"
COMPILED = f"from setuptools import Distribution\nDistribution.has_ext_modules = lambda self: True\n{PURE}"
"""What setuptools takes for a package with compiled code."""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip fetches from, and nothing else, with a wheel in it."""
    folder = tmp_path / "shop"
    folder.mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": "/dev/null", "DISABLE_PIP_VERSION_CHECK": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with zipfile.ZipFile(folder / "ready-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("ready.py", "answer = 1\n")
        wheel.writestr("ready-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: ready\nVersion: 1.0\n")
        wheel.writestr("ready-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("ready-1.0.dist-info/RECORD", "ready.py,,\n")
    return folder


def locked(file: Path, name: str) -> str:
    return f"{name}==1.0 \\\n    --hash=sha256:{sha256_of(file)}\n"


@pytest.fixture
def locks(shop: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the image's locks be those of the wheel and of a source with this setup.py."""

    def lock(setup: str) -> None:
        sdist = shop / "fromsource-1.0.tar.gz"
        files = {"setup.py": setup, "fromsource.py": "answer = 2\n", "PKG-INFO": "Metadata-Version: 2.1\nName: fromsource\nVersion: 1.0\n"}
        with tarfile.open(sdist, "w:gz") as tar:
            for name, text in files.items():
                info = tarfile.TarInfo(f"fromsource-1.0/{name}")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
        monkeypatch.setattr(wheelhouse, "wheel_requirements", lambda _: locked(shop / "ready-1.0-py3-none-any.whl", "ready"))
        monkeypatch.setattr(wheelhouse, "source_requirements", lambda _: locked(sdist, "fromsource"))

    return lock


def test_what_was_fetched_and_built_is_installed_without_an_index(
    tmp_path: Path, locks: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    locks(PURE)
    house = make_wheelhouse(IMAGE, tmp_path / "house", python=OTHER, cache=tmp_path)
    names = {path.name for path in house.iterdir()}
    assert names == {"ready-1.0-py3-none-any.whl", "fromsource-1.0-py3-none-any.whl", "requirements.txt"}
    monkeypatch.delenv("PIP_FIND_LINKS")
    words = ["--no-index", "--no-deps", "--require-hashes", "--find-links", str(house), "-r", str(house / "requirements.txt")]
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(tmp_path / "installed"), *words]
    subprocess.run(install, check=True, capture_output=True)
    script = "import ready, fromsource; print(ready.answer, fromsource.answer)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "installed", capture_output=True, text=True, check=True)
    assert done.stdout == "1 2\n"


def test_compiled_code_is_refused_for_another_python_than_the_one_that_builds_it(tmp_path: Path, locks: Callable[[str], None]) -> None:
    locks(COMPILED)
    here, other = f"cp{HERE.replace('.', '')}", f"cp{OTHER.replace('.', '')}"
    wanted = (
        rf"^fromsource-1\.0-{here}-.*: built here from source, for another Python; seen: {here}; {other} would be right: .* CPython {OTHER}"
    )
    with pytest.raises(UserError, match=wanted):
        make_wheelhouse(IMAGE, tmp_path / "house", python=OTHER, cache=tmp_path)
    assert not (tmp_path / "house").exists()
    assert list(make_wheelhouse(IMAGE, tmp_path / "house", python=HERE, cache=tmp_path).glob(f"fromsource-1.0-{here}-*.whl"))


def test_a_file_that_is_not_the_locked_one_is_not_fetched(tmp_path: Path, shop: Path) -> None:
    lock = locked(shop / "ready-1.0-py3-none-any.whl", "ready")
    with zipfile.ZipFile(shop / "ready-1.0-py3-none-any.whl", "a") as wheel:
        wheel.writestr("more.py", "")
    with pytest.raises(
        MachineError, match=r"^fetching the locked wheels, cpu: a file is not the locked one: it, or the lock, was changed; seen: "
    ):
        filled("cpu", lock, "", tmp_path / "houses")


def test_the_verb_says_how_to_install_it_and_where_this_package_comes_from(
    tmp_path: Path, locks: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    locks(PURE)
    verb(tmp_path / "house", image="cpu", python=HERE, cache=tmp_path)
    said = capsys.readouterr().out
    assert "house: 2 wheels, " in said
    assert "  python -m pip install --no-index --no-deps --require-hashes --find-links house -r house/requirements.txt\n" in said
    assert said.endswith("with a copy of the checkout there:\n  PYTHONPATH=CHECKOUT python -m bench doctor\n")
