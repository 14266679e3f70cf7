"""A user's own checkout in the place of an installed package (setting `overlay`). Torch-free.

Ranks see a copy, kept in the cache under the hash of its files, never the checkout itself: an edit during a run changes no trial, the
copy holds the package and nothing else of the checkout, and links that leave the package are files in it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bench.checkout import package_folder, tree_sha256
from bench.errors import MachineError
from bench.layout import cache_folder
from bench.record import Input

if TYPE_CHECKING:
    from bench.cell import Cell
    from bench.trial import Trial

PACKAGE = "colossalai"
SITE_PACKAGES = Path("/opt/venv/lib/python3.11/site-packages")
"""Where the images keep packages: all are Debian 12 with its Python."""


def overlay_input(cell: Cell) -> Input | None:
    """The copy of the checkout that the cell's ranks import, or None. Raises UserError for what is no package folder."""
    overlay = cell.settings.overlay
    if overlay is None:
        return None
    folder = package_folder(Path(overlay.colossalai).expanduser().absolute(), PACKAGE)
    digest = tree_sha256(folder)
    return Input(name=f"overlay:{PACKAGE}", path=str(_copy(folder, digest)), sha256=digest, facts={"package": PACKAGE})


def overlaid(trial: Trial, environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` in which the trial's overlay, if it has one, is imported first."""
    if trial.overlay is None:
        return dict(environment)
    path = [trial.overlay.path, environment.get("PYTHONPATH", "")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def _copy(folder: Path, digest: str) -> Path:
    """A folder that holds a copy of the package `folder`, made once for each hash; one that was changed since is made anew."""
    place = cache_folder() / "overlays" / digest
    if place.exists():
        if tree_sha256(place / PACKAGE) == digest:
            return place
        shutil.rmtree(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as made:
        new = Path(made) / "new"
        shutil.copytree(folder, new / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        if tree_sha256(new / PACKAGE) != digest:
            raise MachineError(f"{folder}: was changed while it was copied; a checkout that nobody edits meanwhile would be right")
        try:
            new.rename(place)
        except OSError:
            if not place.exists():  # else another trial was first, with the same content
                raise
    return place
