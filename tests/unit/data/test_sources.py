"""The source table, and what a data name may be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.data.formats import KINDS
from bench.data.sources import SOURCES, data_problem, resolve
from bench.errors import DataError
from bench.layout import file_name
from bench.suite import _with_absolute_files


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_states_only_what_is_known(name: str) -> None:
    source = SOURCES[name]
    assert source.name == name
    assert source.kind in KINDS
    assert source.licence
    assert source.sha256 is not None or not source.sha256_verified
    assert source.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", source.sha256)
    assert all(re.match(r"(drive\+)?https://|synthetic:", url) for url in source.urls)
    assert data_problem(name, Path()) is None


def test_names_and_cache_folders_are_unique() -> None:
    assert len({file_name(name) for name in SOURCES}) == len(SOURCES)


def test_the_licence_of_instructwild_is_shown_in_its_own_words() -> None:
    for name in ("instructwild-en", "instructwild-ch", "instructwild-seed-en", "instructwild-seed-ch"):
        assert "InstructWild dataset is intended for non-commercial research purpose only." in SOURCES[name].licence


def test_what_only_a_mirror_states_is_not_called_verified() -> None:
    assert not SOURCES["instructwild-en"].sha256_verified
    assert not SOURCES["instructwild-ch"].sha256_verified
    assert SOURCES["rm-static"].sha256 is None


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("instructwild", "unknown data 'instructwild'; did you mean 'instructwild-"),
        ("Synthetic-Pair", "unknown data 'Synthetic-Pair'; did you mean 'synthetic-pairs'?"),
        ("data/rows.json", "unknown data 'data/rows.json'; a file of your own is given as 'file:data/rows.json'"),
        ("zzz", "unknown data 'zzz'; known are instructwild-en, "),
        ("", "unknown data ''; known are "),
        ("file:", "data 'file:' names no file; give its path"),
        ("file:none.json", "there is no file"),
        ("file:.", "is a folder or device"),
        ("file:empty.json", "has no rows"),
        ("file:odd.json", "the first row has the fields question"),
        (
            "synthetic-pairs+synthetic-instruct",
            "'synthetic-pairs' has preference pairs; '+synthetic-instruct' needs rows with an instruction",
        ),
        ("nothing+synthetic-pairs", "unknown data 'nothing'"),
        ("file:none.json+synthetic-pairs", "there is no file"),
        ("synthetic-prompts+synthetic", "unknown data 'synthetic-prompts+synthetic'"),
    ],
)
def test_a_name_that_is_none_is_told_with_what_would_be_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").touch()
    (tmp_path / "odd.json").write_text('{"question": "a"}')
    assert problem in str(data_problem(name, tmp_path))
    with pytest.raises(DataError):
        resolve(name, tmp_path)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ('{"instruction": "a"}', "prompts"),
        ('{"instruction": "a", "output": "b"}', "instruct"),
        ('{"chosen": "a", "rejected": "b"}', "pairs"),
    ],
)
def test_a_file_of_the_user_is_found_from_the_working_folder_and_its_kind_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text(row)
    assert data_problem("file:rows.csv", tmp_path) is None
    source = resolve("file:rows.csv", tmp_path)
    assert (source.kind, source.local_path) == (kind, tmp_path / "rows.csv")
    assert resolve(f"file:{tmp_path}/rows.csv").local_path == tmp_path / "rows.csv"
    assert resolve("file:rows.csv").local_path == tmp_path / "rows.csv"


def test_a_path_that_was_meant_from_the_suites_folder_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "rows.json").write_text('{"instruction": "a"}')
    monkeypatch.chdir(tmp_path)
    problem = data_problem("file:rows.json", tmp_path / "config")
    assert problem is not None
    assert problem.startswith(f"data 'file:rows.json': there is no file {tmp_path}/rows.json; ")
    assert problem.endswith(f"paths are taken from the working folder {tmp_path}, and there is one at {tmp_path}/config/rows.json")


def test_prompts_of_any_source_can_be_given_generated_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text('{"instruction": "a"}')
    for base in ("instructwild-seed-en", "instructwild-en", "synthetic-prompts", "file:rows.json"):
        assert data_problem(f"{base}+synthetic-instruct", tmp_path) is None
        assert resolve(f"{base}+synthetic-instruct", tmp_path).kind == "instruct"
        assert resolve(f"{base}+synthetic-pairs", tmp_path).kind == "pairs"
    derived = resolve("instructwild-seed-en+synthetic-pairs")
    assert "non-commercial" in derived.licence
    assert derived.base == "instructwild-seed-en"
    assert derived.user_file is None
    assert resolve("file:rows.json+synthetic-pairs").user_file == tmp_path / "rows.json"


def test_a_home_folder_that_there_is_not_is_told_at_its_place_in_a_suite(tmp_path: Path) -> None:
    content = {"stages": {"sft": {"data": "file:~nouser/x"}}, "overlay": {"colossalai": "~nouser/c", "other": "here"}}
    absolute = _with_absolute_files(content, tmp_path)
    assert absolute == {**content, "overlay": {"colossalai": "~nouser/c", "other": str(tmp_path / "here")}}
    told = "~nouser/x: there is no such home folder; seen: ~nouser; a path without ~ would be right"
    assert data_problem("file:~nouser/x", tmp_path) == told
