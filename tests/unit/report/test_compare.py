from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from bench.cell import Cell
from bench.errors import UserError
from bench.record import Record, save_record
from bench.report.compare import compare, compare_sets
from tests.unit.report.trial_factory import make_cell, make_record

NAIVE = make_cell("sft", "naive", device="cuda", model="bloom-560m", precision="bf16-master", steps=60)
ZERO2 = make_cell("sft", "zero2", device="cuda", model="bloom-560m", precision="bf16-master", steps=60)
PPO = make_cell("ppo", "naive", device="cuda", model="bloom-560m", precision="bf16-master")


def record(
    cell: Cell, trial: int = 0, *, slower: float = 1.0, noise: float = 0.01, versions: dict[str, str | None] | None = None, **rest: Any
) -> Record:
    """A measured record; its speed varies from trial to trial, and from set to set by `slower`."""
    seconds = 0.5 * slower * (1 + random.Random(f"{cell.cell_id}{trial}{slower}").gauss(0, noise))
    made = make_record(cell, trial, seconds=seconds, **rest)
    known = made.provenance | {"versions": made.provenance["versions"] | (versions or {})}
    return dataclasses.replace(made, provenance=known)


def folder(root: Path, name: str, *records: Record) -> Path:
    for item in records:
        save_record(item, root / name / "records" / item.cell_id / f"{item.trial}.json")
    return root / name


def both(root: Path, before: list[Record], after: list[Record]) -> tuple[Path, Path]:
    return folder(root, "baseline", *before), folder(root, "candidate", *after)


def with_losses(item: Record, losses: list[float]) -> Record:
    return dataclasses.replace(item, parts=[dataclasses.replace(part, series=part.series | {"loss": losses}) for part in item.parts])


def losses_of(item: Record) -> list[float]:
    return item.parts[0].series["loss"]


def test_a_set_against_itself_is_equal_and_no_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = both(tmp_path, [record(NAIVE, k) for k in range(7)], [record(NAIVE, k) for k in range(7)])
    assert compare(*sets) == 0
    [change] = compare_sets(*sets).cells
    assert (change.verdict, change.losses.state if change.losses else "") == ("equal", "identical")
    assert "1 cell is compared, 0 regressions, 1 equal." in capsys.readouterr().out


def test_a_slowdown_of_five_percent_at_seven_trials_is_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = both(tmp_path, [record(NAIVE, k) for k in range(7)], [record(NAIVE, k, slower=1.06) for k in range(7)])
    assert compare(*sets) == 1
    [change] = compare_sets(*sets).cells
    assert change.verdict == "slower"
    assert change.regressions[0].startswith("slower: 0.9")
    assert f"`{NAIVE.cell_id}`: slower: 0.9" in capsys.readouterr().out


def test_the_same_slowdown_in_three_trials_is_no_claim_and_no_regression(tmp_path: Path) -> None:
    sets = both(tmp_path, [record(NAIVE, k) for k in range(3)], [record(NAIVE, k, slower=1.06) for k in range(3)])
    assert compare(*sets) == 0
    [change] = compare_sets(*sets).cells
    assert change.verdict == "no claim (n=3)"
    assert change.step_time is not None
    assert len(change.step_time.points) == 3


def test_a_speedup_is_faster_and_no_regression(tmp_path: Path) -> None:
    sets = both(tmp_path, [record(NAIVE, k) for k in range(7)], [record(NAIVE, k, slower=0.9) for k in range(7)])
    assert compare(*sets) == 0
    assert compare_sets(*sets).cells[0].verdict == "faster"


def test_cells_of_one_setting_are_one_family(tmp_path: Path) -> None:
    """Six pairs suffice for one comparison and not for three of which one differs."""
    cells = [NAIVE, ZERO2, make_cell("sft", "ddp", device="cuda", model="bloom-560m", precision="bf16-master", steps=60)]
    before = [record(cell, k, noise=0.001) for cell in cells for k in range(6)]
    after = [record(cell, k, noise=0.001, slower=1.2 if cell is ZERO2 else 1.0) for cell in cells for k in range(6)]
    family = {change.cell.strategy: change.verdict for change in compare_sets(*both(tmp_path, before, after)).cells}
    assert family == {"naive": "equal", "ddp": "equal", "zero2": "no claim (n=6, needs 7)"}
    lone = both(
        tmp_path / "lone", [it for it in before if it.cell["strategy"] == "zero2"], [it for it in after if it.cell["strategy"] == "zero2"]
    )
    assert [change.verdict for change in compare_sets(*lone).cells] == ["slower"]


def test_an_outcome_that_was_ok_and_is_not_is_a_regression_with_its_reason(tmp_path: Path) -> None:
    broken = record(NAIVE, 1, outcome="oom", reason="rank 0 asked for 20 GiB in /home/me/run/x.py\nmore")
    [change] = compare_sets(*both(tmp_path, [record(NAIVE, 0), record(NAIVE, 1)], [record(NAIVE, 0), broken])).cells
    assert change.regressions == ("trial 1 was ok and is oom: rank 0 asked for 20 GiB in …/x.py",)


def test_a_failure_that_was_there_before_is_none(tmp_path: Path) -> None:
    sets = both(tmp_path, [record(NAIVE, outcome="oom", reason="x")], [record(NAIVE, outcome="oom", reason="x")])
    assert compare(*sets) == 0
    assert compare_sets(*sets).cells[0].verdict == "no claim (no pair of ok trials)"


def test_a_cell_that_failed_and_is_ok_now_is_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(*both(tmp_path, [record(NAIVE, outcome="oom", reason="x")], [record(NAIVE)])) == 0
    out = capsys.readouterr().out
    assert "1 cell was mended" in out
    assert "oom → ok" in out


def test_a_loss_outside_its_band_is_a_regression(tmp_path: Path) -> None:
    good = record(NAIVE)
    high = with_losses(good, [value * 1.2 for value in losses_of(good)])
    [change] = compare_sets(*both(tmp_path, [good], [high])).cells
    assert change.losses is not None
    assert change.losses.state == "outside"
    assert change.regressions[0].startswith("losses outside the band: points: ")


def test_a_loss_that_rounding_moved_is_inside(tmp_path: Path) -> None:
    good = record(NAIVE)
    sets = both(tmp_path, [good], [with_losses(good, [value * 1.001 for value in losses_of(good)])])
    assert compare(*sets) == 0
    losses = compare_sets(*sets).cells[0].losses
    assert losses is not None
    assert (losses.state, losses.text[:26]) == ("inside", "largest deviation 1.0e-03 ")


def test_the_worst_of_the_trials_decides_on_the_losses(tmp_path: Path) -> None:
    before = [record(NAIVE, k) for k in range(3)]
    after = [before[0], with_losses(before[1], [value * 1.2 for value in losses_of(before[1])]), before[2]]
    losses = compare_sets(*both(tmp_path, before, after)).cells[0].losses
    assert losses is not None
    assert losses.state == "outside"


def test_losses_that_do_not_vary_are_undefined_and_never_a_pass(tmp_path: Path) -> None:
    still = with_losses(record(NAIVE), [0.0] * 60)
    losses = compare_sets(*both(tmp_path, [still], [still])).cells[0].losses
    assert losses is not None
    assert losses.state == "undefined"


def test_ppo_curves_are_held_to_the_first_iteration_only(tmp_path: Path) -> None:
    """Two steps an iteration: what later iterations learn depends on sampled tokens."""
    good = record(PPO)
    curve = losses_of(good)
    later = with_losses(good, [*curve[:2], *[value + 0.3 for value in curve[2:]]])
    first = with_losses(good, [curve[0], curve[1] + 0.3, *curve[2:]])
    assert [item.losses.state for item in compare_sets(*both(tmp_path / "a", [good], [later])).cells if item.losses] == ["inside"]
    assert [item.losses.state for item in compare_sets(*both(tmp_path / "b", [good], [first])).cells if item.losses] == ["outside"]


@pytest.mark.parametrize("how", [{"emulated": True}, {"launcher": "fork"}, {"simulated_nodes": True}])
def test_times_that_mean_nothing_are_never_compared(tmp_path: Path, how: dict[str, Any]) -> None:
    """Ten times slower and twice the memory: still no word on either, while losses and outcomes are compared."""
    before, after = ([record(NAIVE, k, slower=slower, **how) for k in range(7)] for slower in (1.0, 10.0))
    sets = both(tmp_path, before, after)
    assert compare(*sets) == 0
    [change] = compare_sets(*sets).cells
    assert change.verdict.startswith("not compared (")
    assert (change.speed, change.step_time, change.memory) == (None, None, None)
    assert change.losses is not None
    assert change.losses.state == "identical"


def test_memory_is_shown_and_decides_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = record(NAIVE)
    large = dataclasses.replace(good, observed=good.observed | {"device_memory_peak_bytes": {"GPU-0": 2 * int(6.5 * 2**30)}})
    assert compare(*both(tmp_path, [good], [large])) == 0
    assert "2.000 !" in capsys.readouterr().out


def test_other_versions_are_refused_with_a_list_unless_allowed(tmp_path: Path) -> None:
    sets = both(tmp_path, [record(NAIVE), record(ZERO2)], [record(NAIVE, versions={"torch": "2.14.0", "triton": "3.5"}), record(ZERO2)])
    with pytest.raises(UserError) as error:
        compare(*sets)
    assert "  torch: 2.13.0 / 2.14.0 (1 of 2 cells)" in str(error.value)
    assert "  triton: none / 3.5 (1 of 2 cells)" in str(error.value)
    assert "--allow-differences" in str(error.value)
    assert error.value.exit_code == 2
    assert compare(*sets, allow_differences=True) == 0


def test_another_scheduler_version_or_commit_is_no_difference(tmp_path: Path) -> None:
    other = record(NAIVE, versions={"snakemake": "99"})
    source = other.provenance["source"] | {"commit": "f" * 40, "package_sha256": "e" * 64}
    assert compare(*both(tmp_path, [record(NAIVE)], [dataclasses.replace(other, provenance=other.provenance | {"source": source})])) == 0


def changed(item: Record, **source: Any) -> Record:
    return dataclasses.replace(item, provenance=item.provenance | {"source": item.provenance["source"] | source})


def test_another_lock_counts_for_its_own_devices_only(tmp_path: Path) -> None:
    before, after = (changed(record(NAIVE), locks={"cpu.lock": value * 64, "cuda.lock": "c" * 64}) for value in "ab")
    assert compare(*both(tmp_path / "a", [before], [after])) == 0
    before, after = (changed(record(NAIVE), locks={"cuda.lock": value * 64}) for value in "ab")
    with pytest.raises(UserError, match=r"cuda\.lock: aaaaaaaaaaaa / bbbbbbbbbbbb"):
        compare(*both(tmp_path / "b", [before], [after]))


def test_another_precision_is_paired_only_to_be_refused_or_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_cell("sft", "naive", device="cuda", model="bloom-560m", precision="bf16-pure", steps=60)
    sets = both(tmp_path, [record(NAIVE)], [record(other)])
    with pytest.raises(UserError, match="precision: bf16-master / bf16-pure"):
        compare(*sets)
    assert compare(*sets, allow_differences=True) == 0
    assert "- precision: bf16-master / bf16-pure (1 cell; baseline / candidate)" in capsys.readouterr().out


def test_another_device_is_refused(tmp_path: Path) -> None:
    good = record(NAIVE)
    other = dataclasses.replace(
        good, parts=[dataclasses.replace(part, facts=part.facts | {"device_name": "NVIDIA A100"}) for part in good.parts]
    )
    with pytest.raises(UserError, match="device name: NVIDIA H100 80GB HBM3 / NVIDIA A100"):
        compare(*both(tmp_path, [good], [other]))


def test_other_data_under_the_same_name_is_refused(tmp_path: Path) -> None:
    good = record(NAIVE)
    other = dataclasses.replace(
        good, inputs=[dataclasses.replace(item, sha256="d" * 64) if item.name == "synthetic-instruct" else item for item in good.inputs]
    )
    with pytest.raises(UserError, match=r"data: [0-9a-f]{12} / dddddddddddd"):
        compare(*both(tmp_path, [good], [other]))


def other_batch(strategy: str = "naive", **rest: Any) -> Cell:
    return make_cell(
        "sft", strategy, **{"device": "cuda", "model": "bloom-560m", "precision": "bf16-master", "steps": 60, "micro_batch": 4} | rest
    )


def test_another_setting_is_refused_and_named_unless_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A larger micro-batch: tokens/s may be compared on demand, losses are not expected to be the same."""
    fast = [record(other_batch(), k, slower=0.8) for k in range(7)]
    sets = both(tmp_path, [record(NAIVE, k) for k in range(7)], [with_losses(item, [9.0] * 60) for item in fast])
    with pytest.raises(UserError, match=r"  micro_batch: 2 / 4 \(1 of 1 cells\)"):
        compare(*sets)
    assert compare(*sets, allow_differences=True) == 0
    [change] = compare_sets(*sets).cells
    assert (change.verdict, change.losses) == ("faster", None)
    assert "- micro_batch: 2 / 4 (1 cell; baseline / candidate)" in capsys.readouterr().out


def test_cells_of_the_same_axes_are_paired_only_where_there_is_no_doubt(tmp_path: Path) -> None:
    """Two candidates could be the baseline's other one; ZERO2 is the same in both."""
    after = [record(ZERO2), record(other_batch()), record(other_batch(micro_batch=8))]
    changes = compare_sets(*both(tmp_path, [record(ZERO2), record(NAIVE)], after))
    assert [change.cell.strategy for change in changes.cells] == ["zero2"]
    assert (len(changes.only_baseline), len(changes.only_candidate)) == (1, 2)


def test_sets_without_a_common_cell_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no cell in common; seen: 1 and 1 cells, of which no two share stage, model"):
        compare(*both(tmp_path, [record(NAIVE)], [record(ZERO2)]))


def test_folders_without_records_are_refused(tmp_path: Path) -> None:
    good = folder(tmp_path, "good", record(NAIVE))
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "plan.json").write_text("{}")
    with pytest.raises(UserError, match=r"no valid record; seen: 1 other JSON files, first plan\.json"):
        compare(good, tmp_path / "plans")
    with pytest.raises(UserError, match="there is no such folder"):
        compare(tmp_path / "nowhere", good)
    with pytest.raises(UserError, match="no folder of records; seen: a file"):
        compare(tmp_path / "plans" / "plan.json", good)


def test_what_is_not_compared_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = both(tmp_path, [record(NAIVE, 0), record(NAIVE, 1), record(ZERO2)], [record(NAIVE, 0), record(PPO)])
    (sets[1] / "records" / "half.json").write_text("{")
    assert compare(*sets) == 0
    out = capsys.readouterr().out
    assert f"- `{ZERO2.cell_id}`: in the baseline only" in out
    assert f"- `{PPO.cell_id}`: in the candidate only" in out
    assert f"- `{NAIVE.cell_id}`: the candidate lacks trial 1" in out
    assert "- `half.json`: " in out


def test_a_folder_of_many_other_files_names_the_first_ones_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = both(tmp_path, [record(NAIVE)], [record(NAIVE)])
    for number in range(30):
        (sets[1] / "records" / f"other{number:02}.json").write_text("{}")
    assert compare(*sets) == 0
    out = capsys.readouterr().out
    assert out.count("- `other") == 20
    assert "- `other00.json`: not a record; at cell: Field required; seen: '{}'" in out
    assert "- 10 more files that are no records" in out


def test_a_folder_in_place_of_a_file_to_write_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written; seen: a folder"):
        compare(tmp_path / "nowhere", tmp_path / "nowhere", junit=tmp_path)


def test_a_reference_folder_with_cells_right_below_is_read_too(tmp_path: Path) -> None:
    item = record(NAIVE)
    save_record(item, tmp_path / "references" / "h100" / "suite" / item.cell_id / "0.json")
    assert compare(tmp_path / "references" / "h100" / "suite", folder(tmp_path, "candidate", item)) == 0


def test_the_markdown_is_one_table_a_stage_whatever_stands_in_reasons(tmp_path: Path) -> None:
    broken = record(NAIVE, outcome="error", reason="a | b\nc")
    compare(*both(tmp_path, [record(NAIVE), record(PPO)], [broken, record(PPO)]), markdown=tmp_path / "out" / "changes.md")
    text = (tmp_path / "out" / "changes.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {9}
    assert len(rows) == 6
    assert "a \\| b" in text


def test_the_junit_file_has_failures_for_regressions_and_skips_for_the_rest(tmp_path: Path) -> None:
    broken = record(NAIVE, outcome="error", reason="rank 0: <bad> & \x00\x1b[31m text")
    sets = both(tmp_path, [record(NAIVE), record(ZERO2), record(PPO)], [broken, record(PPO)])
    assert compare(*sets, junit=tmp_path / "junit.xml") == 1
    root = ET.parse(tmp_path / "junit.xml").getroot()
    assert {key: root.get(key) for key in ("tests", "failures", "skipped", "errors")} == {
        "tests": "3",
        "failures": "1",
        "skipped": "1",
        "errors": "0",
    }
    assert [(suite.get("name"), suite.get("tests")) for suite in root] == [("sft", "2"), ("ppo", "1")]
    failure = root.find(".//failure")
    assert failure is not None
    assert (
        failure.get("message") == "trial 0 was ok and is error: rank 0: <bad> & \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}[31m text"
    )
    assert [case.get("name") for case in root.iter("testcase") if case.find("skipped") is not None] == [ZERO2.cell_id]


def test_the_text_does_not_depend_on_the_order_of_files(tmp_path: Path) -> None:
    items = [record(cell, k) for cell in (NAIVE, ZERO2, PPO) for k in range(2)]
    texts = []
    for name, order in (("a", items), ("b", items[::-1])):
        compare(*both(tmp_path / name, order, order), markdown=tmp_path / f"{name}.md")
        texts.append((tmp_path / f"{name}.md").read_text(encoding="utf-8").split("\n", 1)[1])
    assert texts[0] == texts[1]


# -- what may not be compared ------------------------------------------------------------------------------------


def card(item: Record, name: str) -> Record:
    return dataclasses.replace(item, parts=[dataclasses.replace(part, facts=part.facts | {"device_name": name}) for part in item.parts])


def test_devices_that_are_mixed_in_both_sets_are_refused_although_both_have_the_same_ones(tmp_path: Path) -> None:
    before = [card(record(NAIVE, 0), "NVIDIA A100"), card(record(NAIVE, 1), "NVIDIA H100")]
    after = [card(record(NAIVE, 0), "NVIDIA H100"), card(record(NAIVE, 1), "NVIDIA A100")]
    with pytest.raises(UserError, match="device name: NVIDIA A100 and NVIDIA H100 / NVIDIA A100 and NVIDIA H100"):
        compare(*both(tmp_path, before, after))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"container": "coati-bench-cuda-0123.sif"}, r"image: none / coati-bench-cuda-0123\.sif"),
        ({"devices": [{"power_limit_watts": 350.0}]}, "power limit: 700 W / 350 W"),
    ],
)
def test_another_image_or_power_limit_is_refused(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    machine = {"hostname": "n", "container": None, "devices": [{"power_limit_watts": 700.0}]}
    good = record(NAIVE)
    before, after = (dataclasses.replace(good, provenance=good.provenance | {"machines": [found]}) for found in (machine, machine | change))
    with pytest.raises(UserError, match=text):
        compare(*both(tmp_path, [before], [after]))


def test_a_struck_row_is_never_faster_and_is_a_regression(tmp_path: Path) -> None:
    """zero2 of the candidate is twice as fast and learns something else than its naive; the baseline's did not."""
    before = [record(cell, k) for cell in (NAIVE, ZERO2) for k in range(7)]
    good, fast = [record(NAIVE, k) for k in range(7)], [record(ZERO2, k, slower=0.5) for k in range(7)]
    after = [*good, *[with_losses(item, [value * 1.06 for value in losses_of(item)]) for item in fast]]
    sets = both(tmp_path, before, after)
    [naive, zero2] = compare_sets(*sets).cells
    assert (zero2.verdict, zero2.speed, zero2.memory, zero2.step_time) == ("struck", None, None, None)
    assert zero2.regressions[0].startswith("struck: first loss deviates by 6.0e-02")
    assert (naive.verdict, naive.regressions) == ("equal", ())
    assert compare(*sets) == 1


def test_against_a_struck_baseline_no_speed_is_compared(tmp_path: Path) -> None:
    bad = [with_losses(record(ZERO2, k), [value * 1.06 for value in losses_of(record(ZERO2, k))]) for k in range(7)]
    naive = [record(NAIVE, k) for k in range(7)]
    zero2 = compare_sets(*both(tmp_path, [*naive, *bad], [*naive, *[record(ZERO2, k, slower=0.5) for k in range(7)]])).cells[1]
    assert zero2.speed is None
    assert zero2.verdict.startswith("not compared (the baseline is struck: first loss deviates by 6.0e-02")
    assert zero2.regressions == ()  # losses other than wrong ones are none


def test_numbers_that_cannot_be_true_are_struck(tmp_path: Path) -> None:
    good = record(NAIVE)
    small = [dataclasses.replace(part, facts=part.facts | {"device_total_bytes": 2**30}) for part in good.parts]
    [change] = compare_sets(*both(tmp_path, [good], [dataclasses.replace(good, parts=small)])).cells
    assert change.verdict == "struck"
    assert change.regressions == ("struck: memory above the card: 4.0 GiB, the card has 1.0 GiB",)


# -- reference bands ---------------------------------------------------------------------------------------------


def against_reference(root: Path, stored: list[Record], after: list[Record]) -> tuple[Path, Path]:
    return folder(root / "references" / "h100", "suite", *stored), folder(root, "candidate", *after)


def test_against_a_reference_a_single_trial_above_its_band_is_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One trial can claim nothing; the band of 5 % is a declared one."""
    stored = [record(NAIVE, k, noise=0.001) for k in range(3)]
    sets = against_reference(tmp_path, stored, [record(NAIVE, 0, slower=1.08, noise=0.001)])
    assert compare(*sets, junit=tmp_path / "junit.xml") == 1
    out = capsys.readouterr().out
    assert "1 outside the reference band" in out
    assert f"`{NAIVE.cell_id}`: outside the reference band: step time 0.54" in out
    assert "above 0.50" in out
    assert "of 3 records; allowed 5%" in out
    assert 'failures="1"' in (tmp_path / "junit.xml").read_text(encoding="utf-8")
    assert compare(*both(tmp_path / "plain", stored, [record(NAIVE, 0, slower=1.08, noise=0.001)])) == 0


def test_against_a_reference_less_time_is_outside_and_no_regression(tmp_path: Path) -> None:
    sets = against_reference(tmp_path, [record(NAIVE)], [record(NAIVE, slower=0.8)])
    assert compare(*sets) == 0
    assert compare_sets(*sets).cells[0].band == "outside"


def test_against_a_reference_the_same_is_inside(tmp_path: Path) -> None:
    sets = against_reference(tmp_path, [record(NAIVE)], [record(NAIVE)])
    assert compare(*sets) == 0
    assert compare_sets(*sets).cells[0].band == "inside"


def test_against_a_reference_more_memory_is_a_regression(tmp_path: Path) -> None:
    good = record(NAIVE)
    large = dataclasses.replace(good, observed=good.observed | {"device_memory_peak_bytes": {"GPU-0": 2 * int(6.5 * 2**30)}})
    [change] = compare_sets(*against_reference(tmp_path, [good], [large])).cells
    assert change.regressions[0].startswith("outside the reference band: device memory 13.00 GiB, 100.0% above 6.500 of 1 record")


def test_losses_that_do_not_vary_leave_the_band_undefined(tmp_path: Path) -> None:
    still = with_losses(record(NAIVE), [3.0] * 60)
    assert compare_sets(*against_reference(tmp_path, [still], [still])).cells[0].band == "undefined"
