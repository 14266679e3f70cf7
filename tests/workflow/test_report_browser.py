"""The report in a real browser: no network, no errors, no sideways scrolling; sorting and toggles work; scripts are not needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from bench.matrix import save_plan
from bench.report.commands import report
from tests.unit.report.trial_factory import failures, make_cell, make_plan, measured_suite, quick_suite, write

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const rgb = parse(getComputedStyle(at).backgroundColor);
      if (rgb.length === 3 || rgb[3] > 0) return rgb;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const node of document.querySelectorAll("body *:not(script):not(style)")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || node.closest("svg") || !node.getClientRects().length || node.closest(".skip")) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${node.tagName}.${node.className}: ${ratio.toFixed(2)}`);
  }
  return [...new Set(poor)];
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("reports")
    skipped = ((make_cell("sft", "hybrid", lora_rank=2), "hybrid does not offer LoRA with tensor parallelism"),)
    for name, records in (("emulated", quick_suite()), ("measured", [*measured_suite(3), *failures()])):
        write(root / name / "records", *records)
        save_plan(make_plan(records, extra=(make_cell("rm", "zero1"),), skipped=skipped), root / name / "plan.json")
        report(root / name, root / name / "report")
    return {name: root / name / "report" / "report.html" for name in ("emulated", "measured")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not there: the report is not looked at in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield started
        started.close()


class Visit:
    """A page that was opened without a network, and what it asked for and complained about."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        self.context.set_offline(True)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("name", ["emulated", "measured"])
def test_the_page_asks_for_nothing_complains_of_nothing_and_fits(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    with Visit(browser, pages[name], viewport={"width": width, "height": 900}, color_scheme=scheme) as visit:
        assert visit.requests == [pages[name].as_uri()]
        assert visit.complaints == []
        assert visit.page.evaluate("document.documentElement.scrollWidth") == width
        assert visit.page.evaluate(CONTRAST) == []


def first_column(visit: Visit, table: str) -> list[str]:
    return visit.page.locator(f"{table} tbody tr:not(.off) th[scope=row]").all_inner_texts()


HELD_OUT = """() => [...document.querySelectorAll("table.results:not(details table)")].flatMap((table) => {
  const end = table.closest(".sheet").getBoundingClientRect().right;
  const heads = [...table.querySelectorAll("thead th")].filter((head) => head.textContent.includes("held-out"));
  return heads.map((head) => [head.querySelector(".head").textContent.trim(), head.getBoundingClientRect().right <= end]);
})"""


def test_what_training_came_to_on_held_out_rows_is_seen_without_scrolling_a_table(browser: Any, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["emulated"]) as visit:
        seen = visit.page.evaluate(HELD_OUT)
    assert {tuple(head) for head in seen} == {(f"held-out {name}", True) for name in ("loss", "accuracy", "margin", "reward", "kl")}


def test_tables_sort_by_a_click_both_ways(browser: Any, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["measured"]) as visit:
        head = visit.page.locator("#sft table.results:not(details table) thead th", has_text="loss tokens/s")
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "ascending"
        assert first_column(visit, "#sft table.results:not(details table)")[0] == "zero2_cpu"
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "descending"
        names = first_column(visit, "#sft table.results:not(details table)")
        assert names[0] == "naive"
        assert names[-1] == "hybrid"  # what has no value stays last


def test_a_strategy_can_be_hidden_everywhere_and_shown_again(browser: Any, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["emulated"]) as visit:
        button = visit.page.locator("#sft .toggles button", has_text="zero2")
        assert "zero2" in first_column(visit, "#sft table.results:not(details table)")
        button.click()
        assert button.get_attribute("aria-pressed") == "false"
        assert "zero2" not in first_column(visit, "#sft table.results:not(details table)")
        assert visit.page.locator("#ppo g.curve.off").count() > 0
        button.click()
        assert "zero2" in first_column(visit, "#sft table.results:not(details table)")


def test_everything_is_there_without_scripts(browser: Any, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["measured"], java_script_enabled=False) as visit:
        assert visit.page.locator("#sft table.results:not(details table) tbody tr").count() == 17
        assert not visit.page.locator("#sft .toggles").is_visible()


def test_tables_and_figures_have_what_a_screen_reader_needs(browser: Any, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["measured"]) as visit:
        page = visit.page
        assert page.locator("th:not([scope])").count() == 0
        assert page.locator("figure").count() == page.locator("figure > figcaption").count() > 10
        assert page.locator(".panel svg").count() == page.locator(".panel svg[role=img][aria-label]").count()
        assert page.locator("h1").count() == 1
        assert page.evaluate("new Set([...document.querySelectorAll('[id]')].map((n) => n.id)).size") == page.locator("[id]").count()
        for link in page.locator("nav a").all():
            assert page.locator(str(link.get_attribute("href"))).count() == 1


def test_it_prints_without_its_controls(browser: Any, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["emulated"]) as visit:
        visit.page.emulate_media(media="print")
        assert not visit.page.locator("nav.bar").is_visible()
        assert not visit.page.locator("#sft .toggles").is_visible()
        assert visit.page.evaluate("getComputedStyle(document.querySelector('#sft .sheet:has(.results)')).overflow") == "visible"
