"""The engine of strategies that keep the whole model on every rank (naive, ddp)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.cell import Cell
from bench.strategies.precision import MASTER_MODES, trainable
from bench.strategies.update import TorchEngine

if TYPE_CHECKING:
    import torch
    from torch import nn


class ReplicatedEngine(TorchEngine):
    """Whole parameters, gradients and optimizer states on every rank; plain torch."""

    def __init__(self, module: nn.Module, cell: Cell, *, learning_rate: float) -> None:
        """`module` lies on its device in the storage type of the precision mode (`precision.place`)."""
        super().__init__(trainable(module), cell, learning_rate=learning_rate, masters=cell.settings.precision in MASTER_MODES)
        self.module = self._bare = module

    def full_state(self) -> dict[str, torch.Tensor] | None:
        """See `Engine.full_state`."""
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_rank() != 0:
            return None
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._bare.state_dict().items()}
