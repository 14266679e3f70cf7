"""What a report ranks and claims: verdict, interval and number of pairs where it may, nothing of rows that are struck."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench.matrix import save_plan
from bench.record import Record
from bench.report.analysis import Analysis, CellResult, read_analysis
from bench.report.commands import report
from bench.report.headline import answers, sentences
from bench.report.page import make_page
from bench.report.plots import _gaps, stage_figures
from bench.report.ranking import Leaders, ranked_sets
from bench.report.tables import claim_cell, ratio_cell
from tests.unit.report.trial_factory import make_cell, make_plan, make_record, write

TRIALS = 7
SECONDS = {"naive": 1.0, "ddp": 1.02, "zero2": 1.25, "gemini": 0.1}
"""gemini would be ten times as fast as naive, which is what the struck rows below pretend."""


def measured(strategy: str, trial: int, seconds: float | None = None) -> Record:
    cell = make_cell("sft", strategy, device="cuda", model="bloom-560m", precision="bf16-master", steps=100)
    return make_record(cell, trial, seconds=(seconds or SECONDS[strategy]) * (1 + 0.004 * (trial % 3)), noise=2e-4)


def suite(*, without: str = "") -> list[Record]:
    return [measured(strategy, trial) for strategy in SECONDS if strategy != without for trial in range(TRIALS)]


def edited(record: Record, *, series: dict[str, Any] | None = None, facts: dict[str, Any] | None = None, **part: Any) -> Record:
    parts = [dataclasses.replace(it, series=it.series | (series or {}), facts=it.facts | (facts or {}), **part) for it in record.parts]
    return dataclasses.replace(record, parts=parts)


def other_losses(record: Record) -> Record:
    return edited(record, series={"loss": [value * 1.4 for value in record.parts[0].series["loss"]]})


def other_weights(record: Record) -> Record:
    return edited(record, facts={"initial_weights_sha256": "f" * 64})


def trained_nothing(record: Record) -> Record:
    laps = [dataclasses.replace(lap, counts=lap.counts | {"loss_tokens": 0}) for lap in record.parts[0].laps]
    return edited(record, series={"loss": [0.0] * 100}, laps=laps)


def more_memory_than_the_card(record: Record) -> Record:
    return edited(record, facts={"device_total_bytes": 2**30})


STRIKES = [other_losses, other_weights, trained_nothing, more_memory_than_the_card]


def analysed(folder: Path, records: list[Record], references: Path | None = None) -> Analysis:
    return read_analysis(write(folder / "suite" / "records", *records), references=references)


def of(analysis: Analysis, strategy: str) -> CellResult:
    [result] = [result for result in analysis.results if result.cell.strategy == strategy]
    return result


def assert_never_ranked(analysis: Analysis, strategy: str) -> None:
    """Neither in a ranking nor with a ratio or a verdict; shown with its reason."""
    result = of(analysis, strategy)
    assert (result.verdict, result.comparison, result.ranked) == ("struck", None, False)
    assert (claim_cell(result).text, ratio_cell(result).text) == ("struck", "–")
    for item in ranked_sets(analysis.results):
        assert result not in item.results
    for answer in answers(analysis):
        assert strategy not in f"{answer.fastest} {answer.leanest}"
    assert not [text for text in sentences(analysis) if "highest throughput" in text and strategy in text]
    assert [notice for notice in make_page(analysis).struck if any(strategy in cell for cell in notice.cells)]


def test_the_fastest_strategy_wins_as_long_as_nothing_strikes_it(tmp_path: Path) -> None:
    analysis = analysed(tmp_path, suite())
    assert (of(analysis, "gemini").verdict, of(analysis, "zero2").verdict, of(analysis, "ddp").verdict) == ("faster", "slower", "equal")
    assert answers(analysis)[0].fastest == "gemini"


@pytest.mark.parametrize("strike", STRIKES)
def test_a_struck_row_is_never_ranked_however_fast_it_looks(tmp_path: Path, strike: Any) -> None:
    records = [strike(record) if record.cell["strategy"] == "gemini" else record for record in suite()]
    analysis = analysed(tmp_path, records)
    assert_never_ranked(analysis, "gemini")
    assert answers(analysis)[0].fastest == "naive (ddp within 3 %)"
    assert (of(analysis, "zero2").verdict, of(analysis, "ddp").verdict) == ("slower", "equal")


@pytest.mark.parametrize("strike", STRIKES)
def test_one_struck_trial_of_seven_strikes_the_row(tmp_path: Path, strike: Any) -> None:
    last = [record for record in suite() if record.cell["strategy"] == "gemini"][-1]
    analysis = analysed(tmp_path, [*[record for record in suite() if record != last], strike(last)])
    assert_never_ranked(analysis, "gemini")


@pytest.mark.parametrize("strike", [trained_nothing, more_memory_than_the_card])
def test_against_a_struck_naive_nothing_is_claimed(tmp_path: Path, strike: Any) -> None:
    analysis = analysed(tmp_path, [strike(record) if record.cell["strategy"] == "naive" else record for record in suite()])
    assert_never_ranked(analysis, "naive")
    assert {of(analysis, name).comparison for name in ("ddp", "zero2", "gemini")} == {None}
    assert all(of(analysis, name).verdict.startswith(("no claim", "struck")) for name in ("ddp", "zero2", "gemini"))


def test_losses_other_than_the_stored_ones_strike_a_row(tmp_path: Path) -> None:
    """All strategies agree with each other, so parity has nothing against them; the stored records have."""
    write(tmp_path / "references" / "h100" / "suite" / "records", *[other_losses(measured("gemini", trial)) for trial in range(TRIALS)])
    analysis = analysed(tmp_path, suite(), tmp_path / "references")
    assert {parity.state for parity in analysis.parities.values()} == {"reference", "agrees"}
    assert_never_ranked(analysis, "gemini")
    [notice] = make_page(analysis).struck
    assert notice.reason.startswith("outside the reference band: points: 100 of 100 points outside")


def test_a_struck_row_shows_in_the_report_with_a_dash_for_its_ratio(tmp_path: Path) -> None:
    records = [other_losses(record) if record.cell["strategy"] == "gemini" else record for record in suite()]
    write(tmp_path / "suite" / "records", *records)
    lines = report(tmp_path / "suite", tmp_path / "out").markdown.read_text(encoding="utf-8").splitlines()
    [row] = [line for line in lines if line.startswith("| gemini") and "struck" in line]
    assert "10.0" not in row


# -- who leads, and how far that is believed ---------------------------------------------------------------------


def with_watts(record: Record, watts: float) -> Record:
    machine = record.provenance["machines"][0] | {"devices": [{"power_limit_watts": watts}]}
    return dataclasses.replace(record, provenance=record.provenance | {"machines": [machine]})


def fastest(analysis: Analysis) -> Leaders:
    [item] = ranked_sets(analysis.results)
    assert item.fastest is not None
    return item.fastest


@pytest.mark.parametrize("with_naive", [True, False])
def test_nobody_leads_over_what_ran_under_other_conditions(tmp_path: Path, with_naive: bool) -> None:
    records = [with_watts(record, 700.0 if record.cell["strategy"] == "gemini" else 350.0) for record in suite()]
    analysis = analysed(tmp_path, [record for record in records if with_naive or record.cell["strategy"] != "naive"])
    leaders = fastest(analysis)
    assert (leaders.results[0].cell.strategy, leaders.left_out) == ("naive" if with_naive else "ddp", ("gemini",))
    assert "under other conditions: gemini" in next(text for text in sentences(analysis) if "highest throughput" in text)
    assert "not ranked, under other conditions: gemini" in answers(analysis)[0].fastest_note


def test_a_lead_is_backed_by_its_own_verdict_and_by_no_other(tmp_path: Path) -> None:
    """gemini alone ran once, so what is said of zero2 backs nothing."""
    assert fastest(analysed(tmp_path / "all", suite())).backed
    once = [record for record in suite() if record.cell["strategy"] != "gemini" or record.trial == 0]
    analysis = analysed(tmp_path / "once", once)
    assert (of(analysis, "gemini").verdict, of(analysis, "zero2").verdict) == ("no claim (n=1)", "slower")
    assert not fastest(analysis).backed
    assert "highest throughput gemini (observed)" in next(text for text in sentences(analysis) if "highest throughput" in text)


def test_naive_leads_for_certain_only_where_every_other_is_slower_or_equal(tmp_path: Path) -> None:
    records = [record for record in suite() if record.cell["strategy"] in ("naive", "zero2")]
    assert fastest(analysed(tmp_path / "slower", records)).backed
    one = measured("ddp", 0, seconds=1.5)
    analysis = analysed(tmp_path / "unknown", [*records, one])
    assert (fastest(analysis).text, fastest(analysis).backed) == ("naive", False)


def test_memory_is_ranked_by_a_figure_that_all_have(tmp_path: Path) -> None:
    def unseen(record: Record) -> Record:
        return dataclasses.replace(record, observed=record.observed | {"device_memory_peak_bytes": None})

    records = [unseen(record) if record.cell["strategy"] == "zero2" else record for record in suite(without="gemini")]
    [item] = ranked_sets(analysed(tmp_path, records).results)
    assert item.leanest is not None
    assert (item.leanest.metric, item.leanest.left_out) == ("peak_allocated_gib", ())


def test_of_a_strategy_that_fits_by_one_setting_only_the_setting_is_told(tmp_path: Path) -> None:
    cells = [make_cell("sft", optimizer=name, device="cuda", model="bloom-560m", precision="bf16-master") for name in ("adamw", "foreach")]
    records = [make_record(cells[0]), make_record(cells[1], outcome="oom", reason="full")]
    analysis = analysed(tmp_path, records)
    assert sentences(analysis)[0] == "1 of 2 trials ended ok and 1 did not (1 oom: naive [optimizer foreach])."
    full = next(result for result in analysis.results if not result.ok)
    assert (full.summary("theory_peak_gib") is None, full.summary("peak_allocated_gib")) == (
        False,
        None,
    )  # what it needed is known all the same


# -- charts ------------------------------------------------------------------------------------------------------


def test_a_struck_row_has_no_bar(tmp_path: Path) -> None:
    records = [other_losses(record) if record.cell["strategy"] == "gemini" else record for record in suite()]
    bars = [figure for figure in stage_figures(analysed(tmp_path, records), "sft") if figure.title in ("Throughput", "Memory")]
    assert len(bars) == 2
    for figure in bars:
        text = "".join(str(panel) for panel in figure.panels)
        assert "zero2" in text
        assert "gemini" not in text


def test_a_deviation_is_drawn_of_the_trial_that_has_a_partner(tmp_path: Path) -> None:
    """Trial 0 of naive is missing, so trial 0 of ddp has nothing to deviate from."""
    records = [record for record in suite() if record.cell["strategy"] in ("naive", "ddp")]
    analysis = analysed(tmp_path, [record for record in records if (record.cell["strategy"], record.trial) != ("naive", 0)])
    ddp = of(analysis, "ddp")
    parity = analysis.parities[ddp.files[1]]
    assert parity.largest is not None
    assert max(_gaps(analysis, ddp)) <= max(parity.largest, 1e-9) * 10


# -- verdict, interval, number of pairs --------------------------------------------------------------------------


def test_strategies_stand_beside_naive_with_verdict_interval_and_number_of_pairs(tmp_path: Path) -> None:
    analysis = analysed(tmp_path, suite())
    found = {name: (claim_cell(of(analysis, name)).text, ratio_cell(of(analysis, name))) for name in ("ddp", "zero2")}
    assert found["ddp"][0] == "equal"
    assert (found["zero2"][0], found["zero2"][1].text, found["zero2"][1].note) == ("slower", "0.800", "0.800 to 0.800, n = 7")
    assert answers(analysis)[0].fastest_note.endswith("n = 7; faster, 10.000 x naive (10.000 to 10.000, n = 7))")


def test_a_claim_whose_interval_holds_1_is_explained_below_the_table(tmp_path: Path) -> None:
    """Six pairs of seven a fifth slower, one a little faster."""
    times = [1.25] * (TRIALS - 1) + [0.98]
    records = [measured("naive", trial) for trial in range(TRIALS)]
    analysis = analysed(tmp_path, [*records, *(measured("ddp", trial, seconds) for trial, seconds in enumerate(times))])
    assert (claim_cell(of(analysis, "ddp")).text, ratio_cell(of(analysis, "ddp")).note) == ("slower", "0.800 to 1.020, n = 7")
    [page] = make_page(analysis).stages
    assert [note for note in page.notes if note.startswith("A ratio's interval holds 1 beside a claim")]
    assert not [note for note in make_page(analysed(tmp_path / "plain", suite())).stages[0].notes if "holds 1" in note]


def test_below_six_pairs_every_ratio_is_shown_and_nothing_claimed(tmp_path: Path) -> None:
    records = [
        measured(strategy, trial, seconds) for trial in range(3) for strategy, seconds in (("naive", 1.0), ("ddp", 1.1 + trial / 10))
    ]
    result = of(analysed(tmp_path, records), "ddp")
    assert (claim_cell(result).text, ratio_cell(result).note) == ("no claim (n=3)", "0.769 · 0.833 · 0.909")


# -- reference band in the headline ------------------------------------------------------------------------------


def with_references(folder: Path, stored: list[Record], records: list[Record], name: str = "quickstart") -> Analysis:
    write(folder / "references" / "h100" / name / "records", *stored)
    save_plan(make_plan(records, trials=TRIALS), folder / "plan.json")
    return read_analysis(write(folder / "suite" / "records", *records), folder / "plan.json", folder / "references")


def band_sentence(analysis: Analysis) -> str:
    [sentence] = [text for text in sentences(analysis) if "reference band" in text]
    return sentence


def test_a_repeated_reference_suite_is_said_to_lie_inside(tmp_path: Path) -> None:
    records = suite(without="gemini")
    sentence = band_sentence(with_references(tmp_path, records, records))
    assert sentence == "Inside the reference band: all 21 trials with a stored record of this device."


def test_a_slow_strategy_is_said_to_lie_outside_with_cell_and_quantity(tmp_path: Path) -> None:
    slow = [measured("zero2", trial, SECONDS["zero2"] * 1.2) for trial in range(TRIALS)]
    records = [record for record in suite(without="gemini") if record.cell["strategy"] != "zero2"]
    analysis = with_references(tmp_path, suite(without="gemini"), [*records, *slow])
    sentence = band_sentence(analysis)
    assert sentence.startswith("Outside the reference band: 7 of 21 trials with a stored record (14 inside); sft zero2 full: step time ")
    assert "above 1.255 of 7 records; allowed 5%." in sentence
    assert of(analysis, "zero2").verdict == "slower"  # shown as outside, still ranked: its losses are the stored ones


def test_a_reference_suite_without_records_of_this_device_says_so(tmp_path: Path) -> None:
    stored = [edited(record, facts={"device_name": "NVIDIA A100"}) for record in suite()]
    assert band_sentence(with_references(tmp_path, stored, suite())).startswith("No reference band: ")


def test_a_suite_that_is_no_reference_says_nothing_of_bands(tmp_path: Path) -> None:
    stored = [edited(record, facts={"device_name": "NVIDIA A100"}) for record in suite()]
    analysis = with_references(tmp_path, stored, suite(), name="another")
    assert [text for text in sentences(analysis) if "reference band" in text] == []


def test_a_stored_curve_that_does_not_vary_is_not_judged_and_no_pass(tmp_path: Path) -> None:
    still = [edited(measured("naive", trial), series={"loss": [3.0] * 100}) for trial in range(2)]
    assert band_sentence(with_references(tmp_path, still, still)) == "Not judged by the reference band: 2 of 2 trials with a stored record."
