"""A comparison of two result sets as JUnit XML: a suite for each stage, a test for each cell. For the annotations of CI."""

from __future__ import annotations

import re
from collections.abc import Iterable
from xml.etree import ElementTree as ET

from bench.cell import Cell
from bench.report.compare import Change, Changes
from bench.report.compare_text import outcomes_text, ratio_text, verdict_text
from bench.report.statistics import Summary

NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 has no way to write."""


def junit_text(changes: Changes) -> str:
    """The comparison as JUnit XML: a regression is a failure, a cell of one side only is skipped."""
    root = ET.Element("testsuites", name="coati-bench compare")
    alone = [
        *((cell, "in the baseline only") for cell in changes.only_baseline),
        *((cell, "in the candidate only") for cell in changes.only_candidate),
    ]
    for stage in dict.fromkeys([*(change.cell.stage for change in changes.cells), *(cell.stage for cell, _ in alone)]):
        cases = [_case(change) for change in changes.cells if change.cell.stage == stage]
        _add_suite(root, stage, [*cases, *(_skipped(cell, why) for cell, why in alone if cell.stage == stage)])
    _count(root, [case for suite in root for case in suite])
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _add_suite(root: ET.Element, stage: str, cases: list[ET.Element]) -> None:
    suite = ET.SubElement(root, "testsuite", name=stage)
    _count(suite, cases)
    suite.extend(cases)


def _count(element: ET.Element, cases: Iterable[ET.Element]) -> None:
    kinds = [case[0].tag if len(case) else "" for case in cases]
    element.attrib |= {
        "tests": str(len(kinds)),
        "failures": str(kinds.count("failure")),
        "errors": "0",
        "skipped": str(kinds.count("skipped")),
    }


def _named(cell: Cell) -> ET.Element:
    return ET.Element("testcase", name=_clean(cell.cell_id), classname=_clean(f"{cell.stage}.{cell.strategy}"))


def _case(change: Change) -> ET.Element:
    case = _named(change.cell)
    if change.regressions:
        failure = ET.SubElement(case, "failure", message=_clean(change.regressions[0]), type="regression")
        failure.text = _clean("\n".join(change.regressions))
    losses = change.losses.text if change.losses else "not compared"
    speed = ratio_text(Summary(change.speed.ratios)) if change.speed else "none"
    lines = [f"outcomes: {outcomes_text(change)}", f"verdict: {verdict_text(change)}", f"speed: {speed}", f"losses: {losses}"]
    lines += (f"reference band: {check.name}: {check.state}; {check.text}" for check in change.costs)
    ET.SubElement(case, "system-out").text = _clean("\n".join(lines))
    return case


def _skipped(cell: Cell, why: str) -> ET.Element:
    case = _named(cell)
    ET.SubElement(case, "skipped", message=why)
    return case


def _clean(text: str) -> str:
    return NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
