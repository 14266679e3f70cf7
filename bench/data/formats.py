"""Rows out of files: JSON arrays, JSON Lines, both also gzipped, and Parquet; told apart by content, never by name.

A malformed row is rejected with its line and reason and reading goes on; a file that is damaged as a whole (cut off,
not UTF-8, not JSON at all) is a DataError. Files are read as streams: only the rows themselves stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bench.data.raw import Repeated, raw_rows
from bench.errors import DataError

Kind = Literal["instruct", "pairs", "prompts"]

KINDS: dict[str, str] = {
    "instruct": "instruction, output (and input, id)",
    "pairs": "prompt, chosen, rejected (or whole dialogues as chosen and rejected)",
    "prompts": "instruction (and id)",
}
"""Kind -> the fields of a row."""

ASSISTANT = "\n\nAssistant:"


class Rejected(NamedTuple):
    """A row that was not used: its line in the file (Parquet: its row), from 1, and why."""

    line: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


@dataclass(slots=True)
class Rows:
    """What a file holds: usable rows in the order of the file, and the others with their reasons."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


def read_rows(path: Path, kind: str, *, rejected_share: float = 0.01, first: int | None = None) -> Rows:
    """Return the rows of `path` as `kind` (instruct, pairs or prompts); with `first`, only so many from the start.

    Rows have exactly these keys: instruct {instruction, input, output, id if there is one}, pairs {prompt, chosen,
    rejected}, prompts {instruction, id if there is one}; all values are text, save `id` (text or whole number).
    Raises DataError if the file is damaged, has no usable row, or more than `rejected_share` of its rows are rejected.
    """
    found = Rows()
    for row in parsed_rows(path, kind):
        if isinstance(row, Rejected):
            found.rejected.append(row)
        else:
            found.rows.append(row)
        if first is not None and len(found.rows) >= first:
            break
    check_share(path, kind, len(found.rows), found.rejected, rejected_share)
    return found


def parsed_rows(path: Path, kind: str) -> Iterator[dict[str, Any] | Rejected]:
    """Yield every row of `path` as `kind`, or why it is none, in the order of the file. Raises DataError if it is damaged."""
    parse = _PARSERS[kind]
    for raw in raw_rows(path):
        row, reason = (None, raw.reason) if raw.reason else parse(raw.value)
        yield Rejected(raw.line, reason or "") if row is None else row


def check_share(path: Path, kind: str, rows: int, rejected: Sequence[Rejected], rejected_share: float) -> None:
    """Raise DataError if there is no usable row, or more than `rejected_share` of all rows are rejected."""
    total = rows + len(rejected)
    if total == 0:
        raise DataError(f"{path}: has no rows; a data file has at least one")
    if rows and len(rejected) <= rejected_share * total:
        return
    examples = "; ".join(map(str, rejected[:3]))
    raise DataError(
        f"{path}: {len(rejected)} of {total} rows are not usable as {kind} (at most {rejected_share:.2%} may be): {examples};"
        f" a row has the fields {KINDS[kind]}"
    )


def guess_kind(path: Path) -> Kind:
    """The kind that the first row's fields fit best. Raises DataError if they fit none, or there is no row."""
    raw = next(iter(raw_rows(path)), None)
    if raw is None:
        raise DataError(f"{path}: has no rows; a data file has at least one")
    if raw.reason or not isinstance(raw.value, dict):
        raise DataError(f"{path}: line {raw.line}: {raw.reason or 'not an object'}; a data file is a JSON array, JSON Lines or Parquet")
    fields = raw.value.keys()
    if {"chosen", "rejected"} <= fields:
        return "pairs"
    if {"instruction", "output"} <= fields:
        return "instruct"
    if "instruction" in fields:
        return "prompts"
    wanted = "; ".join(f"{kind}: {names}" for kind, names in KINDS.items())
    raise DataError(f"{path}: the first row has the fields {', '.join(sorted(fields)) or '(none)'}; known are {wanted}")


Parsed = tuple[dict[str, Any] | None, str | None]


def _fault(row: Any, required: tuple[str, ...]) -> str | None:
    """Why `row` is not an object with these text fields; None if it is."""
    if isinstance(row, Repeated):
        return f"the key {row.key!r} stands twice"
    if not isinstance(row, dict):
        return f"not an object but {_type_name(row)}"
    for name in required:
        if name not in row:
            return f"no field {name!r}; the row has {', '.join(map(repr, sorted(row))) or 'none'}"
        if reason := _text_fault(name, row[name]):
            return reason
    return None


def _text_fault(name: str, value: Any) -> str | None:
    if not isinstance(value, str):
        return f"{name!r} is {_type_name(value)}, not text"
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return f"{name!r} has half a surrogate pair, which is no text"
    return None


def _type_name(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "an array", dict: "an object", Repeated: "an object"}
    return "null" if value is None else names.get(type(value), "text" if isinstance(value, str) else type(value).__name__)


def _with_id(row: dict[str, Any], parsed: dict[str, Any]) -> Parsed:
    identity = row.get("id")
    if identity is None:
        return parsed, None
    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
        return None, f"'id' is {_type_name(identity)}, not text or a whole number"
    return {**parsed, "id": identity}, None


def _instruct(row: Any) -> Parsed:
    if reason := _fault(row, ("instruction", "output")):
        return None, reason
    given = "" if row.get("input") is None else row["input"]
    if reason := _text_fault("input", given):
        return None, reason
    if not row["instruction"].strip():
        return None, "'instruction' is empty"
    return _with_id(row, {"instruction": row["instruction"], "input": given, "output": row["output"]})


def _prompts(row: Any) -> Parsed:
    if reason := _fault(row, ("instruction",)):
        return None, reason
    if not row["instruction"].strip():
        return None, "'instruction' is empty"
    return _with_id(row, {"instruction": row["instruction"]})


def _pairs(row: Any) -> Parsed:
    if reason := _fault(row, ("chosen", "rejected")):
        return None, reason
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        reason = _text_fault("prompt", row["prompt"])
        return (None, reason) if reason else ({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}, None)
    cut = _dialogue_cut(chosen, rejected)
    if cut is None:
        return None, "no field 'prompt', and the two dialogues share no turn that ends with 'Assistant:'"
    return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}, None


def _dialogue_cut(chosen: str, rejected: str) -> int | None:
    """Where the prompt that two dialogues share ends: after their last common "Assistant:"."""
    cut = chosen.rfind(ASSISTANT)
    if cut < 0 or not rejected.startswith(chosen[: cut + len(ASSISTANT)]):
        shared = next((at for at, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other), len(rejected))
        cut = chosen.rfind(ASSISTANT, 0, shared)
    return None if cut < 0 else cut + len(ASSISTANT)


_PARSERS: dict[str, Callable[[Any], Parsed]] = {"instruct": _instruct, "pairs": _pairs, "prompts": _prompts}
