"""A user's own checkout of a package that trials use: where the package lies in it, and the hash of its files. Torch-free."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from bench.errors import UserError


def package_folder(checkout: Path, package: str) -> Path:
    """The folder of `package` in a checkout, or the checkout itself where that is the package. Raises UserError."""
    if not checkout.exists():
        raise UserError(
            f"overlay of {package}: there is no such path; seen: {checkout}; a checkout with the folder {package}/ would be right"
        )
    for folder in (checkout / package, checkout):
        if folder.name == package and (folder / "__init__.py").is_file():
            return folder
    raise UserError(
        f"overlay of {package}: not a package folder; seen: {checkout} without {package}/__init__.py; a checkout of {package}, or its "
        f"folder {package}/, would be right"
    )


def tree_sha256(folder: Path) -> str:
    """sha256 over names and contents of a package's files, byte code left out, links read as what they point to. Raises UserError."""
    digest = hashlib.sha256()
    for name in sorted(_files(folder)):
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise UserError(
                f"{folder / name}: a file of an overlay cannot be read; seen: {error}; a complete checkout would be right"
            ) from None
        digest.update(f"{name}\n{hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[str]:
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(place)
        _refuse_cycles(here, folders)
        folders[:] = [name for name in folders if name != "__pycache__"]
        yield from ((here / name).relative_to(folder).as_posix() for name in names if not name.endswith(".pyc"))


def _refuse_cycles(here: Path, folders: list[str]) -> None:
    for name in folders:
        target = (here / name).resolve()
        if (here / name).is_symlink() and here.resolve().is_relative_to(target):
            raise UserError(
                f"{here / name}: a link of an overlay points to a folder that it lies in; seen: {target}; no such link would be right"
            )
