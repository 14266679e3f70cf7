"""Ceilings of devices from files: what `doctor --bench --format json` printed, kept beside records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.errors import UserError, json_fault

NAME = "ceilings.json"
MOST = 1e18
"""FLOP/s that no one device attains."""
RIGHT = "what `coati-bench doctor --bench --format json` prints would be right"


def ceilings_beside(root: Path) -> list[Path]:
    """The files that a report over the suite's folder `root` reads unasked: its own, its neighbours', and those of stored references."""
    return [path for path in (root / NAME, root.parent / NAME, *sorted(root.parent.glob(f"references/*/{NAME}"))) if path.is_file()]


def read_ceilings(files: Iterable[Path]) -> dict[str, Mapping[str, float]]:
    """FLOP/s of matrix products by device name and type; the first file that knows a device is taken. Raises UserError."""
    found: dict[str, Mapping[str, float]] = {}
    for file in files:
        for ceilings in _in_file(file):
            given = ceilings["matrix_flops_per_second"].items()
            rates = {dtype: _rate(file, dtype, rate) for dtype, rate in given if rate not in (None, 0)}
            found.setdefault(str(ceilings["device"]), rates)
    return found


def _rate(file: Path, dtype: str, rate: Any) -> float:
    if isinstance(rate, (int, float)) and not isinstance(rate, bool) and 0 < rate <= MOST:
        return float(rate)
    raise UserError(f"{file}: no ceiling; seen: {dtype} {repr(rate)[:60]}; FLOP/s of at most {MOST:g}, or null, would be right")


def _in_file(file: Path) -> list[dict[str, Any]]:
    content = _content(file)
    items = [item.get("ceilings", item) for item in (content if isinstance(content, list) else [content]) if isinstance(item, dict)]
    found = [item for item in items if _states_rates(item)]
    if not found:
        raise UserError(f"{file}: no ceilings; seen: no device with its matrix_flops_per_second; {RIGHT}")
    return found


def _states_rates(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("matrix_flops_per_second"), dict) and "device" in item


def _content(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: no JSON; seen: {json_fault(error)}; {RIGHT}") from None
