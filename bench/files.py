"""Files of which a reader sees the old ones or the new ones, never half of them. Torch-free."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from bench.errors import MachineError, UserError


def write_whole(files: Mapping[Path, str | bytes]) -> None:
    """Write some files: first all of them beside their places, then each into its place; folders are made.

    What is there and no regular file (a pipe, /dev/stdout) is written through. Raises UserError where a folder stands in the way of a file
    or a file in that of a folder, MachineError where the disk refuses; the old files are whole then.
    """
    places, drafts = {_place_of(path): content for path, content in files.items()}, dict[Path, Path]()
    try:
        for place, content in places.items():
            if place.exists() and not place.is_file():
                _write(place, content)
            else:
                drafts[place] = _draft(place, content)
        for place, draft in drafts.items():
            draft.replace(place)
    except OSError as error:
        raise MachineError(f"{place}: cannot be written; seen: {error.strerror}; what was there before is whole") from None
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def _place_of(path: Path) -> Path:
    """Where a link leads, in a folder that is there."""
    place = path.resolve() if path.is_symlink() else path
    if place.is_dir():
        raise UserError(f"{path}: cannot be written; seen: a folder; the name of a file would be right")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{place.parent}: cannot be a folder; seen: a file; the name of a folder would be right") from None
    return place


def replace(place: Path, content: str | bytes) -> None:
    """Put a file in the place of what is there, in one step. Raises OSError; what was there before is whole then."""
    draft = _draft(place, content)
    try:
        draft.replace(place)
    except BaseException:
        draft.unlink()
        raise


def _draft(place: Path, content: str | bytes) -> Path:
    """A file of this content beside `place`, on the disk."""
    handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name[:100]}.")
    draft = Path(name)
    try:
        _write(draft, content)
        os.fsync(handle)
        draft.chmod(0o644)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)
    return draft


def _write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
