from __future__ import annotations

import re
from pathlib import Path

from bench.cell import COATI_SWITCHES

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "implementation-details.md").read_text(encoding="utf-8")
STAGES = ("sft", "rm", "ppo", "ppo_models")


def in_code(stage):
    """Numbers in comments, and in docstrings where they stand before or after words."""
    text = (ROOT / "bench" / "stages" / f"{stage}.py").read_text(encoding="utf-8")
    words = "\n".join(re.findall(r'#.*|""".*?"""', text, flags=re.DOTALL | re.MULTILINE) if stage else [])
    return {int(number) for number in re.findall(r"(?<![\w\]])\((\d{1,2})\)", words)}


def test_every_numbered_detail_stands_in_the_code_and_every_number_in_the_list():
    listed = [int(number) for number in re.findall(r"^(\d+)\. \*\*", PAGE, flags=re.MULTILINE)]
    assert listed == list(range(1, len(listed) + 1))
    assert set().union(*(in_code(stage) for stage in STAGES)) == set(listed)


def test_every_switch_of_the_old_semantics_is_explained():
    for switch in {name for names in COATI_SWITCHES.values() for name in names}:
        assert f"`{switch}`" in PAGE
