"""Data onto this machine, checked: download, copy or generate, then hash, count rows, and only then give it its name.

What is there and verified is never fetched again, and the network is not touched for it. Torch-free.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.data import synthetic
from bench.data.cache import Say, Slot, agree, alone, judge, sha256_of, slot_of
from bench.data.download import AddressError, Patience, Progress, Unreachable, discard_part, download, writing
from bench.data.formats import read_rows
from bench.data.manifest import Manifest, describe, load_manifest, save_manifest
from bench.data.sources import Source, resolve
from bench.errors import BenchError, DataError, MachineError, UserError
from bench.layout import CACHE_VARIABLE, expanded

_log = logging.getLogger(__name__)


def fetch(
    name: str | Source,
    *,
    from_: str | None = None,
    cache: Path | None = None,
    folder: Path | None = None,
    accept_sha256: str | None = None,
    progress: Progress | None = None,
    say: Say = _log.info,
    patience: Patience = Patience(),  # noqa: B008 (frozen)
) -> Manifest:
    """Bring a data set onto this machine and return its manifest; there and verified already, nothing is done.

    `from_` is a file, a folder that holds the file, or the address of a mirror's folder, used instead of the source's
    addresses. A relative `file:` name is taken from `folder`. `accept_sha256` accepts that content where the source
    publishes no verified hash; it is recorded. `say` is told the licence before anything is fetched.
    Raises DataError (wrong content, unknown name), MachineError (no network, no space) or UserError.
    """
    source = name if isinstance(name, Source) else resolve(name, folder)
    if from_ is not None and (source.local_path is not None or (source.is_synthetic and source.base is None)):
        raise UserError(
            f"--from {from_}: data {source.name!r} is {'generated' if source.is_synthetic else 'a file of yours'}; leave --from out"
        )
    if (path := source.local_path) is not None:
        return describe(path, source, path=path, origin=str(path), sha256=sha256_of(path), sha256_status="file of the user")
    accept = _checked_sha256(accept_sha256)
    job = _Job(source=source, slot=slot_of(source, cache), from_=from_, accept=accept, progress=progress, say=say, patience=patience)
    base = None
    if source.base is not None:
        base = fetch(source.base, from_=from_, cache=cache, accept_sha256=accept, progress=progress, say=say, patience=patience)
    with alone(source, job.slot, say):
        return _present(job, base) or _obtain(job, base)


def verify(name: str | Source, *, cache: Path | None = None, folder: Path | None = None) -> Manifest:
    """The manifest of data that is here, hashed again. Raises DataError if it is missing or no longer what it was."""
    source = name if isinstance(name, Source) else resolve(name, folder)
    if source.local_path is not None:
        return fetch(source)
    slot = slot_of(source, cache)
    if not slot.path.exists() or not slot.manifest.exists():
        raise DataError(f"data {source.name!r} is not in {slot.path.parent}; `coati-bench data fetch {source.name}` brings it")
    manifest = load_manifest(slot.manifest)
    found = sha256_of(slot.path)
    if found != manifest.sha256:
        raise DataError(f"{slot.path}: has changed: sha256 {found}, at its fetching {manifest.sha256}; fetch it again")
    return manifest


def fetch_for_suite(target: Path, name: str, **options: Any) -> Manifest:
    """Fetch `name` and write its manifest to `target` (results/<suite>/data/<name>.json)."""
    manifest = fetch(name, **options)
    save_manifest(manifest, target)
    return manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One call of `fetch`."""

    source: Source
    slot: Slot
    from_: str | None
    accept: str | None
    progress: Progress | None
    say: Say
    patience: Patience


def _checked_sha256(given: str | None) -> str | None:
    if given is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", given):
        raise UserError(f"--accept-sha256 {given}: not a sha256; it has 64 hexadecimal digits")
    return given and given.lower()


# -- already here --------------------------------------------------------------------------------------------------


def _present(job: _Job, base: Manifest | None) -> Manifest | None:
    """The manifest of the file that is here, if it is verified; else None."""
    slot = job.slot
    if not slot.path.is_file():
        return None
    sha256 = sha256_of(slot.path)
    try:
        status = judge(job.source, job.slot, sha256, job.accept)
    except DataError as error:
        job.say(f"{slot.path}: is not what it should be ({error}); fetching it again")
        return None
    origin = str(slot.path)
    with suppress(DataError):
        manifest = load_manifest(slot.manifest)
        of_same_base = manifest.base_sha256 == (base.sha256 if base else None)
        if manifest.sha256 == sha256 and manifest.sha256_status == status and of_same_base:
            return manifest
        origin = manifest.source
    if base is not None or (job.source.sha256 is None and not slot.lock.exists()):
        return None
    return _settle(job, slot.path, origin, None)


# -- not here yet --------------------------------------------------------------------------------------------------


def _obtain(job: _Job, base: Manifest | None) -> Manifest:
    if job.source.is_synthetic:
        return _generate(job, base)
    job.say(f"{job.source.name}: {job.source.title}. Licence: {job.source.licence}")
    if (kept := _kept(job)) is not None:
        return kept
    if job.from_ is not None and not job.from_.startswith(("http://", "https://")):
        return _copy(job, job.from_)
    return _download(job)


def _generate(job: _Job, base: Manifest | None) -> Manifest:
    if base is None:
        content = synthetic.file_content(job.source.name)
    else:
        prompts = read_rows(Path(base.path), "prompts", rejected_share=1.0).rows
        content = synthetic.derived_content(job.source.name.rpartition("+")[2], prompts)
    origin = job.source.urls[0]
    part = job.slot.part(origin)
    with writing(part):
        part.write_bytes(content)
    return _settle(job, part, origin, base)


def _kept(job: _Job) -> Manifest | None:
    """Content of an earlier fetch that the user accepts now."""
    path = job.slot.unaccepted
    if job.accept is None or not path.is_file() or sha256_of(path) != job.accept:
        return None
    return _settle(job, path, f"{path} (fetched before)", None)


def _copy(job: _Job, given: str) -> Manifest:
    path = expanded(given).absolute()
    if path.is_dir():
        path = path / job.source.file_name
    if not path.is_file():
        raise UserError(f"--from {given}: there is no file {path}; give a folder that has {job.source.file_name}, that file, or an address")
    part = job.slot.part(str(path))
    with writing(part):
        shutil.copyfile(path, part)
    return _settle(job, part, str(path), None)


def _addresses(job: _Job) -> tuple[str, ...]:
    if job.from_ is None:
        return job.source.urls
    base = job.from_.rstrip("/")
    return (base if base.endswith(f"/{job.source.file_name}") else f"{base}/{job.source.file_name}",)


def _download(job: _Job) -> Manifest:
    """Try the addresses in turn; the first that gives the right content wins."""
    failures: list[tuple[str, Exception]] = []
    for url in _addresses(job):
        try:
            return _download_from(job, url)
        except (AddressError, DataError) as error:
            failures.append((url, error))
            job.say(f"{url}: {error}")
    details = "\n".join(f"  {url}: {error}" for url, error in failures)
    text = f"data {job.source.name!r}: no address gave it:\n{details}\n"
    hint = f"with a copy of {job.source.file_name}, use --from FOLDER; {job.slot.path.parent} is where it would lie"
    kind = MachineError if all(isinstance(error, Unreachable) for _, error in failures) else DataError
    raise kind(text + hint)


def _download_from(job: _Job, url: str) -> Manifest:
    part = job.slot.part(url)
    size = job.source.bytes if job.source.sha256_verified else None
    _check_space(job, part)
    resumed = download(url, part, patience=job.patience, progress=job.progress, size=size)
    try:
        return _settle(job, part, url, None)
    except DataError:
        if not resumed:
            raise
    # Perhaps two halves of a file that changed in between: once more from the start.
    discard_part(part)
    download(url, part, patience=job.patience, progress=job.progress, size=size)
    return _settle(job, part, url, None)


def _check_space(job: _Job, part: Path) -> None:
    folder = job.slot.path.parent
    needed = (job.source.bytes or 0) - (part.stat().st_size if part.exists() else 0)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MachineError(
            f"{folder}: {needed} more bytes are needed, {free} are free; free some space, or set {CACHE_VARIABLE} to a larger disk"
        )


def _settle(job: _Job, found: Path, origin: str, base: Manifest | None) -> Manifest:
    """Judge the content of `found`, count its rows, give it its place, and write lock and manifest."""
    sha256 = sha256_of(found)
    try:
        status = judge(job.source, job.slot, sha256, job.accept)
        manifest = describe(
            found,
            job.source,
            path=job.slot.path,
            origin=origin,
            sha256=sha256,
            sha256_status=status,
            base_sha256=base.sha256 if base else None,
        )
    except BenchError:
        _set_aside(job, found)
        raise
    with writing(job.slot.path):
        agree(job.source, job.slot, manifest)
        _sync(found)
        parts = job.slot.parts
        found.replace(job.slot.path)
        for part in parts:
            discard_part(part)
        job.slot.unaccepted.unlink(missing_ok=True)
        save_manifest(manifest, job.slot.manifest, fetched=True)
    for note in manifest.notes:
        job.say(f"{job.source.name}: {note}")
    return manifest


def _set_aside(job: _Job, found: Path) -> None:
    """Keep whole content that the user may accept; remove what nobody can want."""
    if found.suffix != ".part":
        return
    if not job.source.sha256_verified:
        found.replace(job.slot.unaccepted)
    discard_part(found)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
