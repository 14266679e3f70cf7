"""Logits where they are needed only: with a vocabulary of 250,880 the head costs as much as all layers of a small BLOOM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class HeadWindow:
    """Lets the LM head of a model see some positions only, whatever wraps the model later.

    A hook on the head cuts its input; so it works for architectures that have no `logits_to_keep`, and under strategies that keep the
    module. `logits` copes with those that replace the head.
    """

    def __init__(self, model: Any) -> None:
        self._window: slice | None = None
        head: nn.Module = model.get_output_embeddings()
        head.register_forward_pre_hook(self._cut)

    def _cut(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._window is None:
            return None
        return (inputs[0][:, self._window], *inputs[1:])

    @contextmanager
    def positions(self, window: slice) -> Iterator[None]:
        """Inside, logits are computed for `window` of the positions."""
        assert self._window is None, "windows do not nest"
        self._window = window
        try:
            yield
        finally:
            self._window = None

    def last(self, count: int) -> Any:
        """A window on the last `count` positions."""
        return self.positions(slice(-count, None))


def windowed(logits_BTV: Tensor, length: int, window: slice) -> Tensor:
    """The logits of `window`, whether the head was cut or computed all `length` positions.

    >>> import torch
    >>> windowed(torch.zeros(1, 5, 2), 5, slice(-3, -1)).shape, windowed(torch.zeros(1, 2, 2), 5, slice(-3, -1)).shape
    (torch.Size([1, 2, 2]), torch.Size([1, 2, 2]))
    """
    return logits_BTV[:, window] if logits_BTV.shape[1] == length else logits_BTV
