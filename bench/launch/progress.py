"""What people see while trials run: one line for each. Torch-free."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from bench.cell import Cell
from bench.differences import titled
from bench.matrix import Plan


class Line:
    """One trial's line: its name at once where a terminal shows it and it is `alone`, and how it ended at the end."""

    def __init__(self, title: str, *, alone: bool = True) -> None:
        self._title, self._begin, self._ending = title, time.monotonic(), ""
        self._at_once = alone and sys.stdout.isatty()

    def __enter__(self) -> Self:
        if self._at_once:
            print(f"{self._title} ... ", end="", flush=True)
        return self

    def end(self, outcome: str, reason: str | None = None, *, kept: bool = False) -> None:
        """Say how it ended."""
        took = "kept" if kept else f"{time.monotonic() - self._begin:.1f} s"
        self._ending = f"{outcome} {took}{in_one_line(reason)}"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        text = self._ending or "stopped"
        print(text if self._at_once else f"{self._title} ... {text}", flush=True)


def in_one_line(reason: str | None) -> str:
    r"""The beginning of a reason, to stand behind an outcome; the last words of a rank's log are not told without what they say.

    >>> in_one_line("rank 0 ended with exit code 1:\nno space left\nmore"), in_one_line("too slow\nmore"), in_one_line(None)
    (': rank 0 ended with exit code 1: no space left', ': too slow', '')
    """
    first, *more = (reason or "").splitlines() or [""]
    text = f"{first} {more[0].strip()}" if first.endswith(":") and more else first
    return f": {text[:300]}" if text else ""


def titles(plan: Plan) -> dict[str, str]:
    """The cells of a plan in a few words each, by their ids; what would be named alike has the settings that differ, too."""
    names = titled(plan.cells.values(), describe, ", ")
    return {cell_id: names[cell] for cell_id, cell in plan.cells.items()}


def describe(cell: Cell) -> str:
    """A cell in a few words.

    >>> from bench.cell import cell_from_json
    >>> describe(cell_from_json({"stage": "sft", "model": "bloom-tiny", "strategy": "zero2", "lora_rank": 8, "nodes": 2, "steps": 3}))
    'sft bloom-tiny zero2 lora8 2x1'
    """
    lora = f"lora{cell.lora_rank}" if cell.lora_rank else "full"
    return f"{cell.stage} {cell.model} {cell.strategy} {lora} {cell.nodes}x{cell.processes_per_node}"
