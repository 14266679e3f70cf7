"""Seeded draws that are the same on every Python version and machine, and touch no global state.

`random.Random` promises this for `random()` only, not for `shuffle` or `sample`; what is drawn here decides which rows
are held out and what the synthetic sets contain, so it must never move.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")

_MASK = (1 << 64) - 1


class Draws:
    """A stream of draws; equal seeds give equal streams.

    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), started from the
    sha256 of the seed's text.

    >>> Draws("seed").permutation(5)
    [0, 4, 3, 2, 1]
    """

    def __init__(self, seed: str | int) -> None:
        self._state = int.from_bytes(hashlib.sha256(str(seed).encode("utf-8", "surrogatepass")).digest()[:8], "big")

    def bits(self) -> int:
        """The next 64 bits."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        value = self._state
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        return value ^ (value >> 31)

    def below(self, bound: int) -> int:
        """A whole number from 0 to `bound` - 1, each as likely as another (the bias of the division is rejected)."""
        limit = (1 << 64) - (1 << 64) % bound
        while (value := self.bits()) >= limit:
            pass
        return value % bound

    def choice(self, items: Sequence[Item]) -> Item:
        """One of `items`."""
        return items[self.below(len(items))]

    def permutation(self, count: int) -> list[int]:
        """The numbers 0 to `count` - 1 in a drawn order (Fisher and Yates)."""
        order = list(range(count))
        for last in range(count - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def sample(self, items: Sequence[Item], count: int) -> list[Item]:
        """`count` of `items` without replacement, in drawn order; `count` is at most their number."""
        return [items[index] for index in self.permutation(len(items))[:count]]
