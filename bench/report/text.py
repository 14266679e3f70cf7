"""How numbers and counts are written in reports."""

from __future__ import annotations

from collections.abc import Callable

from bench.cell import Cell
from bench.report.statistics import FEWEST, Summary

DASH = "–"


def number(value: float) -> str:
    """Four significant digits, thousands grouped, no exponent between 0.001 and a billion.

    >>> [number(value) for value in (38612.4, 4.0, 0.12345, 0.0, 2.1e-7, -1.5)]
    ['38,612', '4.000', '0.1235', '0', '2.1e-07', '-1.500']
    """
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3 or size >= 1e9:
        return f"{value:.1e}"
    if size >= 1000:
        return f"{value:,.0f}"
    digits = 1 if size >= 100 else 2 if size >= 10 else 3 if size >= 1 else 4
    return f"{value:.{digits}f}"


def ratio(value: float) -> str:
    """A ratio: three decimals, since 3 % is the practical threshold."""
    return f"{value:.3f}"


def spread(summary: Summary, write: Callable[[float], str] = number) -> str:
    """What stands below a median: nothing for one trial, all points below six trials, else the interval of the median.

    >>> spread(Summary((1.0, 1.1, 0.9)), ratio), spread(Summary((1.0, 1.1, 0.9, 1.2, 1.3, 1.4)), ratio)
    ('0.900 · 1.000 · 1.100', '0.900 to 1.400, n = 6')
    """
    if len(summary.points) == 1:
        return ""
    if summary.interval:
        low, high = summary.interval
        return f"{write(low)} to {write(high)}, n = {len(summary.points)}"
    assert len(summary.points) < FEWEST
    return " · ".join(write(value) for value in sorted(summary.points))


def counted(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun.

    >>> counted(1, "cell"), counted(3, "cell"), counted(2, "trial is", "trials are")
    ('1 cell', '3 cells', '2 trials are')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def listed(items: list[str], word: str = "and") -> str:
    """Items as a sentence lists them.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {word} {items[-1]}" if items else ""


def shape(cell: Cell) -> str:
    """Nodes x processes.

    >>> from bench.cell import cell_from_json
    >>> shape(cell_from_json({"stage": "sft", "model": "m", "strategy": "ddp", "nodes": 2, "processes_per_node": 4, "steps": 1}))
    '2 × 4'
    """
    return f"{cell.nodes} × {cell.processes_per_node}"


def lora(cell: Cell) -> str:
    """`full` or the LoRA rank."""
    return str(cell.lora_rank) if cell.lora_rank else "full"


def first_line(text: str) -> str:
    """Up to the first line break."""
    return text.splitlines()[0] if text else ""
