"""Logits where they are needed only: with a vocabulary of 250,880 the head costs as much as all layers of a small BLOOM.

Shapes: B sequences, T positions, K chosen positions of all sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn


class HeadWindow:
    """Lets the LM head of a model see some positions only, whatever wraps the model later.

    A hook on the head cuts its input; so it works for architectures that have no `logits_to_keep`, and under strategies that keep the
    module. Where a strategy replaced the head, all logits are computed, and cut afterwards.
    """

    def __init__(self, model: Any) -> None:
        self._window: slice | Tensor | None = None
        head: nn.Module = model.get_output_embeddings()
        head.register_forward_pre_hook(self._cut)

    def _cut(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return None if self._window is None else (_cut(inputs[0], self._window), *inputs[1:])

    @contextmanager
    def positions(self, window: slice | Tensor) -> Iterator[None]:
        """Inside, logits are computed for `window` only.

        A slice of the positions gives logits of shape B, slice, V; a tensor of K places in the flattened B x T gives 1, K, V.
        """
        assert self._window is None, "windows do not nest"
        self._window = window
        try:
            yield
        finally:
            self._window = None

    def last(self, count: int) -> AbstractContextManager[None]:
        """A window on the last `count` positions."""
        return self.positions(slice(-count, None))

    def logits(self, module: nn.Module, window: slice | Tensor, **inputs: Any) -> Tensor:
        """The logits of `module` at `window`; `inputs` are the arguments of its forward pass."""
        with self.positions(window):
            logits = module(**inputs).logits
        return _cut(logits, window) if logits.shape[:2] == inputs["input_ids"].shape else logits


def _cut(values_BTX: Tensor, window: slice | Tensor) -> Tensor:
    """The chosen positions.

    >>> import torch
    >>> values = torch.arange(6).reshape(2, 3, 1)
    >>> _cut(values, slice(-1, None)).flatten().tolist(), _cut(values, torch.tensor([0, 4])).flatten().tolist()
    ([2, 5], [0, 4])
    """
    if isinstance(window, slice):
        return values_BTX[:, window]
    return values_BTX.flatten(0, 1).index_select(0, window).unsqueeze(0)
