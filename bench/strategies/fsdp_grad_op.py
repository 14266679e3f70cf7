"""fsdp_grad_op: `fsdp` that keeps layers gathered from their forward to their backward pass (FSDP's SHARD_GRAD_OP, as ZeRO-2 does).

A third less is communicated, and every layer is whole at the end of a forward pass. Between two steps all is in shards, as in `fsdp`;
after a forward pass without gradients, too. Frozen models, which have no backward pass, are gathered layer by layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.strategies.fsdp import Fsdp

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bench.cell import Cell
    from bench.strategies.base import Engine


class FsdpGradOp(Fsdp):
    """FSDP2 with `reshard_after_forward=False`."""

    name = "fsdp_grad_op"
    description = "torch FSDP2 without resharding after forward: a layer is gathered once a micro-step and kept for its backward pass"

    def gathered_share(self, elements: int, ranks: int) -> float:  # noqa: ARG002
        """See `Strategy.gathered_share`."""
        return 1.0

    def prepare(self, module: nn.Module, cell: Cell, device: torch.device, *, learning_rate: float) -> Engine:
        """See `Strategy.prepare`."""
        engine = super().prepare(module, cell, device, learning_rate=learning_rate)
        engine.module.set_reshard_after_forward(False)  # type: ignore[operator]
        engine.module.register_forward_hook(_drop_layers_unless_needed)
        return engine


def _drop_layers_unless_needed(root: Any, _: Any, __: Any) -> None:
    """What no backward pass will drop, after a forward pass without gradients."""
    import torch
    from torch.distributed.fsdp import FSDPModule

    if not torch.is_grad_enabled():
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
