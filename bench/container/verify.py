"""Is an image what its name, its note and the committed digest say? Torch-free."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

from bench.container.build import Built
from bench.container.images import Image, committed
from bench.container.inputs import build_inputs, differences
from bench.container.tools import require, run
from bench.data.cache import sha256_of
from bench.errors import UserError

COMMIT_ADVICE = "coati-bench container build {name} --commit"


def verify(image: Image, built: Built) -> list[str]:
    """What speaks against this build, in sentences; empty if it is the committed image."""
    before = committed(image.name)
    if before is None:
        return [f"{image.name}: no digest is committed; {COMMIT_ADVICE.format(name=image.name)} commits one"]
    if before["digest"] == built.environment_digest:
        return []
    changed = [str(item) for item in differences(before["inputs"], built.inputs)]
    why = (
        f"inputs differ: {'; '.join(changed)}"
        if changed
        else "no input differs, so the build is not reproducible here (other versions of its tools?)"
    )
    return [f"{image.name}: another digest; seen: {built.environment_digest}; {before['digest']} is committed; {why}"]


def explain(image: Image) -> list[str]:
    """What decides the image, and what of it differs from the committed build; nothing is built."""
    now, before = build_inputs(image), committed(image.name)
    lines = [f"{image.name}: {image.description}"]
    lines += [f"  {name}: {value}" for name, value in sorted(now.items())]
    if before is None:
        return [*lines, "no digest is committed"]
    told = {key: value for key, value in before["inputs"].items() if key in now}
    changed = differences(told, now)
    return [
        *lines,
        f"committed digest: {before['digest']}",
        *([f"  differs: {item}" for item in changed] or ["nothing differs from the committed inputs"]),
    ]


def check_file(path: Path) -> dict[str, Any]:
    """The note of an image's file, after checking the file against it. Raises UserError for a changed, cut off or unknown file."""
    if not path.is_file():
        raise UserError(f"{path}: no such image; `coati-bench container build` makes one and says where")
    note_path = path.parent / (path.name.split(".")[0] + ".json")
    if not note_path.exists():
        raise UserError(f"{path}: {note_path.name} is not beside it, so nothing says what it should be; bring both files")
    note = json.loads(note_path.read_text(encoding="utf-8"))
    wanted, seen = note["sha256"].get(path.name), sha256_of(path)
    if seen != wanted:
        raise UserError(f"{path}: not the image that was built; seen: sha256 {seen}; {wanted} would be right; bring or build it again")
    if note["digest"].removeprefix("sha256:")[:12] not in path.name:
        raise UserError(f"{path}: its name does not carry its digest; seen: {path.name}; {note['digest']}")
    return note


def archive_digest(path: Path) -> str:
    """The manifest digest inside an OCI archive. Raises UserError."""
    try:
        with tarfile.open(path) as tar:
            member = tar.extractfile("index.json")
            assert member is not None
            (entry,) = json.load(member)["manifests"]
            return str(entry["digest"])
    except (tarfile.TarError, KeyError, ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: no OCI archive; {error}; one of `container build --archive` would be right") from None


def source_inside(squashfs: Path) -> str:
    """sha256 of the package that a squashfs image holds. Raises MachineError."""
    require("unsquashfs")
    return run(["unsquashfs", "-cat", str(squashfs), "opt/coati-bench/source.sha256"], what="package inside the image").strip()
