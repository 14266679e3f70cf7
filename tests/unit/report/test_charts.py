"""What a reader sees of charts: whole labels, lines that differ, bars in order, units; and of the page on paper and by keyboard."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from bench.report.commands import report
from bench.report.plots import STYLES
from bench.report.svg import DASHES, MOST_SETTINGS, NAME_CHARACTER, SETTINGS_CHARACTER, Bar, Change, bar_chart, change_chart, settings_lines
from bench.strategies.base import all_strategies
from tests.unit.report.trial_factory import make_cell, make_record, quick_suite, write

TEMPLATES = Path(__file__).parents[3] / "bench" / "report" / "templates"
LONG = "tensor_parallel 1, pipeline_parallel 1"
TEXT = re.compile(r'<text class="(bar-label|bar-settings)" x="(\d+)" y="[\d.]+" text-anchor="end">([^<]*)</text>')


def colours() -> dict[int, str]:
    """Style -> the colour it has in report.css."""
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    rules = re.findall(r"((?:\.s\d+,? ?)+)\{ --c: var\(--(s\d+)\); \}", css)
    return {int(style): colour for styles, colour in rules for style in re.findall(r"\d+", styles)}


def labels(page: str) -> list[str]:
    """Names and settings below them, in order, each name starting a new entry."""
    found: list[str] = []
    for kind, _, text in TEXT.findall(page):
        if kind == "bar-label":
            found.append(text)
        else:
            found[-1] += f" {text}"
    return found


@pytest.mark.parametrize("settings", [LONG, f"global_batch 32, {LONG}, activation_checkpointing true", "one_setting " + "x" * 90])
def test_labels_of_bars_and_changes_are_whole(settings: str) -> None:
    names = ["hybrid 1 × 2", "deepspeed_zero2 2 × 8 modified"]
    bars = bar_chart([Bar(name, (("median", 2.0, 1),), settings=settings) for name in names], title="t", unit="s")
    changes = change_chart([Change(name, 1.0, 2.0, 1, settings=settings) for name in names], title="t", unit="s")
    for svg in (bars, changes):
        texts = TEXT.findall(svg)
        assert [text for kind, _, text in texts if kind == "bar-label"] == names
        for kind, end, text in texts:
            assert len(text) * (NAME_CHARACTER if kind == "bar-label" else SETTINGS_CHARACTER) <= int(end), text
        assert f"{names[0]} {settings}" in svg  # the title has what a line is too short for


def test_settings_too_long_for_a_line_keep_both_ends() -> None:
    (line,) = settings_lines("data_" + "x" * 60 + " 7")
    assert len(line) < MOST_SETTINGS
    assert line.startswith("data_x")
    assert "…" in line
    assert line.endswith("x 7")


def test_rows_with_settings_do_not_overlap_the_next() -> None:
    svg = bar_chart(
        [Bar("a", (("median", 1.0, 1),), settings=f"global_batch 32, {LONG}"), Bar("b", (("median", 1.0, 1),))], title="t", unit="s"
    )
    heights = [float(y) for y in re.findall(r'class="bar-(?:label|settings)" x="\d+" y="([\d.]+)"', svg)]
    assert all(after - before >= 11 for before, after in pairwise(heights))


def test_no_two_styles_share_colour_and_dash() -> None:
    known = colours()
    assert set(known) == set(range(STYLES))
    assert len({(known[style], dash) for style, dash in enumerate(DASHES)}) == STYLES >= 16


def test_fifteen_strategies_are_told_apart_in_lines_and_legend(tmp_path: Path) -> None:
    names = sorted(all_strategies())
    write(tmp_path / "records", *(make_record(make_cell("sft", name)) for name in names))
    page = report(tmp_path / "records", tmp_path / "out").html.read_text(encoding="utf-8")
    known = colours()
    figure = page.split("<h3>Training loss</h3>")[1].split("</figure>")[0]
    legend, panels = figure.split("</ul>")
    lines = re.findall(
        r'<g class="curve s(\d+)" data-strategy="(\w+)">.*?<polyline points="[^"]*"(?: stroke-dasharray="([^"]*)")?/>', panels
    )
    keys = re.findall(
        r'<li class="s(\d+)" data-strategy="(\w+)">.*?<polyline points="[^"]*"(?: stroke-dasharray="([^"]*)")?/>', legend, flags=re.DOTALL
    )
    assert len({(known[int(style)], dash) for style, _, dash in lines}) == len(names) >= 15
    assert sorted(keys) == sorted(lines)


def test_bars_stand_by_strategy_and_then_by_their_settings(tmp_path: Path) -> None:
    cells = [make_cell("sft", name, device="cuda", micro_batch=batch) for batch in (32, 4, 16, 8) for name in ("ddp", "naive", "zero2")]
    write(tmp_path / "records", *map(make_record, cells))
    page = report(tmp_path / "records", tmp_path / "out").html.read_text(encoding="utf-8")
    shown = labels(page.split("<h3>Throughput</h3>")[1].split("</figure>")[0])
    assert shown == [f"{name} micro_batch {batch}" for name in ("naive", "ddp", "zero2") for batch in (4, 8, 16, 32)]


def test_axes_say_their_units(tmp_path: Path) -> None:
    write(tmp_path / "records", *quick_suite())
    page = report(tmp_path / "records", tmp_path / "out").html.read_text(encoding="utf-8")
    axes = set(re.findall(r'<text class="axis"[^>]*>([^<]*)</text>', page))
    assert {"loss (nats)", "relative deviation", "KL (nats)", "reward", "policy loss"} <= axes
    assert not {"loss", "deviation", "kl"} & axes


def test_what_is_folded_is_opened_for_paper_with_and_without_scripts() -> None:
    script, style = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.js", "report.css"))
    assert re.search(r'addEventListener\("beforeprint".*?details:not\(\[open\]\).*?open = true', script, flags=re.DOTALL)
    assert re.search(r'addEventListener\("afterprint".*?open = false', script, flags=re.DOTALL)
    assert "details::details-content { content-visibility: visible;" in style.split("@media print")[1]


def test_every_table_has_a_caption_and_every_region_that_scrolls_takes_the_focus(tmp_path: Path) -> None:
    write(tmp_path / "records", *quick_suite())
    page = report(tmp_path / "records", tmp_path / "out").html.read_text(encoding="utf-8")
    assert page.count("<table") == len(re.findall(r"<table[^>]*>\s*<caption>[^<]+</caption>", page)) > 5
    regions = re.findall(r'<div class="(?:sheet|chart)[^>]*>', page)
    assert len(regions) > 10
    assert all(re.search(r' tabindex="0" role="(region|group)" aria-label="[^"]+"', region) for region in regions)
    assert not [span for span in re.findall(r"<span [^>]*aria-label=[^>]*>", page) if 'role="img"' not in span]
