"""Draws and splits: the same everywhere, and fair."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.data.draws import Draws
from bench.data.splits import split_rows
from bench.errors import DataError


def test_the_stream_of_a_seed_never_changes() -> None:
    draws = Draws(42)
    assert [draws.bits() for _ in range(3)] == PINNED
    assert Draws("42").bits() == PINNED[0]


PINNED = [13186092386036720017, 15173508943315674150, 10083925719070696508]


def test_splitmix64_gives_the_published_stream() -> None:
    draws = Draws("anything")
    draws._state = 1234567  # the reference vector of Vigna's splitmix64.c
    assert [draws.bits() for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_every_order_is_as_likely_as_another() -> None:
    draws = Draws("orders")
    counts = Counter(tuple(draws.permutation(3)) for _ in range(12_000))
    assert len(counts) == 6
    assert all(abs(count - 2000) < 200 for count in counts.values())


@given(count=st.integers(0, 60), size=st.integers(0, 60), seed=st.integers() | st.text())
def test_a_sample_has_no_item_twice(count: int, size: int, seed: int | str) -> None:
    items = list(range(100, 100 + size))
    drawn = Draws(seed).sample(items, count)
    assert len(drawn) == len(set(drawn)) == min(count, size)
    assert set(drawn) <= set(items)


@given(rows=st.lists(st.integers(), min_size=1, max_size=80, unique=True), data=st.data())
def test_a_split_keeps_every_row_once_and_in_order(rows: list[int], data: st.DataObject) -> None:
    held_out = data.draw(st.integers(0, len(rows) - 1))
    train, kept = split_rows(rows, held_out, data.draw(st.integers(0, 5)))
    assert len(kept) == held_out
    assert sorted(train + kept, key=rows.index) == rows
    assert train == sorted(train, key=rows.index)
    assert kept == sorted(kept, key=rows.index)


def test_a_split_depends_on_the_seed_alone() -> None:
    rows = list(range(1000))
    assert split_rows(rows, 64, 42) == split_rows(rows, 64, 42)
    assert split_rows(rows, 64, 42) != split_rows(rows, 64, 43)
    assert split_rows(rows, 3, 42)[1] == PINNED_HELD_OUT


PINNED_HELD_OUT = [58, 303, 598]


@pytest.mark.parametrize("held_out", [4, 5])
def test_a_split_that_leaves_nothing_to_train_on_is_an_error(held_out: int) -> None:
    with pytest.raises(DataError, match=f"cannot hold out {held_out} rows: the data has 4; lower held_out_rows"):
        split_rows(["a"] * 4, held_out, 0)
