"""ddp: torch's DistributedDataParallel, a whole model on every rank, gradients averaged while the backward pass runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.cell import Cell
from bench.strategies.base import Engine, Strategy
from bench.strategies.precision import optimizer_problem
from bench.strategies.replicated import ReplicatedEngine, placed

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel


class DdpEngine(ReplicatedEngine):
    """A replicated model inside DistributedDataParallel."""

    def __init__(self, module: nn.Module, cell: Cell, device: torch.device, *, learning_rate: float) -> None:
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        super().__init__(module, cell, learning_rate=learning_rate)
        devices = [device] if device.type == "cuda" else None
        self._ddp = DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)
        synchronise_when_armed(self._ddp)
        self.module = self._ddp
        self._ranks = dist.get_world_size()

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """See `Engine.backward`. Only the last micro-step synchronises; DDP averages, so the loss is multiplied by the ranks."""
        if last:
            arm(self._ddp)
        super().backward(loss * self._ranks, last=last)


def synchronise_when_armed(ddp: DistributedDataParallel) -> None:
    """As inside `no_sync()`, for every forward pass: whether a micro-step is the last is known only at its backward pass."""
    ddp.require_backward_grad_sync = ddp.require_forward_param_sync = False


def arm(ddp: DistributedDataParallel) -> None:
    """What DDP's forward pass does outside `no_sync()`: the backward pass that follows reduces each bucket as it fills."""
    ddp.reducer.prepare_for_forward()
    ddp.reducer.prepare_for_backward([])


class Ddp(Strategy):
    """DistributedDataParallel."""

    name = "ddp"
    precisions = frozenset({"fp32", "bf16-pure", "bf16-master", "bf16-autocast", "fp16-master"})
    keeps_buckets = True
    quantises = True
    description = "torch DistributedDataParallel: model and optimizer whole on every rank"

    def unsupported(self, cell: Cell) -> str | None:
        """See `Strategy.unsupported`."""
        return super().unsupported(cell) or optimizer_problem(cell)

    def start(self, cell: Cell, device: torch.device) -> None:
        """Nothing to set up."""

    def prepare(self, module: nn.Module, cell: Cell, device: torch.device, *, learning_rate: float) -> Engine:
        """See `Strategy.prepare`."""
        return DdpEngine(placed(module, cell, device), cell, device, learning_rate=learning_rate)
