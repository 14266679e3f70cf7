"""Is an image what its name, its note and the committed digest say? Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.container.build import HOME, NONE, SOURCE_FILE, Built
from bench.container.images import Image, committed
from bench.container.inputs import build_inputs, differences, kernel_inputs
from bench.container.tools import require, run
from bench.data.cache import sha256_of
from bench.errors import UserError
from bench.measure.provenance import short_digest

NO_KERNELS = (
    "ColossalAI's kernels (HybridAdam's; gemini and `optimizer: hybrid` on CUDA need them) are not in it: no compiler of its CUDA is locked"
)
UNEXPLAINED = "no input differs, so the build is not reproducible here (other versions of its tools?)"
COMMIT_ADVICE = "coati-bench container build {name} --commit"


def verify(image: Image, built: Built) -> list[str]:
    """What speaks against this build, in sentences; empty if its environment and its kernels are the committed ones."""
    before = committed(image.name)
    if before is None:
        return [f"{image.name}: no digest is committed; {COMMIT_ADVICE.format(name=image.name)} commits one"]
    problems = compared(f"{image.name}: another digest", before, built.environment_digest, built.inputs)
    if built.kernels:
        problems += compared(f"{image.name}: other kernels", kernels_of(before), built.kernels.digest, built.kernels.inputs)
    return problems


def compared(what: str, before: Mapping[str, Any], digest: str, inputs: dict[str, str]) -> list[str]:
    """The sentence on a digest that is not the committed one, and on the inputs that differ; empty if it is."""
    if before["digest"] == digest:
        return []
    changed = [str(item) for item in differences(before["inputs"], inputs)]
    why = f"inputs differ: {'; '.join(changed)}" if changed else UNEXPLAINED
    return [f"{what}; seen: {digest}; {before['digest']} is committed; {why}"]


def check_committed(file: Path, note: Mapping[str, Any]) -> None:
    """Raise UserError, naming the inputs that differ, unless the note's environment and kernels are the committed ones."""
    before = committed(note["image"])
    if before is None:
        raise UserError(
            f"{file}: no digest is committed for the image {note['image']!r}; seen: {note['environment_digest']}; "
            f"{COMMIT_ADVICE.format(name=note['image'])} commits one"
        )
    problems = compared("its environment is not the committed one", before, note["environment_digest"], note["inputs"])
    kernels = kernels_of(note)
    problems += compared("its kernels are not the committed ones", kernels_of(before), kernels["digest"], kernels["inputs"])
    if problems:
        raise UserError(f"{file}: {'. '.join(problems)}")


def is_committed(note: Mapping[str, Any]) -> bool:
    """Whether a note's environment is the committed one."""
    before = committed(note["image"])
    return before is not None and bool(before["digest"] == note["environment_digest"])


def kernels_of(build: Mapping[str, Any]) -> dict[str, Any]:
    """Digest and inputs of the kernels of a build, as a note or a committed digest has them; `none` without any."""
    return build.get("kernels") or {"digest": NONE, "inputs": {}}


def explain(image: Image) -> list[str]:
    """What decides the image, and what of it differs from the committed build; nothing is built."""
    before = committed(image.name)
    lines = [f"{image.name}: {image.description}", *explained(build_inputs(image), before, "digest")]
    if image.compiler:
        return [
            *lines,
            "ColossalAI's kernels, compiled into it:",
            *explained(kernel_inputs(image), (before or {}).get("kernels"), "kernels"),
        ]
    if image.cuda:
        return [*lines, NO_KERNELS]
    return lines


def explained(now: dict[str, str], before: Mapping[str, Any] | None, what: str) -> list[str]:
    """Inputs, the committed digest, and the inputs that differ from its own."""
    lines = [f"  {name}: {value}" for name, value in sorted(now.items())]
    if before is None:
        return [*lines, f"no {what} committed"]
    changed = differences({key: value for key, value in before["inputs"].items() if key in now}, now)
    return [
        *lines,
        f"committed {what}: {before['digest']}",
        *([f"  differs: {item}" for item in changed] or ["nothing differs from the committed inputs"]),
    ]


def load_note(path: Path) -> dict[str, Any]:
    """The note of an image's file, which is not read. Raises UserError where one of them is missing."""
    if not path.is_file():
        raise UserError(f"{path}: no such image; `coati-bench container build` makes one and says where")
    note_path = path.parent / (path.name.split(".")[0] + ".json")
    if not note_path.exists():
        raise UserError(f"{path}: {note_path.name} is not beside it, so nothing says what it should be; bring both files")
    note: dict[str, Any] = json.loads(note_path.read_text(encoding="utf-8"))
    return note


def check_file(path: Path) -> dict[str, Any]:
    """The note of an image's file, after checking the file against it. Raises UserError for a changed, cut off or unknown file."""
    note = load_note(path)
    wanted, seen = note["sha256"].get(path.name), sha256_of(path)
    if seen != wanted:
        raise UserError(f"{path}: not the image that was built; seen: sha256 {seen}; {wanted} would be right; bring or build it again")
    if short_digest(note["digest"]) not in path.name:
        raise UserError(f"{path}: its name does not carry its digest; seen: {path.name}; {note['digest']}")
    return note


def source_inside(squashfs: Path) -> str:
    """sha256 of the package that a squashfs image holds. Raises MachineError."""
    require("unsquashfs")
    return run(["unsquashfs", "-cat", str(squashfs), str(HOME / SOURCE_FILE)], what="package inside the image").strip()
