"""Is every locked package in a squashfs, in its version? An installer's failure must not leave half an image. Torch-free."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from bench.container.images import Image
from bench.container.requirements import image_packages
from bench.errors import MachineError

_INSTALLED = re.compile(r"/site-packages/([^/]+?)-([^/-]+)\.(?:dist|egg)-info$", re.MULTILINE)


def check_contents(image: Image, squashfs: Path) -> None:
    """Raise MachineError, naming what is missing, unless all that the image's locks name was installed."""
    locked = {(plain(item.name), plain(item.version)) for item in image_packages(image)}
    absent = sorted(f"{name}=={version}" for name, version in locked - installed(squashfs))
    if absent:
        some = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        raise MachineError(
            f"{squashfs.name}: {len(absent)} of {len(locked)} locked packages are not in the image; missing: {some}; the output of "
            "environment.sh says why"
        )


def installed(squashfs: Path) -> set[tuple[str, str]]:
    """(name, version) of the Python packages in a squashfs, in plain spelling."""
    command = ["unsquashfs", "-l", "-d", "", str(squashfs)]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode:
        raise MachineError(f"{squashfs}: cannot be listed; {done.stderr.strip()[-300:]}")
    return {(plain(name), plain(version)) for name, version in _INSTALLED.findall(done.stdout)}


def plain(word: str) -> str:
    """A name or version as it compares, whatever the spelling.

    >>> plain("Galore_Torch"), plain("2.5.1+CPU")
    ('galore-torch', '2.5.1+cpu')
    """
    return re.sub(r"[-_.]+", "-", word.lower()) if not word[:1].isdigit() else word.lower()
