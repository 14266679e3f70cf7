"""Drawing a prompt file, the data verbs, and the real seed files where they are at hand."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cli import _exit_code
from bench.data.commands import app
from bench.data.fetch import fetch, fetch_for_suite
from bench.data.formats import read_rows
from bench.data.manifest import load_manifest, manifest_to_json, save_manifest
from bench.data.prompts import sample_prompts
from bench.errors import DataError, UserError

ROWS = [{"instruction": f"Ask {number}", "input": "", "output": "b", "id": 7 * number} for number in range(100)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text(json.dumps(ROWS))
    return path


def test_prompts_are_drawn_without_replacement(source: Path, tmp_path: Path) -> None:
    rows = sample_prompts(source, tmp_path / "prompts.csv", count=100, seed=1)
    assert {row["instruction"] for row in rows} == {row["instruction"] for row in ROWS}
    assert [row["id"] for row in rows] == list(range(100))
    assert json.loads((tmp_path / "prompts.csv").read_text()) == rows
    assert all(list(row) == ["instruction", "id"] for row in rows)


def test_the_same_seed_writes_the_same_bytes(source: Path, tmp_path: Path) -> None:
    files = []
    for number, seed in enumerate((42, 42, 43)):
        sample_prompts(source, tmp_path / f"{number}.json", count=20, seed=seed)
        files.append((tmp_path / f"{number}.json").read_bytes())
    assert files[0] == files[1] != files[2]
    assert hashlib.sha256(files[0]).hexdigest() == PINNED


PINNED = "aae30aed49fa1b22128985ce72352211c2d123e30c8b5a178e75048cbdcf35e1"


def test_lines_and_array_give_the_same_prompts(source: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert sample_prompts(source, tmp_path / "a", count=9) == sample_prompts(lines, tmp_path / "b", count=9)


def test_what_is_written_can_be_read_as_prompts(source: Path, tmp_path: Path) -> None:
    rows = sample_prompts(source, tmp_path / "prompts.csv", count=5)
    assert read_rows(tmp_path / "prompts.csv", "prompts", rejected_share=0).rows == rows


def test_more_prompts_than_rows_are_an_error_and_nothing_is_written(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 100 usable rows, 101 prompts are to be drawn without replacement; lower --count"):
        sample_prompts(source, tmp_path / "prompts.json", count=101)
    assert not (tmp_path / "prompts.json").exists()


def test_no_prompts_and_the_same_file_are_errors(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--count 0: draw at least 1 prompt"):
        sample_prompts(source, tmp_path / "prompts.json", count=0)
    with pytest.raises(UserError, match="is the file that prompts are drawn from"):
        sample_prompts(source, source, count=1)
    with pytest.raises(UserError, match="cannot be written: File exists; name a file that can be written"):
        sample_prompts(source, source / "prompts.json", count=1)


# -- verbs ---------------------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_fetch_writes_the_manifest_of_a_suite(tmp_path: Path) -> None:
    target = tmp_path / "results" / "quick" / "data" / "synthetic-pairs.json"
    shown = invoke("fetch", "synthetic-pairs", "--cache", str(tmp_path / "cache"), "--manifest", str(target))
    manifest = load_manifest(target)
    assert f"synthetic-pairs: 1000 rows, sha256 {manifest.sha256} (generated)" in shown
    assert Path(manifest.path).is_relative_to(tmp_path / "cache")
    assert hashlib.sha256(Path(manifest.path).read_bytes()).hexdigest() == manifest.sha256
    assert fetch_for_suite(tmp_path / "again.json", "synthetic-pairs", cache=tmp_path / "cache") == manifest
    assert (tmp_path / "again.json").read_bytes() == target.read_bytes()


def test_a_manifest_never_takes_the_place_of_its_data(tmp_path: Path) -> None:
    mine, before = tmp_path / "mine.jsonl", '{"instruction": "a", "output": "b"}\n'
    mine.write_text(before)
    with pytest.raises(UserError, match="the manifest would take the place of the data"):
        invoke("fetch", f"file:{mine}", "--manifest", str(mine), "--cache", str(tmp_path / "cache"))
    assert mine.read_text() == before


def test_fetch_takes_a_copy_and_verify_hashes_it(tmp_path: Path) -> None:
    cache = ["--cache", str(tmp_path / "cache")]
    (tmp_path / "Belle_open_source_0.5M.json").write_text('{"instruction": "a", "output": "b"}')
    with pytest.raises(DataError, match="published is 3aa1bad8"):
        invoke("fetch", "belle-0.5m", "--from", str(tmp_path), *cache)
    (tmp_path / "rm-static.train.parquet").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\nbad\n')
    shown = invoke("fetch", "rm-static", "--from", str(tmp_path), *cache)
    assert "rm-static: 1 rows, 1 rejected, sha256" in shown
    assert "rm-static: unchanged, sha256" in invoke("verify", "rm-static", *cache)


def test_the_cache_is_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATI_BENCH_CACHE", str(tmp_path / "here"))
    invoke("fetch", "synthetic-prompts")
    assert (tmp_path / "here" / "synthetic-prompts" / "synthetic-prompts.json").exists()


def test_a_copy_of_what_is_not_fetched_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data 'synthetic-pairs' is generated; leave --from out"):
        fetch("synthetic-pairs", from_=str(tmp_path), cache=tmp_path)


def test_list_shows_every_source_with_licence_and_what_is_known() -> None:
    shown = invoke("list")
    assert "InstructWild v1, English: instruct, 52191 rows, json array; sha256 stated by a mirror only" in shown
    assert "rm-static" in shown
    assert "sha256 not published" in shown
    assert shown.count("non-commercial research purpose only") == 4


def test_prompts_are_drawn_by_the_verb(source: Path, tmp_path: Path) -> None:
    shown = invoke("prompts", str(source), str(tmp_path / "p.csv"), "--count", "4", "--seed", "3")
    assert shown == f"{tmp_path / 'p.csv'}: 4 prompts, seed 3\n"
    assert len(json.loads((tmp_path / "p.csv").read_text())) == 4


def test_a_source_that_is_not_there_is_told_even_if_the_target_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "o.json").write_text("[]")
    assert _exit_code(["data", "prompts", str(tmp_path / "nope"), str(tmp_path / "o.json"), "--count", "1"]) == 2
    assert "nope: cannot be read: No such file or directory; give the path of a data file" in capsys.readouterr().err
    assert (tmp_path / "o.json").read_text() == "[]"


@pytest.mark.parametrize("verb", ["prompts", "fetch"])
def test_outputs_that_cannot_be_written_are_told_without_a_word_of_the_cache(
    verb: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for target, told in ((tmp_path / "file" / "o", "name a file that can be written"), (tmp_path / "pipe", "seen: a device, pipe or")):
        given = {
            "prompts": ["prompts", str(source), str(target), "--count", "1"],
            "fetch": ["fetch", f"file:{source}", "--manifest", str(target)],
        }
        assert _exit_code(["data", *given[verb]]) == 2
        said = capsys.readouterr().err
        assert told in said
        assert "cache" not in said.lower()
    assert (tmp_path / "pipe").is_fifo()


def test_a_home_folder_that_there_is_not_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ["--cache", str(tmp_path)]
    for arguments in (["file:~nouser/x", *cache], ["rm-static", "--from", "~nouser/x", *cache], ["rm-static", "--cache", "~nouser/x"]):
        assert _exit_code(["data", "fetch", *arguments]) == 2
        assert "~nouser/x: there is no such home folder; seen: ~nouser; a path without ~ would be right" in capsys.readouterr().err
    monkeypatch.setenv("COATI_BENCH_CACHE", "~nouser/x")
    assert _exit_code(["data", "fetch", "synthetic-prompts"]) == 2
    assert "there is no such home folder" in capsys.readouterr().err


def test_a_manifest_survives_its_file_and_a_wrong_one_is_told(tmp_path: Path) -> None:
    manifest = fetch("synthetic-prompts", cache=tmp_path)
    save_manifest(manifest, tmp_path / "m.json")
    assert load_manifest(tmp_path / "m.json") == manifest
    content = manifest_to_json(manifest)
    for change, message in (({"rows": "many"}, "at rows: "), ({"sha256": "x"}, "at sha256: "), ({"extra": 1}, "at extra: ")):
        (tmp_path / "m.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(DataError, match=f"not a data manifest; {message}"):
            load_manifest(tmp_path / "m.json")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        load_manifest(tmp_path / "none.json")


def test_a_manifest_is_an_input_of_a_trial(tmp_path: Path) -> None:
    manifest = fetch("synthetic-prompts", cache=tmp_path)
    given = manifest.as_input()
    assert (given.name, given.path, given.sha256) == (manifest.name, manifest.path, manifest.sha256)
    assert given.facts["rows"] == 500
    assert given.facts["licence"].startswith("Generated by coati-bench")


# -- the real files, where they are at hand ------------------------------------------------------------------------

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data" / "instructwild"
needs_real_files = pytest.mark.skipif(not SHARED.exists(), reason=f"real InstructWild files are not at hand ({SHARED})")


@needs_real_files
@pytest.mark.parametrize("language", ["en", "ch"])
def test_the_real_seed_prompts_are_those_of_the_source_table(tmp_path: Path, language: str) -> None:
    copy = SHARED / f"data_seed_prompts_{language}.jsonl"
    manifest = fetch(f"instructwild-seed-{language}", from_=str(copy), cache=tmp_path)
    assert (manifest.rows, manifest.rejected_count, manifest.notes, manifest.sha256_status) == (429, 0, [], "published")
    answered = fetch(f"instructwild-seed-{language}+synthetic-instruct", cache=tmp_path)
    paired = fetch(f"instructwild-seed-{language}+synthetic-pairs", cache=tmp_path)
    assert answered.rows == paired.rows == 429
    assert (answered.sha256, paired.sha256) == PINNED_DERIVED[language]


PINNED_DERIVED = {
    "en": (
        "320a7384a8c00ada3953079c3991346e3fcc30344a75effba65b2e87ea3c135b",
        "205f344bdcb93f2a896d1425fa1383f1a835f83918c3f8c6b652a71022d7775a",
    ),
    "ch": (
        "15f013ee4905dff685447445cbe7ad554aa3386b7e01a9480ee33538e29e3526",
        "8eed88cf8da29488f13dfd1ae57e219d783c405b2c7aa73dc59da3266c944f1c",
    ),
}


@needs_real_files
def test_the_real_second_version_is_read_as_prompts(tmp_path: Path) -> None:
    manifest = fetch(f"file:{SHARED / 'data_v2_user_1.jsonl'}", cache=tmp_path)
    assert (manifest.kind, manifest.rows, manifest.rejected_count) == ("prompts", 429, 0)


@needs_real_files
def test_prompts_are_drawn_from_the_real_file(tmp_path: Path) -> None:
    rows = sample_prompts(SHARED / "data_seed_prompts_ch.jsonl", tmp_path / "prompt_samples_100.csv", count=100, seed=42)
    assert len({row["instruction"] for row in rows}) == 100
