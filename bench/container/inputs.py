"""What decides an image, as hashes: the same inputs give the same digest. Torch-free."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from bench.cell import canonical_json
from bench.container.images import BOOTSTRAP_OPTIONS, DEFINITIONS, LAYER_OPTIONS, SOURCE_TREE, Image
from bench.container.requirements import compiler_requirements, source_requirements, wheel_requirements

PACKAGE = ("bench",)
"""What of the source tree goes into the image."""

KERNEL_FILES = ("kernels.sh", "compile_kernels.py")
"""What of containers/ says how kernels are compiled."""


class Difference(NamedTuple):
    """One input that is not what it was."""

    name: str
    before: str | None
    now: str | None

    def __str__(self) -> str:
        return f"{self.name}: {(self.before or 'absent')[:12]} -> {(self.now or 'absent')[:12]}"


def text_digest(text: str) -> str:
    """sha256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def build_inputs(image: Image) -> dict[str, str]:
    """Name -> sha256 of everything that decides the environment image, but for the root file system's own bytes."""
    return {
        "configuration": text_digest((DEFINITIONS / "configuration.json").read_text(encoding="utf-8")),
        "environment.sh": text_digest((DEFINITIONS / "environment.sh").read_text(encoding="utf-8")),
        "environment script": text_digest((DEFINITIONS / "90-environment.sh").read_text(encoding="utf-8")),
        "epoch": text_digest(str(image.epoch)),
        "layers": text_digest(canonical_json(LAYER_OPTIONS)),
        "packages of the system": text_digest(canonical_json([image.rootfs.release, sorted(image.rootfs.packages), BOOTSTRAP_OPTIONS])),
        "sources": text_digest(source_requirements(image)),
        "wheels": text_digest(wheel_requirements(image)),
    }


def kernel_inputs(image: Image) -> dict[str, str]:
    """Name -> sha256 of everything that decides the image's compiled kernels; empty without kernels."""
    if image.compiler is None:
        return {}
    texts = {name: (DEFINITIONS / name).read_text(encoding="utf-8") for name in KERNEL_FILES}
    return {
        **{name: text_digest(text) for name, text in texts.items()},
        "architectures": text_digest(canonical_json(list(image.architectures))),
        "compiler": text_digest(compiler_requirements(image)),
        "environment": text_digest(canonical_json(build_inputs(image))),
    }


def differences(before: dict[str, str], now: dict[str, str]) -> list[Difference]:
    """Inputs that differ, by name.

    >>> [str(it) for it in differences({"epoch": "a", "wheels": "b"}, {"epoch": "a", "wheels": "c"})]
    ['wheels: b -> c']
    """
    return [Difference(name, before.get(name), now.get(name)) for name in sorted({*before, *now}) if before.get(name) != now.get(name)]


def package_files(folder: Path | None = None) -> list[Path]:
    """The package's files, relative to the source tree or to the copy in `folder`, in order."""
    root = folder or SOURCE_TREE
    found = (path for name in PACKAGE for path in (root / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(path.relative_to(root) for path in found)


def package_digest(folder: Path | None = None) -> str:
    """sha256 over names and contents of the package's files: of the source tree, or of a copy in `folder`."""
    digest = hashlib.sha256()
    for path in package_files(folder):
        content = ((folder or SOURCE_TREE) / path).read_bytes()
        digest.update(f"{path.as_posix()}\n{hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()
