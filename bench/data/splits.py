"""Which rows are kept out of training. Torch-free and deterministic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.data.draws import Draws
from bench.errors import DataError


def split_rows(rows: Sequence[Any], held_out: int, seed: int) -> tuple[list[Any], list[Any]]:
    """Return (training rows, held-out rows): `held_out` rows drawn by `seed`, both lists in the order of `rows`.

    The same rows, number and seed give the same split on every rank, machine and Python version. Raises DataError if
    nothing would be left to train on.

    >>> split_rows(["a", "b", "c", "d"], held_out=1, seed=42)
    (['a', 'b', 'c'], ['d'])
    """
    if held_out >= len(rows):
        raise DataError(
            f"cannot hold out {held_out} rows: the data has {len(rows)}; lower held_out_rows below that number, or use more rows"
        )
    chosen = set(Draws(f"held-out:{seed}").permutation(len(rows))[:held_out])
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [row for index, row in enumerate(rows) if index in chosen]
