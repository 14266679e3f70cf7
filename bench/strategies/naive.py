"""naive: one rank, nothing wrapped. The partner that every other strategy is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.cell import Cell
from bench.strategies.base import Engine, Strategy
from bench.strategies.precision import optimizer_problem
from bench.strategies.replicated import ReplicatedEngine, placed

if TYPE_CHECKING:
    import torch
    from torch import nn


class Naive(Strategy):
    """Plain torch on one rank."""

    name = "naive"
    precisions = frozenset({"fp32", "bf16-pure", "bf16-master", "bf16-autocast", "fp16-master"})
    quantises = True
    description = "plain torch on one device"

    def unsupported(self, cell: Cell) -> str | None:
        """See `Strategy.unsupported`."""
        if cell.world_size > 1:
            return f"naive runs on one rank only; seen: {cell.world_size}; one rank with more accumulation is its partner"
        return super().unsupported(cell) or optimizer_problem(cell)

    def start(self, cell: Cell, device: torch.device) -> None:
        """Nothing to set up."""

    def prepare(self, module: nn.Module, cell: Cell, device: torch.device, *, learning_rate: float) -> Engine:
        """See `Strategy.prepare`."""
        return ReplicatedEngine(placed(module, cell, device), cell, learning_rate=learning_rate)
