"""What of the locks an image needs: all that the package asks for, without its developers' tools. Torch-free."""

from __future__ import annotations

import re
import tomllib
from typing import NamedTuple

from bench.container.images import SOURCE_TREE, Image

_HEAD = re.compile(r"([A-Za-z0-9._-]+)==(\S+)")
BUILD_TOOLS = frozenset({"setuptools", "wheel"})
"""What sources are built with."""


class Locked(NamedTuple):
    """One requirement of a lock, as it stands there."""

    name: str
    version: str
    text: str
    """Its lines: name, version, hashes."""
    via: frozenset[str]
    """Who asks for it."""


def wheel_requirements(image: Image) -> str:
    """The hashed requirement file of the image's wheels."""
    locked = [item for lock in image.locks for item in lock_named(lock)]
    wanted = needed(locked, frozenset(item.name for item in lock_named(image.sources)))
    return "".join(f"{item.text}\n" for item in sorted(locked) if item.name in wanted)


def source_requirements(image: Image) -> str:
    """The hashed requirement file of what the image builds from source."""
    return "".join(f"{item.text}\n" for item in sorted(lock_named(image.sources)))


def compiler_requirements(image: Image) -> str:
    """The hashed requirement file of the CUDA compiler that the image's kernels are made with; empty without kernels."""
    return "".join(f"{item.text}\n" for item in sorted(lock_named(image.compiler))) if image.compiler else ""


def image_packages(image: Image) -> list[Locked]:
    """All Python packages of the image: its wheels, then what it builds from source."""
    return [*read_lock(wheel_requirements(image)), *lock_named(image.sources)]


def lock_named(name: str) -> list[Locked]:
    """The requirements of a lock in envs/."""
    return read_lock((SOURCE_TREE / "envs" / name).read_text(encoding="utf-8"))


def read_lock(text: str) -> list[Locked]:
    r"""The requirements of a lock that envs/lock.py wrote.

    >>> read_lock("# cpu\nsix==1.17.0 \\\n    --hash=sha256:aa\n    # via coati-bench, torch\n")[0].text
    'six==1.17.0 \\\n    --hash=sha256:aa'
    """
    items = []
    for chunk in re.split(r"\n(?=[A-Za-z0-9])", text.strip()):
        if head := _HEAD.match(chunk):
            lines, _, via = chunk.partition("\n    # via ")
            items.append(Locked(head[1], head[2], lines.strip(), frozenset(via.strip().split(", "))))
    return items


def needed(locked: list[Locked], sources: frozenset[str]) -> set[str]:
    """Names that the package itself needs, directly, through others or through its `sources`, and what builds sources."""
    listed = tomllib.loads((SOURCE_TREE / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    roots = {re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0].lower() for line in listed} | BUILD_TOOLS
    found = {item.name for item in locked if item.name in roots}
    while more := {item.name for item in locked if item.name not in found and item.via & (found | sources)}:
        found |= more
    return found
