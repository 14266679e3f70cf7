"""A real trial with a warm start, run once; then rebuilt, refused and repeated from its record."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.checkpoint import checkpoint_sha256
from bench.data.fetch import fetch_for_suite
from bench.errors import RecordError, UserError
from bench.launch import reproduce as module
from bench.launch.block import run_block, run_warm
from bench.launch.reproduce import rebuild
from bench.layout import CACHE_VARIABLE, Layout
from bench.matrix import make_plan, save_plan
from bench.record import Record, load_record, save_record
from bench.reproduce import reproduce
from bench.suite import Limits

SUITE = """
suite: again
axes: {stage: [rm], model: [bloom-tiny], strategy: [naive]}
settings: {device: cpu, launcher: fork, precision: fp32, tokenizer_vocabulary: 1024, rows: 80, held_out_rows: 8, lap_steps: 1}
stages:
  sft: {steps: 2, micro_batch: 2, global_batch: 2, sequence_length: 128}
  rm: {steps: 4, micro_batch: 4, global_batch: 4, sequence_length: 128, learning_rate: 1e-3}
limits: {timeout_seconds: 120, heartbeat_seconds: 60}
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The record of the suite's only trial, in results/again/."""
    root = tmp_path_factory.mktemp("reproduce")
    known = os.environ.get(CACHE_VARIABLE)
    os.environ[CACHE_VARIABLE] = str(root / "cache")
    (root / "again.yaml").write_text(SUITE, encoding="utf-8")
    plan = make_plan(root / "again.yaml")
    layout = Layout(root / "results" / "again")
    save_plan(plan, layout.plan)
    for name in plan.data:
        fetch_for_suite(layout.data(name), name)
    for warm in plan.warm:
        assert run_warm(layout.warm(warm.key) / "done.json") == 0
    [block] = plan.blocks
    assert run_block(layout.block(block.block_id)) == 0
    [cell_id] = plan.cells
    assert load_record(layout.record(cell_id, 0)).outcome == "ok"
    yield layout.record(cell_id, 0)
    os.environ.pop(CACHE_VARIABLE) if known is None else os.environ.update({CACHE_VARIABLE: known})


def results_of(suite: Path) -> Path:
    return suite.parents[3]


def edited(suite: Path, folder: Path, **changes: Any) -> Path:
    """A changed copy of the record, away from its suite."""
    path = folder / "copy" / "0.json"
    save_record(dataclasses.replace(load_record(suite), **changes), path)
    return path


def with_input(suite: Path, name: str, **changes: Any) -> list[Any]:
    return [dataclasses.replace(item, **changes) if item.name == name else item for item in load_record(suite).inputs]


def rebuilt(path: Path, results: Path) -> Any:
    return rebuild(load_record(path), path, results)


def test_the_same_trial_again_gives_identical_losses(suite: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = results_of(suite)
    assert reproduce(suite, results=results) == 0
    out = capfd.readouterr().out
    assert "losses: identical; identical over 4 steps" in out
    assert "times: undefined; not compared: ranks were started by fork" in out
    assert out.endswith("\nreproduced\n")
    old, new = load_record(suite), load_record(results / "reproduced" / suite.parent.name / "trial0-run1.json")
    assert new.fingerprint == old.fingerprint
    assert new.parts[0].facts["initial_weights_sha256"] == old.parts[0].facts["initial_weights_sha256"]


def test_other_losses_are_not_reproduced_and_a_second_run_keeps_the_first(
    suite: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    old = load_record(suite)
    parts = [dataclasses.replace(part, series=part.series | {"loss": [value * 1.5 for value in part.series["loss"]]}) for part in old.parts]
    path, results = edited(suite, tmp_path, parts=parts), tmp_path / "results"
    taken = results / "reproduced" / old.cell_id / "trial0-run1.json"
    taken.parent.mkdir(parents=True)
    taken.write_text("{}")
    assert reproduce(path, results=results) == 1
    out = capfd.readouterr().out
    assert "losses: outside; points: 4 of 4 points outside" in out
    assert out.endswith("\nnot reproduced\n")
    assert taken.read_text() == "{}"
    assert (taken.parent / "trial0-run2.json").is_file()


def test_a_trial_is_rebuilt_exactly(suite: Path) -> None:
    old, found = load_record(suite), rebuilt(suite, results_of(suite))
    assert (found.differences, found.missing) == ((), ())
    assert found.trial.fingerprint == old.fingerprint
    assert (found.trial.cell, found.trial.trial, found.trial.seed) == (old.cell, old.trial, old.seed)
    assert found.trial.limits == Limits(timeout_seconds=120, heartbeat_seconds=60)


def test_data_that_is_gone_is_fetched_again(suite: Path, tmp_path: Path) -> None:
    path = edited(suite, tmp_path, inputs=with_input(suite, "synthetic-pairs", path="/nowhere/pairs.json"))
    [item] = rebuilt(path, results_of(suite)).trial.data
    assert (Path(item.path).is_file(), item.sha256) == (True, load_record(suite).inputs[0].sha256)


def test_data_with_other_content_is_a_difference(suite: Path, tmp_path: Path) -> None:
    found = rebuilt(edited(suite, tmp_path, inputs=with_input(suite, "synthetic-pairs", sha256="d" * 64)), results_of(suite))
    [difference] = found.differences
    assert difference.startswith("data synthetic-pairs: sha256 dddddddddddd recorded, ")
    assert found.trial is not None


def test_weights_are_found_in_another_suite_by_their_sha256(suite: Path, tmp_path: Path) -> None:
    policy = next(item for item in load_record(suite).inputs if item.name == "policy")
    other = tmp_path / "results" / "other" / "warm" / policy.facts["made_by"] / "weights"
    shutil.copytree(policy.path, other)
    found = rebuilt(edited(suite, tmp_path, inputs=with_input(suite, "policy", path="/nowhere")), tmp_path / "results")
    assert found.trial.start("policy").path == str(other)
    assert found.differences == ()


def test_weights_that_are_nowhere_are_missing_even_anyway(suite: Path, tmp_path: Path) -> None:
    path = edited(suite, tmp_path, inputs=with_input(suite, "policy", path="/nowhere"))
    with pytest.raises(UserError) as error:
        reproduce(path, anyway=True, results=tmp_path / "results")
    assert "policy: no folder with the weights" in str(error.value)
    assert "run their suite again" in str(error.value)
    assert not (tmp_path / "results").exists()


def test_other_weights_in_their_place_are_a_difference(suite: Path, tmp_path: Path) -> None:
    tokenizer = next(item for item in load_record(suite).inputs if item.name == "tokenizer")
    path = edited(suite, tmp_path, inputs=with_input(suite, "policy", path=tokenizer.path, facts={}))
    [difference] = rebuilt(path, tmp_path / "results").differences
    assert difference.startswith("policy: sha256 ")
    assert difference.endswith(f"{tokenizer.sha256[:12]} in {tokenizer.path}")


def test_a_tokenizer_that_is_gone_is_trained_again_to_the_same_content(suite: Path, tmp_path: Path) -> None:
    wanted = next(item.sha256 for item in load_record(suite).inputs if item.name == "tokenizer")
    path = edited(suite, tmp_path, inputs=with_input(suite, "tokenizer", path="/nowhere", facts={}))
    found = rebuilt(path, tmp_path / "results")
    folder = tmp_path / "results" / "reproduced" / "tokenizers" / wanted[:12]
    assert found.trial.start("tokenizer").path == str(folder)
    assert (checkpoint_sha256(folder), found.differences) == (wanted, ())


def test_other_code_versions_and_locks_are_refused_with_a_list(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = load_record(suite).provenance
    changed = {
        "versions": old["versions"] | {"torch": "1.0"},
        "source": old["source"]
        | {"package_sha256": "e" * 64, "commit": "c" * 40, "locks": old["source"]["locks"] | {"cpu.lock": "a" * 64}},
    }
    path = edited(suite, tmp_path, provenance=old | changed)
    ran: list[Path] = []
    monkeypatch.setattr("bench.reproduce.run_again", lambda trial, results: ran.append(results) or (130, results))
    with pytest.raises(UserError) as error:
        reproduce(path, results=results_of(suite))
    text = str(error.value)
    assert "code: commit cccccccccccc" in text
    assert "(package eeeeeeeeeeee) recorded, commit " in text
    assert f"torch: 1.0 recorded, {old['versions']['torch']} here" in text
    assert "cpu.lock: aaaaaaaaaaaa recorded, " in text
    assert (error.value.exit_code, ran) == (2, [])
    assert reproduce(path, anyway=True, results=results_of(suite)) == 130
    assert len(ran) == 1


def test_machines_that_are_not_here_are_a_difference(suite: Path, tmp_path: Path) -> None:
    old = load_record(suite)
    path = edited(suite, tmp_path, cell=old.cell | {"strategy": "ddp", "nodes": 2}, simulated_nodes=False)
    assert "nodes: 2 machines recorded; here they would be simulated on one" in rebuilt(path, results_of(suite)).differences


def test_a_fingerprint_that_cannot_be_met_is_a_difference(suite: Path, tmp_path: Path) -> None:
    [difference] = rebuilt(edited(suite, tmp_path, fingerprint="f" * 64), results_of(suite)).differences
    assert difference.startswith("fingerprint: ffffffffffff recorded, ")


def test_a_record_whose_settings_were_changed_is_not_the_same(suite: Path, tmp_path: Path) -> None:
    old = load_record(suite)
    first, second = rebuilt(edited(suite, tmp_path, cell=old.cell | {"steps": 5}), results_of(suite)).differences
    assert first.startswith(f"cell: {old.cell_id} recorded, its settings here are those of rm-bloom-tiny-naive-")
    assert second.startswith("fingerprint: ")


def test_what_is_missing_is_told_with_what_is_not_the_same(suite: Path, tmp_path: Path) -> None:
    old = load_record(suite)
    inputs = with_input(suite, "policy", path="/nowhere")
    path = edited(suite, tmp_path, inputs=inputs, provenance=old.provenance | {"versions": old.provenance["versions"] | {"torch": "1.0"}})
    with pytest.raises(UserError, match=r"(?s)missing here:\n  policy: .*\nbesides, not the same here:\n.*torch: 1\.0 recorded"):
        reproduce(path, results=tmp_path / "results")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"strategy": "zero9"}, "seen: zero9"),
        ({"stage": "dpo"}, "none that this version knows; seen: stage 'dpo'"),
        ({"new_setting": 3}, "none that this version knows; seen: new_setting: Unexpected keyword argument$"),
    ],
)
def test_cells_of_another_version_are_told(suite: Path, tmp_path: Path, changes: dict[str, str], text: str) -> None:
    with pytest.raises(RecordError, match=text):
        rebuilt(edited(suite, tmp_path, cell=load_record(suite).cell | changes), results_of(suite))


def test_a_record_that_names_no_data_cannot_be_repeated(suite: Path, tmp_path: Path) -> None:
    inputs = [item for item in load_record(suite).inputs if item.name != "synthetic-pairs"]
    assert rebuilt(edited(suite, tmp_path, inputs=inputs), results_of(suite)).missing == (
        "data synthetic-pairs: the record does not name it",
    )


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(RecordError, match="not a record"):
        reproduce(tmp_path / "x.json", results=tmp_path)


def test_hashing_stops_at_the_weights_that_are_wanted(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 7B checkpoint takes a minute to hash."""
    hashed: list[Path] = []
    monkeypatch.setattr(module, "checkpoint_sha256", lambda folder: hashed.append(folder) or checkpoint_sha256(folder))
    rebuilt(suite, results_of(suite))
    old: Record = load_record(suite)
    assert hashed == [Path(item.path) for item in old.inputs if item.name in ("tokenizer", "policy")]
