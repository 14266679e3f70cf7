"""Reasons that rest on what others do not offer name the thread, and the page on strategies links to the same ones."""

from __future__ import annotations

import re
from pathlib import Path

from bench.strategies.base import all_strategies
from tests.trials import tiny_cell

ROOT = Path(__file__).parents[3]


def test_the_page_on_strategies_and_the_reasons_name_the_same_threads() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "bench" / "strategies").glob("*.py"))
    page = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(\w+/\w+)#(\d+)", sources))
    assert named == set(re.findall(r"github\.com/(\w+/\w+)/issues/(\d+)", page))


def test_a_reason_ends_with_the_threads_that_it_rests_on() -> None:
    cell = tiny_cell("sft", strategy="gemini", steps=4, lora_rank=8, precision="bf16-master", base_weights="nf4")
    assert all_strategies()["gemini"].unsupported(cell) == (
        "gemini lays out no nf4 weights; `base_weights: stored` would be right; see hpcaitech/ColossalAI#4929, hpcaitech/ColossalAI#6138"
    )
