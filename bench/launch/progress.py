"""What people see while trials run: one line for each. Torch-free."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from bench.cell import Cell


class Line:
    """One trial's line: its name at once where a terminal shows it, and how it ended at the end."""

    def __init__(self, title: str) -> None:
        self._title, self._begin, self._ending = title, time.monotonic(), ""

    def __enter__(self) -> Self:
        if sys.stdout.isatty():
            print(f"{self._title} ... ", end="", flush=True)
        return self

    def end(self, outcome: str, reason: str | None = None, *, kept: bool = False) -> None:
        """Say how it ended."""
        took = "kept" if kept else f"{time.monotonic() - self._begin:.1f} s"
        first = f": {reason.splitlines()[0]}" if reason else ""
        self._ending = f"{outcome} {took}{first}"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        text = self._ending or "stopped"
        print(text if sys.stdout.isatty() else f"{self._title} ... {text}", flush=True)


def describe(cell: Cell) -> str:
    """A cell in a few words.

    >>> from bench.cell import cell_from_json
    >>> describe(cell_from_json({"stage": "sft", "model": "bloom-tiny", "strategy": "zero2", "lora_rank": 8, "nodes": 2, "steps": 3}))
    'sft bloom-tiny zero2 lora8 2x1'
    """
    lora = f"lora{cell.lora_rank}" if cell.lora_rank else "full"
    return f"{cell.stage} {cell.model} {cell.strategy} {lora} {cell.nodes}x{cell.processes_per_node}"
