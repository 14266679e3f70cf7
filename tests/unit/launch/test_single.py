"""A trial by hand: what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.errors import RecordError, UserError
from bench.launch.single import read_rendezvous, run_single
from bench.trial import make_trial, save_trial
from tests.trials import tiny_cell


@pytest.fixture
def trial_file(tmp_path: Path) -> Path:
    save_trial(make_trial(tiny_cell("sft", steps=1), 0, work=str(tmp_path / "work")), tmp_path / "trial.json")
    return tmp_path / "trial.json"


@pytest.mark.parametrize(
    ("record", "error", "told"),
    [
        ("folder", UserError, "a record is a file; seen: a folder"),
        ("old.json", RecordError, "a record is never rewritten; seen: a file"),
        ("old.json/x.json", UserError, "its folder cannot be made; seen: the file"),
        ("/", UserError, "a record is a file; seen: a folder"),
    ],
)
def test_a_record_that_cannot_be_left_is_refused_before_the_trial(
    trial_file: Path, tmp_path: Path, record: str, error: type[Exception], told: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.json").write_text("{}", encoding="utf-8")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(error, match=told):
        run_single(trial_file, tmp_path / record)
    assert set(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_written_is_refused_before_the_trial(
    trial_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda _path, _mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="nothing can be written to"):
        run_single(trial_file, tmp_path / "new" / "record.json")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"strategy": "x"}, "unknown strategy; seen: 'x'; one of"),
        ({"strategy": {}}, "unknown strategy"),
        ({"stage": "x"}, "unknown stage; seen: 'x'; one of sft, rm, ppo"),
        ({"stage": []}, "unknown stage"),
        ({"launcher": "x"}, "at launcher: .*; seen: 'x'"),
    ],
)
def test_a_wrong_cell_in_a_trial_file_is_told_in_one_line(trial_file: Path, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    content = json.loads(trial_file.read_text(encoding="utf-8"))
    content["cell"].update(change)
    _refused(trial_file, json.dumps(content), tmp_path, told)


def test_a_record_is_no_trial_file(trial_file: Path, tmp_path: Path) -> None:
    _refused(trial_file, json.dumps({"schema": "coati-bench/record/1", "cell": {}, "trial": 0}), tmp_path, "seen: a record")


def test_a_trial_file_nested_too_deeply_is_none(trial_file: Path, tmp_path: Path) -> None:
    _refused(trial_file, "[" * 100_000, tmp_path, "not a trial file")


def _refused(file: Path, text: str, folder: Path, told: str) -> None:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=told) as caught:
        run_single(file, folder / "record.json")
    assert "\n" not in str(caught.value)
    assert "https://" not in str(caught.value)


def test_a_port_is_of_ascii_digits() -> None:
    with pytest.raises(UserError, match="HOST:PORT of node 0"):
        read_rendezvous(2, 0, "h:\u00b2")
