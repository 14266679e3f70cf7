"""Where fetched data lies, who may write there, and what content is believed to be right. Torch-free."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.data.download import writing
from bench.data.manifest import Manifest
from bench.data.sources import Source
from bench.errors import DataError
from bench.layout import cache_folder, file_name
from bench.record import write_json

Say = Callable[[str], None]


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hex. Raises DataError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where one source's files lie in the cache."""

    path: Path

    def part(self, origin: str) -> Path:
        """What has arrived from `origin`; one file each, so that trying a mirror does not lose what another sent."""
        return self.path.with_name(f"{self.path.name}.{hashlib.sha256(origin.encode()).hexdigest()[:8]}.part")

    @property
    def parts(self) -> list[Path]:
        """All of them that exist."""
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.*.part"))

    @property
    def manifest(self) -> Path:
        """The manifest, beside the data."""
        return self.path.with_name(self.path.name + ".manifest.json")

    @property
    def unaccepted(self) -> Path:
        """Whole content whose hash was not the expected one, kept for `--accept-sha256`."""
        return self.path.with_name(self.path.name + ".unaccepted")

    @property
    def lock(self) -> Path:
        """What this cache has agreed to take for the source's content."""
        return self.path.parent.with_name(self.path.parent.name + ".lock.json")

    @property
    def guard(self) -> Path:
        """What a process that fetches holds a lock on."""
        return self.path.parent.with_name(self.path.parent.name + ".guard")


def slot_of(source: Source, cache: Path | None) -> Slot:
    """The place of `source` in `cache`."""
    stem = file_name(source.name)
    if source.base is not None:
        # Made from another set: two bases may differ only in letters that a path cannot have.
        stem = f"{file_name(Path(source.file_name).stem)}-{hashlib.sha256(source.base.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
    return Slot(path=cache_folder(cache) / stem / source.file_name)


@contextmanager
def alone(source: Source, slot: Slot, say: Say) -> Iterator[None]:
    """Keep other processes from fetching the same source meanwhile; the lock goes with the process, however it ends."""
    guard = slot.guard
    with writing(guard):
        slot.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(guard, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{source.name}: another process is fetching it; waiting (if it was on a host that is gone for good, remove {guard})")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _agreed(slot: Slot) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(slot.lock.read_text(encoding="utf-8"))
        bytes.fromhex(content["sha256"])
        return content
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{slot.lock}: not a lock of a data set; remove it to accept what the source serves next") from None


def judge(source: Source, slot: Slot, sha256: str, accept: str | None) -> str:
    """How `sha256` is known to be right. Raises DataError if it is not."""
    expected = source.sha256
    if source.sha256_verified and sha256 != expected:
        raise DataError(f"data {source.name!r}: wrong content: sha256 {sha256}; published is {expected}")
    if source.is_synthetic:
        return "generated"
    if source.sha256_verified:
        return "published"
    if accept is not None:
        if sha256 != accept:
            raise DataError(f"data {source.name!r}: wrong content: sha256 {sha256}; --accept-sha256 asked for {accept}")
        return "accepted by the user"
    if (agreed := _agreed(slot)) is not None:
        if sha256 != agreed["sha256"]:
            raise DataError(
                f"data {source.name!r}: not what was fetched before: sha256 {sha256}; {slot.lock} has {agreed['sha256']}"
                f" (from {agreed.get('url')}, {agreed.get('date')}); if the change is right, --accept-sha256 {sha256}"
            )
        return str(agreed.get("status", "locked at the first fetch"))
    if expected is None:
        return "locked at the first fetch"
    if sha256 != expected:
        raise DataError(
            f"data {source.name!r}: sha256 {sha256}; a mirror states {expected}, but upstream publishes none, so either may be the"
            f" true one; look at the file, and if it is right, --accept-sha256 {sha256}"
        )
    return "stated by a mirror"


def agree(source: Source, slot: Slot, manifest: Manifest) -> None:
    """Hold later fetches to this content, where the source itself does not."""
    if source.sha256_verified or source.is_synthetic:
        return
    agreed = {"sha256": manifest.sha256, "bytes": manifest.bytes, "url": manifest.source, "date": manifest.fetched}
    write_json({**agreed, "status": manifest.sha256_status}, slot.lock)
