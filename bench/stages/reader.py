"""How stages read a language model that a strategy has laid out.

Shapes: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from bench.models.build import position_ids
from bench.rollout.head import HeadWindow


class Reader(NamedTuple):
    """A policy, or a frozen reference, ready for forward passes."""

    module: nn.Module
    window: HeadWindow
    places: bool
    """Whether it takes position ids; they count real tokens only, so that padding in front shifts nothing."""

    def inputs(self, ids_BT: Tensor, mask_BT: Tensor) -> dict[str, Any]:
        """Arguments of the module's forward pass without a KV cache."""
        places = {"position_ids": position_ids(mask_BT)} if self.places else {}
        return {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False, **places}

    def logits(self, ids_BT: Tensor, mask_BT: Tensor, window: slice | Tensor) -> Tensor:
        """The logits at `window` (see `HeadWindow.positions`); the head computes no others."""
        return self.window.logits(self.module, window, **self.inputs(ids_BT, mask_BT))
