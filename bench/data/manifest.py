"""The manifest of a data file: what it is, where it came from, and what was found in it. Torch-free."""

from __future__ import annotations

import json
from dataclasses import field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from bench.cell import STRICT
from bench.data.download import writing
from bench.data.formats import Kind, Rejected, check_share, parsed_rows
from bench.data.sources import Source
from bench.errors import DataError, UserError
from bench.record import Input, Sha256, first_problem, write_json

LISTED_REJECTED = 100


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class RejectedRow:
    """A row that is not used: its line (Parquet: its row), from 1, and why."""

    line: int
    reason: str


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class Manifest:
    """One data file on this machine."""

    name: str
    """As the suite names it."""
    path: str
    """The file, absolute."""
    sha256: Sha256
    sha256_status: str
    """How the hash is known to be right: `published`, `stated by a mirror`, `accepted by the user`, `locked at the first
    fetch`, `generated`, or `file of the user`."""
    bytes: int
    kind: Kind
    """What the rows are: instruct, pairs or prompts."""
    rows: int
    """Usable rows."""
    rejected_count: int = 0
    """Rows that are not usable."""
    rejected: list[RejectedRow] = field(default_factory=list)
    """The first of them (at most 100; the count is exact)."""
    licence: str
    source: str
    """Where the bytes came from: address, path, or `synthetic:`."""
    revision: str | None = None
    fetched: str
    """UTC time."""
    base_sha256: Sha256 | None = None
    """Of the file whose prompts these rows were made from."""
    notes: list[str] = field(default_factory=list)
    """What a reader should know, for example another number of rows than the source states."""

    def as_input(self) -> Input:
        """The data set as trials and records name it."""
        facts = {name: getattr(self, name) for name in ("kind", "rows", "bytes", "licence", "source", "revision", "sha256_status")}
        return Input(name=self.name, path=self.path, sha256=self.sha256, facts={**facts, "rejected": self.rejected_count})


_adapter = TypeAdapter(Manifest)


def describe(
    found: Path, source: Source, *, path: Path, origin: str, sha256: str, sha256_status: str, base_sha256: str | None = None
) -> Manifest:
    """The manifest of the file `found`, its rows counted, which has or will have its place at `path`.

    Raises DataError if the file is damaged or none of its rows is usable.
    """
    rows, rejected = 0, []
    for row in parsed_rows(found, source.kind):
        if isinstance(row, Rejected):
            rejected.append(row)
        else:
            rows += 1
    check_share(found, source.kind, rows, rejected, rejected_share=1.0)
    notes = []
    if source.rows is not None and rows + len(rejected) != source.rows:
        notes.append(f"the source states {source.rows} rows; the file has {rows + len(rejected)}")
    return Manifest(
        name=source.name,
        path=str(path),
        sha256=sha256,
        sha256_status=sha256_status,
        bytes=found.stat().st_size,
        kind=source.kind,
        rows=rows,
        rejected_count=len(rejected),
        rejected=[RejectedRow(line=row.line, reason=row.reason) for row in rejected[:LISTED_REJECTED]],
        licence=source.licence,
        source=origin,
        revision=source.revision,
        fetched=datetime.now(UTC).isoformat(timespec="seconds"),
        base_sha256=base_sha256,
        notes=notes,
    )


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """The content of the manifest file."""
    content: dict[str, Any] = _adapter.dump_python(manifest, mode="json")
    return content


def save_manifest(manifest: Manifest, path: Path, *, fetched: bool = False) -> None:
    """Write the manifest, atomically; `fetched`: the one beside fetched data, not one that the user has named.

    Raises UserError where that would be the data themselves.
    """
    if path.exists() and Path(manifest.path).exists() and path.samefile(manifest.path):
        raise UserError(f"{path}: the manifest would take the place of the data; the path of another file would be right")
    with writing(path, fetched=fetched):
        write_json(manifest_to_json(manifest), path)


def load_manifest(path: Path) -> Manifest:
    """The manifest in `path`. Raises DataError if it is none."""
    try:
        return _adapter.validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; `coati-bench data fetch NAME` writes it") from None
    except ValidationError as error:
        raise DataError(f"{path}: not a data manifest; {first_problem(error)}") from None


def manifest_schema() -> str:
    """JSON Schema of a manifest, as text."""
    return json.dumps(_adapter.json_schema(), indent=1)
