"""fabric: Lightning Fabric around torch's DistributedDataParallel, the successor of what the seed names as Lightning's way.

Fabric moves and casts the model, wraps it, and casts what goes in and comes out. It has no mode with 16-bit parameters and fp32
masters (`bf16-master`), and its `bf16-true` makes bf16 torch's default type inside a forward pass. The gradient norm and clipping are
ours: Fabric takes the norm in the parameters' type, in bf16 to two or three digits.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from bench.cell import Cell
from bench.strategies.base import Engine, Strategy
from bench.strategies.ddp import arm, synchronise_when_armed
from bench.strategies.precision import unrounded_buffers
from bench.strategies.replicated import ReplicatedEngine
from bench.strategies.requirement import Requirement

if TYPE_CHECKING:
    import torch
    from torch import nn

PRECISION = {"fp32": "32-true", "bf16-pure": "bf16-true", "bf16-autocast": "bf16-mixed"}
"""Precision mode -> Fabric's word."""


class FabricEngine(ReplicatedEngine):
    """A model and its optimizer that `Fabric.setup` wrapped."""

    def __init__(self, module: nn.Module, cell: Cell, *, learning_rate: float) -> None:
        import torch.distributed as dist

        super().__init__(module, cell, learning_rate=learning_rate)
        self._ranks, self._fabric = dist.get_world_size(), make_fabric(cell)
        self.module: Any
        with unrounded_buffers(module):
            self.module, self._optimizer = self._fabric.setup(module, self._optimizer)
        synchronise_when_armed(self.module._forward_module)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """See `Engine.backward`. Only the last micro-step synchronises; DDP averages, so the loss is multiplied by the ranks."""
        if last:
            arm(self.module._forward_module)
        self._fabric.backward(loss * self._ranks)


def make_fabric(cell: Cell) -> Any:
    """A Fabric on the process group that is there already; it reads this rank's place from torchrun's variables."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import TorchElasticEnvironment
    from lightning_fabric.strategies import DDPStrategy

    fabric = Fabric(
        accelerator=cell.settings.device, devices=cell.processes_per_node, num_nodes=cell.nodes,
        strategy=DDPStrategy(gradient_as_bucket_view=True), precision=PRECISION[cell.settings.precision],
        plugins=[TorchElasticEnvironment()],
    )  # fmt: skip
    fabric.launch()
    return fabric


class FabricStrategy(Strategy):
    """Lightning Fabric with its DDP strategy."""

    name = "fabric"
    precisions = frozenset(PRECISION)
    keeps_buckets = True
    description = "Lightning Fabric's DDP strategy: model and optimizer whole on every rank"
    requires = (Requirement("lightning-fabric", "2.5", extra="fabric"),)

    def unsupported(self, cell: Cell) -> str | None:
        """See `Strategy.unsupported`."""
        if cell.settings.optimizer == "hybrid":
            return "fabric: optimizer hybrid is ColossalAI's; adamw, foreach or fused would be right"
        return super().unsupported(cell)

    def start(self, cell: Cell, device: torch.device) -> None:  # noqa: ARG002
        """See `Strategy.start`. Fabric lets DDP lay out its buckets on a stream of its own, of which current torch warns."""
        warnings.filterwarnings("ignore", module=r"lightning_fabric\.")
        warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")

    def prepare(self, module: nn.Module, cell: Cell, device: torch.device, *, learning_rate: float) -> Engine:  # noqa: ARG002
        """See `Strategy.prepare`. Fabric itself places the model on this rank's device."""
        return FabricEngine(module, cell, learning_rate=learning_rate)
