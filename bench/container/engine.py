"""Images in the stores of podman and docker: loaded once from an OCI archive, and known by a digest that was checked. Torch-free.

The archive's manifest must have the digest of the image's note; it names the configuration by digest, that names the layers by theirs,
and the engines refuse layers that are others. So an image in a store whose id is that of the configuration (or of the manifest, where
docker keeps images in containerd) is the image of the note, whoever loaded it.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import subprocess
import tarfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

from bench.container.manifest import digest_of
from bench.container.runtimes import Runtime
from bench.container.tools import explain, tail
from bench.errors import MachineError, UserError
from bench.layout import cache_folder
from bench.measure.provenance import short_digest


class Ids(NamedTuple):
    """Digests by which a store may know an image."""

    configuration: str
    manifest: str
    layers: tuple[str, ...]


@cache
def load(runtime: Runtime, archive: Path, digest: str) -> str:
    """The id, in the runtime's store, of the image in `archive`, which is loaded if it is not there yet.

    `digest` is what the archive must hold. Raises UserError for another archive, MachineError if the runtime cannot load it.
    """
    ids = read_ids(archive, digest)
    if found := stored(runtime, ids):
        return found
    with _one_at_a_time(runtime, digest):
        if stored(runtime, ids) is None:
            _load(runtime, archive, ids)
    if found := stored(runtime, ids):
        return found
    raise MachineError(
        f"{archive}: {runtime.kind} loaded another image; seen: none with the id {ids.configuration}; an engine that keeps digests would "
        "be right, or COATI_BENCH_RUNTIME=apptainer"
    )


def read_ids(archive: Path, digest: str) -> Ids:
    """The digests in an archive, whose manifest must have `digest`. Raises UserError."""
    manifest = archive_manifest(archive)
    seen = digest_of(manifest)
    if seen != digest:
        raise UserError(f"{archive}: holds another image; seen: {seen}; {digest} would be right; bring or build it again")
    content = json.loads(manifest)
    return Ids(content["config"]["digest"], seen, tuple(layer["digest"] for layer in content["layers"]))


def archive_manifest(archive: Path) -> bytes:
    """The only manifest in an OCI archive. Raises UserError."""
    with _opened(archive) as tar:
        (entry,) = json.loads(_member(tar, "index.json").read())["manifests"]
        return _member(tar, _blob(entry["digest"])).read()


def checked_configuration(archive: Path, digest: str, layers: Iterable[str]) -> bytes:
    """The configuration in an archive, once it and the layers, all known by their digests, were hashed. Raises UserError."""
    with _opened(archive) as tar:
        for wanted in (digest, *layers):
            seen = f"sha256:{hashlib.file_digest(_member(tar, _blob(wanted)), 'sha256').hexdigest()}"  # type: ignore[arg-type]
            if seen != wanted:
                raise UserError(f"{archive}: a part of it is not what its manifest says; seen: {seen}; {wanted} would be right")
        return _member(tar, _blob(digest)).read()


@contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    """An archive to read. Raises UserError where what is read in it is not there."""
    try:
        with tarfile.open(archive) as tar:
            yield tar
    except (tarfile.TarError, KeyError, ValueError, OSError, EOFError) as error:
        raise UserError(f"{archive}: no OCI archive; seen: {error}; one of `container build --archive` would be right") from None


def stored(runtime: Runtime, ids: Ids) -> str | None:
    """The id under which the runtime has the image, or None. Raises MachineError if the runtime does not answer."""
    for wanted in (ids.configuration, ids.manifest):
        done = _call(runtime, "image", "inspect", "--format", "{{.Id}}", wanted)
        found = done.stdout.strip()
        if done.returncode == 0 and wanted.removeprefix("sha256:") == found.removeprefix("sha256:"):
            return wanted
        if done.returncode and not _is_absent(done.stderr):
            raise MachineError(_failed(runtime, "does not answer", done))
    return None


def _is_absent(said: str) -> bool:
    return any(words in said.lower() for words in ("no such image", "not known", "unable to find", "failed to find image"))


def _load(runtime: Runtime, archive: Path, ids: Ids) -> None:
    begin = time.monotonic()
    print(f"  {archive.name}: {runtime.kind} loads it, once ...", flush=True)
    process = subprocess.Popen([runtime.program, "load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):  # where it ends early, it says why
        _write_for_engines(archive, ids, process.stdin)
    with suppress(BrokenPipeError):
        process.stdin.close()
    said = process.stdout.read().decode(errors="replace")
    if process.wait():
        done = subprocess.CompletedProcess([], process.returncode, "", said)
        raise MachineError(_failed(runtime, f"cannot load {archive}", done))
    print(f"  {archive.name}: loaded in {time.monotonic() - begin:.0f} s", flush=True)


def _write_for_engines(archive: Path, ids: Ids, out: IO[bytes]) -> None:
    """The archive with the list of contents that docker's store wants as well (manifest.json), and podman's takes."""
    name, _, digest = archive.name.removesuffix(".oci.tar").rpartition("-")
    listed = {"Config": _blob(ids.configuration), "RepoTags": [f"localhost/{name}:{digest}"], "Layers": [_blob(it) for it in ids.layers]}
    content = json.dumps([listed]).encode()
    with tarfile.open(archive) as source, tarfile.open(fileobj=out, mode="w|", format=tarfile.GNU_FORMAT) as target:
        for member in source:
            if member.isfile() and member.name not in ("index.json", "oci-layout"):
                target.addfile(member, source.extractfile(member))
        info = tarfile.TarInfo("manifest.json")
        info.size = len(content)
        target.addfile(info, io.BytesIO(content))


def _blob(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def _member(tar: tarfile.TarFile, name: str) -> IO[bytes]:
    file = tar.extractfile(name)
    if file is None:
        raise KeyError(name)
    return file


@contextmanager
def _one_at_a_time(runtime: Runtime, digest: str) -> Iterator[None]:
    """Hold the lock of loading an image, so that trials that start together load it once."""
    folder = cache_folder() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".load-{runtime.kind}-{short_digest(digest)}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _call(runtime: Runtime, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([runtime.program, *words], text=True, capture_output=True, check=False, errors="replace")


def _failed(runtime: Runtime, what: str, done: subprocess.CompletedProcess[str]) -> str:
    advice = explain(done.stderr)
    return f"{runtime.kind} {what}: {advice}; seen: {tail(done)}"
