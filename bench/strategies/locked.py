"""What an image holds, by the locks that it is made from: a plan is judged by the environment in which its trials will run. Torch-free."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

SOURCE_TREE = Path(__file__).resolve().parents[2]
CPU_BY_CUDA = {"locks": ["cpu.lock", "cpu-torch-cuda.lock"], "sources": "sdist.lock", "cuda": "13.0"}
"""An environment that no image has: `cpu` where pip finds no CPU build of its torch."""
EXTRAS = ("deepspeed.lock", "fabric.lock")
_LOCKED = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)


def image_name(container: str) -> str | None:
    """The image behind a cell's `container`: its name in containers/images.toml, or that in the note beside an image's file.

    None for `none`, and where it cannot be told.

    >>> image_name("current"), image_name("none"), image_name("/nowhere/x.sqfs")
    ('current', None, None)
    """
    name = container
    if container.endswith((".sqfs", ".oci.tar")):
        file = Path(container).expanduser()
        try:
            name = str(json.loads((file.parent / f"{file.name.split('.')[0]}.json").read_text(encoding="utf-8"))["image"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
    return name if name in _images() else None


def holds_kernels(image: str) -> bool:
    """Whether ColossalAI's kernels were compiled into an image of containers/images.toml."""
    return "compiler" in _images()[image]


def locked_versions(image: str) -> dict[str, str]:
    """Package -> version in an image of containers/images.toml."""
    return _read(_locks(_images()[image]))


def not_locked(versions: Mapping[str, str | None]) -> dict[str, str]:
    """Packages that are in another version than the locks have, and the two versions. The locks are those that fit best.

    >>> not_locked({"python": "3.11.2", "torch": "2.11.0", "transformers": "4.51.3", "peft": "0.1", "cuda": "13.0"})
    {'peft': '0.1, locked 0.13.2'}
    """
    environments = (*_images().values(), CPU_BY_CUDA)
    found = [(_other_than((*_locks(it), *EXTRAS), versions), it.get("cuda") != versions.get("cuda")) for it in environments]
    return min(found, key=lambda pair: (len(pair[0]), pair[1]))[0]


def _other_than(locks: tuple[str, ...], versions: Mapping[str, str | None]) -> dict[str, str]:
    locked = _read(locks)
    both = {package: (seen, locked[package]) for package, seen in sorted(versions.items()) if seen and package in locked}
    return {package: f"{seen}, locked {right}" for package, (seen, right) in both.items() if seen != right}


def _locks(environment: Mapping[str, Any]) -> tuple[str, ...]:
    return (*environment["locks"], environment["sources"])


@cache
def _images() -> dict[str, dict[str, Any]]:
    return dict(tomllib.loads((SOURCE_TREE / "containers" / "images.toml").read_text(encoding="utf-8"))["images"])


@cache
def _read(locks: tuple[str, ...]) -> dict[str, str]:
    texts = [(SOURCE_TREE / "envs" / lock).read_text(encoding="utf-8") for lock in locks]
    return {name: version for text in texts for name, version in _LOCKED.findall(text)}
