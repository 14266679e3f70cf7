"""`coati-bench run`: done once, it does nothing; a change repeats what it changes; a failure stops nothing else."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.record import load_record

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, make_folder: Callable[[Path], Any]) -> Any:
    """A suite of two cells that has run; its first run's output is `.first`."""
    folder = make_folder(tmp_path_factory.mktemp("finished"))
    folder.write()
    folder.first = folder.run()
    return folder


def strategy_of(cell_id: str) -> str:
    return re.sub(r"^sft-bloom-tiny-(\w+)-lora.*$", r"\1", cell_id)


def outcomes(folder: Any) -> dict[str, str]:
    paths = folder.layout.records.glob("*/0.json")
    return {strategy_of(path.parent.name): load_record(path).outcome for path in paths if path.parent.name in folder.plan.cells}


def test_a_run_says_what_it_does_and_ends_with_the_report_and_its_headline(finished: Any) -> None:
    assert finished.first.returncode == 0, finished.first.stdout + finished.first.stderr
    text = finished.first.stdout
    assert "tiny.yaml: 2 cells x 1 trial in 1 block, 0 skipped; no trial has a record yet" in text
    assert text.count("data synthetic-instruct: ready") == 1
    assert re.search(r"^\[1/2\] sft bloom-tiny \w+ full 1x1: ok, \d+\.\d s$", text, re.MULTILINE)
    assert "All 2 trials ended ok" in text
    assert text.endswith("Report: results/tiny/report/report.html\n")
    assert (finished.path / "results" / "tiny" / "report" / "report.html").stat().st_size > 10_000
    assert outcomes(finished) == {"naive": "ok", "ddp": "ok"}


def test_a_second_run_does_nothing_and_says_so(finished: Any) -> None:
    before, report = finished.records(), (finished.layout.report / "report.html").stat()
    again = finished.run()
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Nothing to do: every trial has its record and the report is up to date." in again.stdout
    assert finished.records() == before
    assert (finished.layout.report / "report.html").stat() == report


def test_a_changed_comment_in_a_rule_repeats_nothing(finished: Any, tmp_path: Path) -> None:
    for name in ("Snakefile", "rules", "profiles"):
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    for rule in (tmp_path / "rules").glob("*.smk"):
        rule.write_text(rule.read_text(encoding="utf-8").replace(':q}"\n', ':q}  # a comment"\n'), encoding="utf-8")
    done = finished.snakemake("-n", snakefile=tmp_path / "Snakefile")
    assert "Nothing to be done" in done.stdout
    by_code = finished.snakemake("-n", "--rerun-triggers", "code", snakefile=tmp_path / "Snakefile")
    assert "Nothing to be done" not in by_code.stdout  # the comment was seen, and is not a reason here


def test_a_changed_comment_in_the_suite_repeats_nothing(finished: Any) -> None:
    text = (finished.path / "tiny.yaml").read_text(encoding="utf-8")
    (finished.path / "tiny.yaml").write_text(f"# a remark\n{text}", encoding="utf-8")
    assert "Nothing to do" in finished.run().stdout


def test_the_lock_of_a_snakemake_that_was_killed_is_cleared(finished: Any) -> None:
    lock = finished.path / ".snakemake" / "locks" / "0.output.lock"
    lock.parent.mkdir(exist_ok=True)
    lock.write_text("results/tiny/report/report.html\n", encoding="utf-8")
    (finished.layout.report / "report.html").unlink()
    locked = finished.snakemake(snakefile=ROOT / "Snakefile")
    assert "LockException" in locked.stdout
    done = finished.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert (finished.layout.report / "report.html").exists()


def test_the_workflow_makes_snakemakes_own_report_too(finished: Any) -> None:
    done = finished.snakemake("--report", "snakemake.html", snakefile=ROOT / "Snakefile")
    assert done.returncode == 0, done.stdout
    assert "All records of this suite compared" in (finished.path / "snakemake.html").read_text(encoding="utf-8")


def test_a_changed_setting_of_one_cell_repeats_that_cell_only_and_its_failure_stops_nothing(finished: Any) -> None:
    before = finished.records()
    finished.write(overrides="{when: {strategy: ddp}, settings: {learning_rate: 1e38, schedule: constant}}")
    done = finished.run()
    assert done.returncode == 0, done.stdout + done.stderr
    after = finished.records()
    new = set(after) - set(before)
    assert {strategy_of(cell_id) for cell_id in new} == {"ddp"}
    assert len(new) == 1
    assert {cell_id: after[cell_id] for cell_id in before} == before
    assert outcomes(finished) == {"naive": "ok", "ddp": "error"}
    assert "Not ok: 1 error. They are results" in done.stdout
    assert "coati-bench retry tiny.yaml --outcome error" in done.stdout


def test_a_finished_failure_is_not_repeated_and_lost_records_are(finished: Any) -> None:
    before = finished.records()
    assert "Nothing to do" in finished.run().stdout
    naive = next(cell_id for cell_id in finished.plan.cells if "naive" in cell_id)
    shutil.rmtree(finished.layout.records / naive)
    again = finished.run()
    assert "records of block sft-bloom-tiny-1x1-trial0 are gone; it runs again" in again.stdout
    assert {cell_id: seen for cell_id, seen in finished.records().items() if cell_id != naive} == {
        cell_id: seen for cell_id, seen in before.items() if cell_id != naive
    }
    assert outcomes(finished)["naive"] == "ok"


def test_a_dry_run_changes_nothing(folder: Any) -> None:
    folder.write()
    done = folder.run("--dry-run")
    assert done.returncode == 0
    assert "Dry run: nothing was done; no trial has a record yet." in done.stdout
    assert [path.name for path in folder.path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_run_that_was_stopped_leaves_no_process_and_goes_on_where_it_was(
    folder: Any, until: Callable[..., bool], living: Callable[..., list[psutil.Process]], number: signal.Signals
) -> None:
    folder.write(strategies="naive, ddp, zero2", steps=60)
    driver = folder.start()
    try:
        assert until(folder.layout.plan.exists, 60)
        second = folder.run()
        assert second.returncode == 3
        assert f"this suite is being run already; seen: process {driver.pid} on" in second.stderr
        assert until(folder.records, 90)
        below = psutil.Process(driver.pid).children(recursive=True)
        assert any("block" in process.cmdline() for process in living(below))
        driver.send_signal(number)
        output, _ = driver.communicate(timeout=60)
    finally:
        driver.kill()
        driver.communicate()
    assert until(lambda: not living(below), 30), living(below)
    assert driver.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    if number == signal.SIGINT:
        assert "nothing runs any more. The same command goes on from here: coati-bench run tiny.yaml" in output
    kept = folder.records()
    assert 1 <= len(kept) < 3
    assert not folder.layout.block("sft-bloom-tiny-1x1-trial0").exists()

    again = folder.run()
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{len(kept)} of 3 trials have a record" in again.stdout
    after = folder.records()
    assert {cell_id: after[cell_id] for cell_id in kept} == kept
    assert outcomes(folder) == {"naive": "ok", "ddp": "ok", "zero2": "ok"}
    listed = json.loads(folder.layout.block("sft-bloom-tiny-1x1-trial0").read_text(encoding="utf-8"))["records"]
    assert len(listed) == 3


def test_what_cannot_be_made_is_told_in_its_own_words(folder: Any) -> None:
    folder.write()
    folder.layout.root.mkdir(parents=True)
    folder.layout.records.write_text("a file where the records should go", encoding="utf-8")
    done = folder.run()
    assert done.returncode == 3
    assert "Not everything could be made (Snakemake ended with 1); results/tiny/logs/snakemake.log has all of it:" in done.stdout
    assert re.search(r"^  coati-bench: .*records", done.stdout, re.MULTILINE), done.stdout


def test_a_data_file_that_is_cut_off_is_the_user_s_mistake_and_leaves_no_manifest(folder: Any) -> None:
    folder.write()
    (folder.path / "rows.json").write_text('[{"instruction": "a", "output": "b"},', encoding="utf-8")
    text = (folder.path / "tiny.yaml").read_text(encoding="utf-8").replace("sft: {steps", "sft: {data: file:rows.json, steps")
    (folder.path / "tiny.yaml").write_text(text, encoding="utf-8")
    done = folder.run()
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(r"^  coati-bench: .*rows.json: the JSON array is cut off or broken after 1 row", done.stdout, re.MULTILINE)
    assert not list((folder.layout.root / "data").glob("*"))


def test_rows_that_cannot_be_used_are_the_reason_in_every_record_and_retry_makes_all_of_it_again(folder: Any) -> None:
    folder.write()
    rows = folder.path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n' * 100 + "not JSON\n" * 100, encoding="utf-8")
    text = (
        (folder.path / "tiny.yaml")
        .read_text(encoding="utf-8")
        .replace("sft: {steps", "sft: {data: file:rows.jsonl, steps")
        .replace("length: 128", "length: 512")
    )
    (folder.path / "tiny.yaml").write_text(text, encoding="utf-8")
    done = folder.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcomes(folder) == {"naive": "error", "ddp": "error"}
    assert "Not ok: 2 error. They are results" in done.stdout
    assert re.search(r"^\[2/2\] sft bloom-tiny \w+ full 1x1: error: what it starts from failed: .*rows.jsonl", done.stdout, re.MULTILINE)

    (folder.path / "tiny.yaml").write_text(f"{text}limits: {{rejected_share: 0.6}}\n", encoding="utf-8")
    before = folder.records()
    folder.run()
    assert folder.records() == before
    assert "2 records and 1 warm start set aside" in folder.coati_bench("retry", "tiny.yaml", "--outcome", "error").stdout
    again = folder.run()
    assert again.returncode == 0, again.stdout + again.stderr
    assert outcomes(folder) == {"naive": "ok", "ddp": "ok"}
