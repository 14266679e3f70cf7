"""A record is written once, whole, and never holds what JSON cannot say."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from bench.cell import cell_from_json, cell_to_json, fingerprint
from bench.errors import RecordError, UserError
from bench.record import Lap, Part, Record, load_part, load_record, record_schema, save_part, save_record, write_json

CELL = cell_from_json({"stage": "sft", "model": "bloom-tiny", "strategy": "naive", "steps": 2})
LAP = Lap(first_step=0, steps=2, seconds=0.5, counts={"loss_tokens": 10})
PART = Part(
    rank=0,
    local_rank=0,
    node=0,
    world_size=1,
    hostname="h",
    pid=1,
    outcome="ok",
    phase="done",
    step=2,
    laps=[LAP],
    series={"loss": [2.0, 1.5]},
)


def record(**changes: object) -> Record:
    content = {
        "cell": cell_to_json(CELL), "cell_id": CELL.cell_id, "fingerprint": fingerprint(CELL, {}, {}), "trial": 0, "seed": 42,
        "launcher": "fork", "emulated": False, "simulated_nodes": False, "outcome": "ok", "parts": [PART],
    }  # fmt: skip
    return Record(**{**content, **changes})


def test_a_record_survives_the_round_trip_and_fits_its_own_schema(tmp_path: Path) -> None:
    save_record(record(), tmp_path / "0.json")
    assert load_record(tmp_path / "0.json") == record()
    jsonschema.validate(json.loads((tmp_path / "0.json").read_text(encoding="utf-8")), record_schema())


def test_a_record_is_never_rewritten(tmp_path: Path) -> None:
    save_record(record(), tmp_path / "0.json")
    with pytest.raises(RecordError, match="never rewritten"):
        save_record(record(outcome="error"), tmp_path / "0.json")
    assert load_record(tmp_path / "0.json").outcome == "ok"


def test_the_parsed_cell_is_the_cell() -> None:
    assert record().parsed_cell == CELL
    assert record().lead == PART


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"outcome": "crashed"}, "outcome"),
        ({"schema": "coati-bench/record/9"}, "schema"),
        ({"fingerprint": "x"}, "fingerprint"),
        ({"extra": 1}, "extra"),
    ],
)
def test_what_is_no_record_is_refused_with_the_place(tmp_path: Path, change: dict[str, object], where: str) -> None:
    save_record(record(), tmp_path / "0.json")
    content = json.loads((tmp_path / "0.json").read_text(encoding="utf-8"))
    write_json({**content, **change}, tmp_path / "bad.json")
    with pytest.raises(RecordError, match=f"not a record; at {where}"):
        load_record(tmp_path / "bad.json")


def test_a_truncated_record_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    (tmp_path / "0.json").write_text('{"schema": "coati', encoding="utf-8")
    with pytest.raises(RecordError, match="not a record"):
        load_record(tmp_path / "0.json")
    with pytest.raises(RecordError, match="cannot be read"):
        load_record(tmp_path / "1.json")


def test_nan_never_enters_a_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"loss": float("nan")}, tmp_path / "0.json")
    assert list(tmp_path.iterdir()) == []


def test_a_later_part_of_a_rank_replaces_the_earlier_one(tmp_path: Path) -> None:
    save_part(PART, tmp_path / "part0.json")
    later = dataclasses.replace(PART, step=3)
    save_part(later, tmp_path / "part0.json")
    assert load_part(tmp_path / "part0.json").step == 3


def test_a_file_that_is_no_json_is_told_with_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "0.json"
    path.write_text("no record at all", encoding="utf-8")
    with pytest.raises(RecordError, match=r"0\.json: not a record; at \(file\): Invalid JSON: .*; seen: 'no record at all'"):
        load_record(path)


def test_json_is_written_through_a_link_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "real.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("there/real.json")
    write_json([1], tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "there" / "real.json").read_text()) == [1]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link.json", "real.json", "there"]


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        (lambda path: path.mkdir(), "a folder"),
        (os.mkfifo, "a device, pipe or socket"),
        (lambda path: path.symlink_to("nothing"), "a link to nothing"),
        (lambda path: path.symlink_to(path), "a link to nothing"),
    ],
)
def test_what_is_no_file_is_never_replaced_by_json(make: Callable[[Path], None], seen: str, tmp_path: Path) -> None:
    path = tmp_path / "there.json"
    make(path)
    before = path.lstat()
    with pytest.raises(UserError, match=f"cannot be replaced by a file; seen: {seen}; "):
        write_json([1], path)
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert list(tmp_path.iterdir()) == [path]
