from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from bench.errors import UserError
from bench.matrix import save_plan
from bench.record import OUTCOMES, Memory, save_record
from bench.report.commands import report
from bench.report.detail_tables import GROUPS
from bench.report.documentation import metrics_page
from bench.report.make import ReportPaths, make_report
from bench.report.metrics import METRICS
from bench.report.provenance import without_paths
from bench.report.registry import GIB, Row, Trial
from bench.report.text import number
from tests.unit.report.trial_factory import (
    content_of,
    failures,
    make_cell,
    make_plan,
    make_record,
    measured_suite,
    quick_suite,
    write,
)  # fmt: skip

ROOT = Path(__file__).parents[3]


def text_of(paths: ReportPaths) -> str:
    """What a reader sees of report.html, tags and attributes left out."""
    text = re.sub(r"<(style|script)>.*?</\1>", " ", paths.html.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())


def suite_folder(root: Path, records: list[Any], **plan: Any) -> Path:
    """results/<suite> with records and, if anything is said of one, a plan."""
    write(root / "records", *records)
    if plan:
        save_plan(make_plan(records, **plan), root / "plan.json")
    return root


def test_the_same_records_give_the_same_bytes_anywhere(tmp_path: Path) -> None:
    records = [*quick_suite(), *failures()]
    first = suite_folder(tmp_path / "here", records, trials=1)
    second = suite_folder(tmp_path / "somewhere" / "else", list(reversed(records)), trials=1)
    report(first, tmp_path / "out1")
    report(second, tmp_path / "out2")
    report(first / "records", tmp_path / "out3")
    assert content_of(tmp_path / "out1").keys() == {"report.html", "report.md", "results.csv", "results.parquet"}
    assert content_of(tmp_path / "out1") == content_of(tmp_path / "out2") == content_of(tmp_path / "out3")


def test_a_report_again_over_an_old_one_is_the_same(tmp_path: Path) -> None:
    root = suite_folder(tmp_path, quick_suite())
    report(root, tmp_path / "out")
    before = content_of(tmp_path / "out")
    report(root, tmp_path / "out")
    assert content_of(tmp_path / "out") == before


def test_no_folder_of_the_machine_enters_the_report(tmp_path: Path) -> None:
    root = suite_folder(tmp_path, [*quick_suite(), *failures()], trials=1)
    paths = report(root, tmp_path / "out")
    for path in (paths.html, paths.markdown, paths.csv):
        text = path.read_text(encoding="utf-8")
        for secret in (str(tmp_path), "/home/somebody", "/opt/venv", "/opt/app", "node0", "/data/"):
            assert secret not in text, (path.name, secret)


def test_no_records_are_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    with pytest.raises(UserError, match=r"no records; seen: no \*.json file below it; run a suite first"):
        make_report(tmp_path / "records", tmp_path / "out")
    with pytest.raises(UserError, match=r"there is no such folder"):
        make_report(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_without_any_record_is_the_users_mistake(tmp_path: Path) -> None:
    save_plan(make_plan(quick_suite()), tmp_path / "plan.json")
    (tmp_path / "records").mkdir()
    with pytest.raises(UserError, match="seen: 0 of the planned trials"):
        report(tmp_path, tmp_path / "out")


def test_records_without_a_plan_are_reported(tmp_path: Path) -> None:
    text = text_of(report(suite_folder(tmp_path, quick_suite()), tmp_path / "out"))
    assert "All 42 trials ended ok." in text
    assert "skipped" not in text.split("How to read this")[0]


def test_the_headline_of_an_emulated_run_is_that_losses_agree(tmp_path: Path) -> None:
    text = text_of(report(suite_folder(tmp_path, quick_suite()), tmp_path / "out"))
    assert "Losses agree: all 36 comparable trials agree with naive within tolerance (largest deviation" in text
    assert "No time or memory is claimed: ColossalAI was emulated on a CPU, ranks were started by fork" in text
    assert "Random weights: no quality claim." in text
    assert "highest throughput" not in text
    assert "vs naive" not in text


def test_a_measured_run_says_what_is_fastest_and_that_one_trial_claims_nothing(tmp_path: Path) -> None:
    text = text_of(report(suite_folder(tmp_path, measured_suite()), tmp_path / "out"))
    assert "Supervised fine-tuning: highest throughput naive" in text
    assert "(observed)" in text
    assert "no claim (n=1)" in text
    assert "0.550" in text  # gemini's ratio


def test_enough_trials_make_a_claim(tmp_path: Path) -> None:
    text = text_of(report(suite_folder(tmp_path, measured_suite(trials=8)), tmp_path / "out"))
    assert " slower " in text
    assert "too few trials" not in text


def test_emulated_times_are_greyed_and_have_no_ratio(tmp_path: Path) -> None:
    cells = [make_cell("sft", name, device="cuda", steps=50) for name in ("naive", "zero2")]
    records = [make_record(cells[0]), make_record(cells[1], emulated=True)]
    paths = report(suite_folder(tmp_path, records), tmp_path / "out")
    row = next(line for line in paths.markdown.read_text().splitlines() if line.startswith("| zero2 | full | 1 × 1 | ok"))
    assert "| no claim (not measured) |" in row
    assert re.search(r"\| \([\d,.]+\) \| – \|", row)


def test_a_struck_row_is_shown_with_its_reason_and_never_ranked(tmp_path: Path) -> None:
    cells = [make_cell("sft", name, device="cuda", steps=50) for name in ("naive", "ddp", "zero2")]
    records = [make_record(cells[0]), make_record(cells[1]), make_record(cells[2], seconds=0.001, noise=0.5)]
    paths = report(suite_folder(tmp_path, records), tmp_path / "out")
    text = text_of(paths)
    assert "Losses do not all agree: 1 of 2 comparable trials (zero2) is struck and not ranked." in text
    assert "highest throughput naive (ddp within 3 %)" not in text  # ddp is 3.1 % behind
    assert "highest throughput naive" in text
    assert "first loss deviates by" in text


def test_every_outcome_is_listed_with_its_reason_and_last_log_lines(tmp_path: Path) -> None:
    paths = report(suite_folder(tmp_path, [*quick_suite(), *failures()]), tmp_path / "out")
    section = text_of(paths).split("Every trial that did not end ok.")[1].split("Provenance")[0]
    for outcome in set(OUTCOMES) - {"ok"}:
        assert f" {outcome} " in section
    assert "CUDA out of memory; requested 2147483648 bytes" in section
    assert "KeyError: &#39;lm_head.weight&#39;" in section
    assert "KeyError: 'lm" in paths.markdown.read_text()


def test_skipped_and_missing_cells_are_listed_with_reasons(tmp_path: Path) -> None:
    records = quick_suite()
    impossible = (make_cell("sft", "hybrid", lora_rank=2), "hybrid does not offer LoRA with tensor parallelism")
    root = suite_folder(tmp_path, records, extra=(make_cell("sft", "zero1"),), skipped=(impossible,))
    text = text_of(report(root, tmp_path / "out"))
    assert "All 42 trials ended ok, 1 cell was skipped as impossible and 1 planned trial has no record." in text
    assert "hybrid does not offer LoRA with tensor parallelism" in text
    assert "sft · bloom-tiny · zero1 · full · 1 × 1 · trial 0" in text


def test_what_ran_tells_cells_with_some_of_their_trials_from_those_with_none(tmp_path: Path) -> None:
    root = suite_folder(tmp_path, quick_suite(), trials=2, extra=(make_cell("sft", "zero1"),))
    text = text_of(report(root, tmp_path / "out"))
    assert "◐ ran; a planned trial has no record ? planned, no record" in text


def test_invalid_files_are_named_and_not_dropped(tmp_path: Path) -> None:
    root = suite_folder(tmp_path, quick_suite())
    good = next((root / "records").rglob("*.json"))
    (root / "records" / "broken.json").write_text('{"schema": "coati-bench/rec')
    content = json.loads(good.read_text())
    (root / "records" / "old.json").write_text(json.dumps({**content, "schema": "coati-bench/record/0"}))
    (root / "records" / "stage.json").write_text(json.dumps({**content, "cell": {**content["cell"], "stage": "dpo"}}))
    (root / "records" / "setting.json").write_text(json.dumps({**content, "cell": {**content["cell"], "micro_batch": 0}}))
    shutil.copy(good, root / "records" / "zz_copy.json")
    text = text_of(report(root, tmp_path / "out"))
    section = text.split("Files that are no records")[-1]
    for words in ("broken.json", "old.json", "unknown stage: &#39;dpo&#39;", "setting.json", "zz_copy.json repeats trial 0"):
        assert words in section
    assert "All 42 trials ended ok." in text


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    attack = '<script>alert(1)</script><img src=x onerror=alert(2)> "quoted" | `tick` ```\n```\n</pre><b>bold</b>'
    cell = make_cell("sft", "ddp", model='org/"><svg onload=alert(3)>')
    records = [make_record(make_cell("sft")), make_record(cell, outcome="error", reason=attack, flags=[attack])]
    root = suite_folder(tmp_path, records, skipped=((cell, attack),))
    paths = report(root, tmp_path / "out")
    page = paths.html.read_text(encoding="utf-8")
    assert page.count("<script") == 1
    for tag in ("<img", "<b>bold", "<svg onload", "</pre><b>"):
        assert tag not in page
    markdown = paths.markdown.read_text(encoding="utf-8")
    outside = re.sub(r"(`{3,})text\n.*?\n\1\n", "", markdown, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<(script|img|b|svg)", outside)
    assert any(line.startswith("| ddp") for line in outside.splitlines())
    for is_table, lines in groupby(outside.splitlines(), key=lambda line: line.startswith("|")):
        assert not is_table or len({line.count(" | ") for line in lines}) == 1


def test_the_page_needs_no_network_and_stays_small(tmp_path: Path) -> None:
    paths = report(suite_folder(tmp_path, [*quick_suite(), *measured_suite(3), *failures()]), tmp_path / "out")
    page = paths.html.read_text(encoding="utf-8")
    assert not re.search(r"""\b(src|href)="(?!#|data:,)|\b(src|href)=[^"]""", page)
    assert "url(" not in page
    assert "@import" not in page
    assert paths.html.stat().st_size < 1_500_000


def test_a_thousand_records_take_seconds(tmp_path: Path) -> None:
    cells = [make_cell("sft", name, lora_rank=rank, steps=50) for name in ("naive", "ddp", "zero2", "gemini") for rank in range(0, 50, 5)]
    folder = tmp_path / "records"
    for cell in cells:
        for trial in range(25):
            save_record(make_record(cell, trial), folder / cell.cell_id / f"{trial}.json")
    start = time.perf_counter()
    paths = make_report(folder, tmp_path / "out")
    assert time.perf_counter() - start < 20
    assert paths.html.stat().st_size < 3_000_000
    assert pq.read_table(paths.parquet).num_rows == 1000


def test_parquet_and_csv_hold_every_record_and_the_same_numbers(tmp_path: Path) -> None:
    paths = report(suite_folder(tmp_path, [*quick_suite(), *failures()]), tmp_path / "out")
    table = pq.read_table(paths.parquet).to_pylist()
    rows = list(csv.DictReader(io.StringIO(paths.csv.read_text(encoding="utf-8"))))
    assert len(table) == len(rows) == 49
    for mine, other in zip(rows, table, strict=True):
        assert mine["cell_id"] == other["cell_id"]
        assert (float(mine["final_loss"]) if mine["final_loss"] else None) == other["final_loss"]
    ppo = [row for row in table if row["stage"] == "ppo"]
    assert {row["final_loss"] for row in ppo} == {None}
    assert all(row["not_measured"] for row in table if row["strategy"] == "zero2")


def test_columns_are_only_ever_added(tmp_path: Path) -> None:
    """A column that somebody reads may not vanish; a new one is added to the golden list."""
    paths = report(suite_folder(tmp_path, quick_suite()), tmp_path / "out")
    known = (ROOT / "tests" / "golden" / "report_columns.txt").read_text(encoding="utf-8").split()
    assert known == sorted(pq.read_table(paths.parquet).column_names)


def test_column_types_do_not_depend_on_the_data(tmp_path: Path) -> None:
    few = pq.read_table(report(suite_folder(tmp_path / "a", failures()[:1]), tmp_path / "out1").parquet)
    many = pq.read_table(report(suite_folder(tmp_path / "b", measured_suite()), tmp_path / "out2").parquet)
    for name in ("final_loss", "loss_tokens_per_second", "parity_first_deviation", "held_out_reward_after"):
        assert few.schema.field(name).type == many.schema.field(name).type


def test_a_reference_band_is_judged_where_there_is_one(tmp_path: Path) -> None:
    records = measured_suite()
    root = suite_folder(tmp_path / "results" / "reference", records)
    write(tmp_path / "results" / "references" / "h100" / "reference" / "records", *records[:3])
    text = text_of(report(root, tmp_path / "out"))
    assert "Inside the reference band: all 3 trials with a stored record of this device." in text
    assert "no reference" in text


def test_a_record_of_a_failed_warm_start_is_reported(tmp_path: Path) -> None:
    failed = make_record(make_cell("rm"), outcome="error", reason="warm start sft-naive failed: out of memory", ranks=range(0))
    text = text_of(report(suite_folder(tmp_path, [failed]), tmp_path / "out"))
    assert "0 of 1 trial ended ok and 1 did not (1 error: naive)." in text
    assert "No trial could be compared with naive" in text
    assert "warm start sft-naive failed: out of memory" in text


def test_strategies_without_a_naive_are_held_to_each_other(tmp_path: Path) -> None:
    oom = make_record(make_cell("sft"), outcome="oom", reason="rank 0: out of memory", ranks=range(0))
    records = [oom, *(make_record(make_cell("sft", name)) for name in ("ddp", "zero2"))]
    page = text_of(report(suite_folder(tmp_path / "alone", records), tmp_path / "alone"))
    assert "2 trials have no naive to be compared with but agree with each other (largest deviation 1.0e-07 in fp32); an error" in page
    assert "of 2 compared with each other (no naive)" in page
    assert "Losses compared with other strategies only: no ok trial of naive with this seed in fp32. (2 cells)" in page
    records += [make_record(make_cell("rm", name)) for name in ("naive", "ddp")]
    page = text_of(report(suite_folder(tmp_path / "both", records), tmp_path / "both"))
    assert "Losses agree: the one comparable trial agrees with naive within tolerance" in page
    assert "2 trials have no naive to be compared with but agree with each other" in page
    assert "of 3 compared with naive or each other" in page


def test_what_ran_out_of_a_device_s_memory_is_told_beside_what_it_would_have_needed(tmp_path: Path) -> None:
    records = []
    for strategy in ("naive", "ddp"):
        cell = make_cell("sft", strategy, model="bloom-560m", device="cuda", launcher="torchrun", precision="bf16-master")
        record = make_record(cell, outcome="oom", reason="rank 0: out of memory")
        zero = Memory(peak_allocated_bytes=0, peak_reserved_bytes=0)
        facts = {**record.parts[0].facts, "device_total_bytes": 8 * GIB}
        records.append(dataclasses.replace(record, parts=[dataclasses.replace(part, memory=zero, facts=facts) for part in record.parts]))
    page = text_of(report(suite_folder(tmp_path, records), tmp_path / "out"))
    theory = METRICS["theory_peak_gib"].compute(Trial(Row(records[0], records[0].parsed_cell, "")))
    assert f"peak by theory {number(theory)} GiB, the device 8.000 GiB, seen in use 6.500 GiB" in page
    assert "allocated 0" not in page
    assert pq.read_table(tmp_path / "out" / "results.parquet")["peak_allocated_gib"].null_count == 2


def test_failures_of_cells_that_are_named_alike_are_told_apart(tmp_path: Path) -> None:
    records = [
        make_record(make_cell("sft", optimizer=name), outcome="oom", reason="no room", ranks=range(0)) for name in ("foreach", "fused")
    ]
    page = text_of(report(suite_folder(tmp_path, [*records, make_record(make_cell("sft", "ddp"))]), tmp_path / "out"))
    assert "naive · full · 1 × 1 · optimizer foreach · trial 0" in page
    assert "naive · full · 1 × 1 · optimizer fused · trial 0" in page


def test_the_headline_names_the_strategies_that_failed_and_counts_the_rest(tmp_path: Path) -> None:
    names = ("ddp", "fsdp", "zero1", "zero2", "gemini", "hybrid")
    records = [make_record(make_cell("sft"), outcome="diverged", reason="nan")]
    records += [make_record(make_cell("sft", name, nodes=2), outcome="oom", reason="no room", ranks=range(0)) for name in names]
    page = text_of(report(suite_folder(tmp_path, records), tmp_path / "out"))
    assert "7 did not (1 diverged: naive; 6 oom: ddp, fsdp, gemini, hybrid and 2 more)" in page


def test_trials_that_partly_failed_show_both(tmp_path: Path) -> None:
    cell = make_cell("sft", "ddp")
    records = [make_record(make_cell("sft"), k) for k in range(3)]
    records += [make_record(cell, 0), make_record(cell, 1, outcome="oom", reason="rank 0: out of memory"), make_record(cell, 2)]
    text = text_of(report(suite_folder(tmp_path, records), tmp_path / "out"))
    assert "ok × 2, oom" in text


def test_values_that_were_not_finite_are_told(tmp_path: Path) -> None:
    record = make_record(make_cell("sft"))
    part = dataclasses.replace(record.parts[0], facts={**record.parts[0].facts, "non_finite": {"gradient_norm": [3]}})
    text = text_of(report(suite_folder(tmp_path, [dataclasses.replace(record, parts=[part])]), tmp_path / "out"))
    assert "Not finite in some steps, which ended no trial: gradient_norm." in text


def test_trials_that_trained_nothing_stand_in_the_headline(tmp_path: Path) -> None:
    records = []
    for record in (make_record(make_cell("sft")), make_record(make_cell("sft", "ddp"))):
        laps = [dataclasses.replace(lap, counts={"loss_tokens": 0, "tokens": 9, "padded_tokens": 9}) for lap in record.parts[0].laps]
        records.append(dataclasses.replace(record, parts=[dataclasses.replace(record.parts[0], laps=laps)]))
    text = text_of(report(suite_folder(tmp_path, records), tmp_path / "out"))
    assert "2 trials that ended ok trained nothing (Supervised fine-tuning): no token carried loss" in text
    assert "Losses agree" not in text


def test_paths_are_cut_and_addresses_kept() -> None:
    assert without_paths("/a/b/c.py:3 and ./rel/x and https://example.org/a/b/c") == "…/c.py:3 and ./rel/x and https://example.org/a/b/c"


def test_the_metrics_page_is_up_to_date() -> None:
    """Run `python -m bench.report.documentation > docs/metrics.md` when this fails."""
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == metrics_page()


def test_reporting_never_loads_torch() -> None:
    code = (
        "import sys, bench.report.commands, bench.report.documentation; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_further_figures_stand_in_groups_below_the_main_table(tmp_path: Path) -> None:
    paths = report(suite_folder(tmp_path, measured_suite()), tmp_path / "out")
    page, text = paths.html.read_text(encoding="utf-8"), paths.markdown.read_text(encoding="utf-8")
    for group in ("Speed and efficiency", "Memory", "Energy and cost"):
        assert page.count(f"<summary>{group}</summary>") == 3
        assert f"### Supervised fine\\-tuning: {group}" in text or f"### Supervised fine-tuning: {group}" in text
    assert page.count("<summary>Phases</summary>") == 1
    main = text.split("## Supervised")[1].split("###")[0]
    assert "MFU (% of peak)" in main
    assert "HFU" not in main


def test_rows_charts_and_answers_named_alike_say_in_what_they_differ(tmp_path: Path) -> None:
    made = {"device": "cuda", "launcher": "torchrun", "model": "bloom-560m"}
    cells = [make_cell("sft", name, steps=steps, **made) for name in ("naive", "ddp") for steps in (30, 60)]
    cells.append(make_cell("sft", "zero2", steps=60, **made))
    paths = report(suite_folder(tmp_path, [make_record(cell) for cell in cells]), tmp_path / "out")
    text, page = paths.markdown.read_text(encoding="utf-8"), text_of(paths)
    assert "full · 1 × 1 · steps 30 |" in text
    assert "full · 1 × 1 · steps 60 |" in text
    for table in (text.split("✓ ran")[1], text.split(": Memory\n")[1]):
        rows = [line.split(" | ")[0] for line in table.split("| --- |", 1)[1].split("\n\n")[0].splitlines()[1:]]
        assert sorted(rows) == [
            "| ddp \\[steps 30\\]", "| ddp \\[steps 60\\]", "| naive \\[steps 30\\]", "| naive \\[steps 60\\]", "| zero2",
        ]  # fmt: skip
    assert "ddp steps 30" in page
    assert "zero2 steps" not in page


def test_a_row_of_somebodys_own_checkout_is_labelled_modified(tmp_path: Path) -> None:
    cells = [
        make_cell("sft", "zero2", device="cuda", launcher="torchrun", overlay=overlay)
        for overlay in (None, {"colossalai": "/srv/checkout"})
    ]
    paths = report(suite_folder(tmp_path, [make_record(cell) for cell in cells]), tmp_path / "out")
    assert "zero2 modified full 1 × 1" in text_of(paths)
    assert "| zero2 \\[modified\\] |" in paths.markdown.read_text(encoding="utf-8")


def test_figures_that_nobody_has_are_named_with_the_reason(tmp_path: Path) -> None:
    text = report(suite_folder(tmp_path, quick_suite()), tmp_path / "out").markdown.read_text(encoding="utf-8")
    speed = text.split(": Speed and efficiency")[1].split("###")[0]
    assert "MFU (" not in text
    assert "MFU, HFU, vs attainable: ranks were started by fork, which makes no timing claims" in speed
    assert "model FLOPs per step (TFLOP)" in speed


def test_every_metric_of_a_table_is_one() -> None:
    names = [name for group in GROUPS.values() for name in group]
    assert len(names) == len(set(names))
    assert set(names) <= set(METRICS)


def test_impossible_rows_and_what_the_report_was_told_stand_in_it(tmp_path: Path) -> None:
    cells = [make_cell("sft", name, device="cuda", model="bloom-560m", precision="bf16-master", steps=50) for name in ("naive", "ddp")]
    records = [make_record(cells[0], seconds=0.5), make_record(cells[1], seconds=0.001)]
    root = suite_folder(tmp_path, records)
    (tmp_path / "ceilings.json").write_text(json.dumps({"device": "NVIDIA H100 80GB HBM3", "matrix_flops_per_second": {"bf16": 7.1e14}}))
    text = text_of(report(root, tmp_path / "out", price=2.5))
    assert "1 trial has numbers that cannot be true (ddp): MFU above 100 %" in text
    assert "price of a device-hour 2.5" in text
    assert "matrix products of NVIDIA H100 80GB HBM3 bf16 710.0 TFLOP/s (doctor --bench)" in text
    assert "vs attainable" in text


def test_a_lowered_power_limit_is_told(tmp_path: Path) -> None:
    record = make_record(make_cell("sft", device="cuda", steps=50))
    card = {"name": "NVIDIA H100 80GB HBM3", "power_limit_watts": 350.0, "memory_bytes": 80 << 30}
    low = dataclasses.replace(record, provenance={**record.provenance, "machines": [{"devices": [card]}]})
    text = text_of(report(suite_folder(tmp_path, [low]), tmp_path / "out"))
    assert "NVIDIA H100 80GB HBM3: power limit 350 W; the peaks hold at 700 W. (1 cell)" in text
