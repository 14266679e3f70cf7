"""The engine of strategies that keep the whole model on every rank (naive, ddp)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.cell import Cell
from bench.strategies.precision import MASTER_MODES, place, storage_dtype, trainable
from bench.strategies.quantised import place_quantised_base, whole_state
from bench.strategies.update import TorchEngine

if TYPE_CHECKING:
    import torch
    from torch import nn


class ReplicatedEngine(TorchEngine):
    """Whole parameters, gradients and optimizer states on every rank; plain torch."""

    def __init__(self, module: nn.Module, cell: Cell, *, learning_rate: float) -> None:
        """`module` lies on its device in the storage type of the precision mode (`placed`)."""
        super().__init__(trainable(module), cell, learning_rate=learning_rate, masters=cell.settings.precision in MASTER_MODES)
        self.module = self._bare = module
        self._base, self._dtype = cell.settings.base_weights, storage_dtype(cell.settings.precision)

    def full_state(self) -> dict[str, torch.Tensor] | None:
        """See `Engine.full_state`."""
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_rank() != 0:
            return None
        state = self._bare.state_dict() if self._base == "stored" else whole_state(self._bare, self._dtype)
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def placed(module: nn.Module, cell: Cell, device: torch.device) -> nn.Module:
    """`module` on `device`, in place: in the storage type of the precision mode, the base under LoRA as the cell's `base_weights` say."""
    settings = cell.settings
    if settings.base_weights == "stored":
        return place(module, settings.precision, device)
    return place_quantised_base(module, settings.base_weights, settings.precision, device)
