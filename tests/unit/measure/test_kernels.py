"""Kernels count only where this torch and this ColossalAI would load them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from bench.measure import kernels
from bench.measure.kernels import HYBRID_ADAM, KERNEL_CACHE, kernels_here, not_built, package_folder


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that ColossalAI would compile into under CUDA 13.0, with one kernel and its build's rest."""
    monkeypatch.setattr(kernels, "versions", lambda: {"torch": "2.11.0+cu130"})
    package = hashlib.sha256(str(tmp_path / "colossalai" / "__init__.py").encode()).hexdigest()
    folder = tmp_path / "home" / KERNEL_CACHE / f"torch2.11_cuda-13.0-{package}"
    folder.mkdir(parents=True)
    for name in ("fused_optim_cuda.so", "build.ninja", "cpu_adam.o"):
        (folder / name).touch()
    return folder


def seen(tmp_path: Path) -> list[str]:
    return kernels_here(tmp_path / "home", tmp_path / "colossalai")


def test_compiled_ones_of_this_torch_and_package_count(compiled: Path, tmp_path: Path) -> None:
    assert seen(tmp_path) == ["fused_optim_cuda"]
    assert not_built(seen(tmp_path)) == [HYBRID_ADAM[0]]


def test_those_of_another_torch_or_package_do_not(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_here(tmp_path / "home", tmp_path / "other" / "colossalai") == []
    monkeypatch.setattr(kernels, "versions", lambda: {"torch": "2.5.1+cu124"})
    assert seen(tmp_path) == []


def test_prebuilt_ones_of_the_package_count(compiled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "colossalai" / "_C"
    folder.mkdir(parents=True)
    (folder / f"{HYBRID_ADAM[0]}.cpython-311-x86_64-linux-gnu.so").touch()
    assert not_built(seen(tmp_path)) == []


def test_the_folder_is_where_colossalai_puts_it() -> None:
    """Its own words: the hash is that of the path of its `__init__.py`."""
    source = (package_folder() / "kernel/extensions/base_extension.py").read_text(encoding="utf-8")
    assert "hashlib.sha256(colossalai.__file__.encode()).hexdigest()" in source
    assert str(KERNEL_CACHE) in source
    assert "/torch{torch_version_major}.{torch_version_minor}_{device_name}-{device_version}-{hash_suffix}" in source
