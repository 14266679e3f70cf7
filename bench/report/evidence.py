"""The table that says whether strategies were active, and by which figures; what each check means: docs/evidence.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.record import EVIDENCE_STATES, Check, Evidence, EvidenceState
from bench.report.analysis import CellResult
from bench.report.detail_tables import Detail
from bench.report.tables import Column, Line, Table, TableCell, identity_columns, starts_of_groups
from bench.report.text import DASH, counted, number

TITLE = "Evidence that the strategy was active"
KINDS: dict[EvidenceState, str] = {"refuted": "bad", "shown": "good", "not applicable": "muted"}
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")

COLUMNS = {
    "trainable": "Parameters that train, against arithmetic on the model's configuration and the LoRA rank.",
    "parameters": "Bytes of trainable parameters on a rank between steps, over what the declared sharding gives it.",
    "gradients": "Bytes of gradients on a rank just before the update, over what the declared sharding gives it.",
    "optimizer": "Bytes of optimizer states and fp32 masters on a rank, over what the declared sharding gives it.",
    "reduced": "Bytes that collectives added up over ranks in the traced step, over those of the gradients.",
    "gathered": "Bytes that collectives put together in the traced step, over those of the weights that lie in shares.",
    "moved": "How far training moved the weights, over the sum of the learning rates: about 1 in few steps of Adam, less in many.",
    "adapters": "LoRA matrices that began at zero and are no longer.",
    "unmoved": "Frozen tensors with the bits that they had before training.",
    "agreement": "Weights that are the same on all ranks after training.",
    "micro-steps": "Weights that were the same in the first two micro-steps of a step.",
}
"""Check -> what its column says."""
TITLES = {"agreement": "same on all ranks", "unmoved": "frozen unmoved", "optimizer": "optimizer state", "micro-steps": "same in a step"}
RATIOS = ("parameters", "gradients", "optimizer", "reduced", "gathered")
SHARES = ("adapters", "unmoved", "agreement", "micro-steps")


def evidence_tables(results: Sequence[CellResult]) -> list[Detail]:
    """The table of one stage's cells; none where no record holds evidence."""
    if not any(evidence_of(result) for result in results):
        return []
    there = {check.what for result in results for evidence in evidence_of(result) for check in evidence.checks if _says(check)}
    makers = [*identity_columns(results), (_verdict_column(), _verdict), *(_column(name) for name in COLUMNS if name in there)]
    lines = tuple(
        Line(tuple(make(result) for _, make in makers), result.cell.strategy, first)
        for result, first in zip(results, starts_of_groups(results), strict=True)
    )
    return [Detail(TITLE, Table(tuple(column for column, _ in makers), lines, ()), ())]


def evidence_of(result: CellResult) -> list[Evidence]:
    """What every rank of every trial of the cell could show."""
    parts = [part for trial in result.trials for part in trial.record.parts]
    return [part.evidence for part in parts if part.evidence is not None]


def _says(check: Check) -> bool:
    return check.state != "not applicable"


def _checks(result: CellResult, what: str | None = None) -> list[Check]:
    """The checks of all ranks and models, the gravest first."""
    found = [check for evidence in evidence_of(result) for check in evidence.checks if what in (None, check.what)]
    return sorted(found, key=lambda check: EVIDENCE_STATES.index(check.state))


def _verdict_column() -> Column:
    return Column("evidence", help="Read from tensors and collectives of the ranks, never from the strategy's own flags.")


def _verdict(result: CellResult) -> TableCell:
    checks = _checks(result)
    if not checks:
        text = "no rank got to the end of training, or the record is older than evidence"
        return TableCell(DASH, sort="", kind="muted", hint=text)
    worst = checks[0].state
    kinds = {(check.model, check.what) for check in checks if check.state == worst}
    hint = " ".join(dict.fromkeys(f"{check.model}, {check.what}: {check.text}." for check in checks if check.state == worst))
    return TableCell(worst, counted(len(kinds), "check"), EVIDENCE_STATES.index(worst), KINDS[worst], hint)


def _column(name: str) -> tuple[Column, Callable[[CellResult], TableCell]]:
    unit = "of declared" if name in RATIOS[:3] else "of needed" if name in RATIOS else ""

    def make(result: CellResult) -> TableCell:
        checks = _checks(result, name)
        return _entry(checks) if checks else TableCell(DASH, sort="", kind="muted")

    return Column(TITLES.get(name, name), unit, COLUMNS[name], numeric=True), make


def _entry(checks: Sequence[Check]) -> TableCell:
    """The gravest check's figure, that of the first model and rank where they are alike; the sentences of all models as hint."""
    worst = checks[0]
    hint = " ".join(dict.fromkeys(f"{check.model}: {check.text}." for check in checks if check.state == worst.state))
    if worst.state == "not applicable" or worst.seen is None or not worst.expected:
        return TableCell("n/a", sort="", kind="muted", hint=hint)
    text, note = _figure(worst)
    return TableCell(text, note, worst.seen, "bad" if worst.state == "refuted" else "", hint)


def _figure(check: Check) -> tuple[str, str]:
    """A figure, and what stands below it."""
    assert check.seen is not None
    assert check.expected is not None
    if check.what in RATIOS:
        return f"{check.seen / check.expected:.2f}", _bytes(check.seen)
    if check.what in SHARES:
        return f"{check.seen:.0f}/{check.expected:.0f}", ""
    if check.what == "trainable":
        return f"{check.seen:,.0f}", "" if check.seen == check.expected else f"not {check.expected:,.0f}"
    return number(check.seen), ""


def _bytes(size: float) -> str:
    for unit in UNITS:
        if size < 1024 or unit == UNITS[-1]:
            return f"{number(size)} {unit}"
        size /= 1024
    raise AssertionError
