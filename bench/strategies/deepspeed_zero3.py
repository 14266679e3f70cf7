"""deepspeed_zero3: DeepSpeed's ZeRO, stage 3. Parameters, gradients and optimizer states in shards, gathered module by module."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from bench.cell import Cell
from bench.strategies.deepspeed_zero import DeepSpeedZero, lay_out

if TYPE_CHECKING:
    import torch
    from torch import nn


class DeepSpeedZero3(DeepSpeedZero):
    """DeepSpeed ZeRO-3."""

    name = "deepspeed_zero3"
    stage = 3
    description = "DeepSpeed ZeRO stage 3: parameters, gradients and optimizer states in shards"
    sharded = frozenset({"parameters", "gradients", "optimizer", "frozen"})
    resumable = False
    """Parameters come and go (`ds_tensor`, and whole ones below a threshold): their share at a step's end is not one tensor."""

    def __init__(self) -> None:
        self._engines: list[object] = []
        """Of frozen models: DeepSpeed takes an engine's hooks away when the engine is collected."""

    def place_frozen(self, module: nn.Module, cell: Cell, device: torch.device) -> nn.Module:
        """See `Strategy.place_frozen`. In shards, by an engine of DeepSpeed's without an optimizer."""
        copied = copy.deepcopy(module).requires_grad_(False)
        engine, _ = lay_out(copied, cell, device, None, stage=self.stage)
        self._engines.append(engine)
        return copied.eval()
