"""zero2: ColossalAI's LowLevelZero, stage 2. Parameters whole on every rank; gradients and optimizer states in shards."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from bench.cell import Cell
from bench.strategies.base import Engine, Strategy
from bench.strategies.colossal import INITIAL_LOSS_SCALE, PLUGIN_PRECISION, start_colossalai
from bench.strategies.precision import (
    MASTER_MODES,
    make_optimizer,
    optimizer_problem,
    set_learning_rate,
    storage_dtype,
    trainable,
    unrounded_buffers,
)

if TYPE_CHECKING:
    import torch
    from torch import nn


def zero_plugin(cell: Cell, *, stage: int) -> Any:
    """A fresh LowLevelZeroPlugin; a plugin serves one model."""
    from colossalai.booster.plugin import LowLevelZeroPlugin

    return LowLevelZeroPlugin(
        stage=stage,
        precision=PLUGIN_PRECISION[cell.settings.precision],
        master_weights=cell.settings.precision in MASTER_MODES,
        max_norm=cell.settings.clip_norm or 0.0,
        initial_scale=INITIAL_LOSS_SCALE,
        overlap_communication=cell.settings.device == "cuda",
    )


class ZeroEngine(Engine):
    """A model under LowLevelZeroOptimizer. The optimizer averages over ranks, clips, and keeps the fp32 masters in shards."""

    def __init__(self, module: nn.Module, cell: Cell, plugin: Any, *, learning_rate: float) -> None:
        import torch.distributed as dist
        from colossalai.booster import Booster

        self._bare, self._ranks = module, dist.get_world_size()
        self._precision = cell.settings.precision
        self._booster = Booster(plugin=plugin)
        optimizer = make_optimizer(trainable(module), cell, learning_rate)
        with unrounded_buffers(module):
            self.module, self._optimizer, *_ = self._booster.boost(module, optimizer)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:  # noqa: ARG002  stage 2 reduces in every micro-step
        """See `Engine.backward`."""
        self._booster.backward(loss * self._ranks, self._optimizer)

    def step(self) -> float | torch.Tensor:
        """See `Engine.step`. Infinite where fp16 overflowed: ColossalAI skipped that step and lowers its loss scale."""
        self._optimizer._current_grad_norm = None
        self._optimizer.step()
        norm = self._optimizer.get_grad_norm()
        scale = self._loss_scale()
        self._optimizer.zero_grad()
        return math.inf if norm is None else norm / scale

    def _loss_scale(self) -> float:
        return self._optimizer.mixed_precision_mixin.loss_scale if self._precision == "fp16-master" else 1.0

    def set_learning_rate(self, value: float) -> None:
        """See `Engine.set_learning_rate`."""
        set_learning_rate(self._optimizer, value)

    def full_state(self) -> dict[str, torch.Tensor] | None:
        """See `Engine.full_state`. Working parameters are whole on every rank after `step`, so nothing is gathered."""
        import torch.distributed as dist

        if dist.get_rank() != 0:
            return None
        dtype = storage_dtype(self._precision)
        state = self._bare.state_dict()
        return {name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True) for name, tensor in state.items()}


class Zero2(Strategy):
    """LowLevelZero, stage 2."""

    name = "zero2"
    precisions = frozenset(PLUGIN_PRECISION)
    description = "ColossalAI LowLevelZero stage 2: gradients and optimizer states in shards"
    uses_colossalai = True
    sharded = frozenset({"gradients", "optimizer"})

    def unsupported(self, cell: Cell) -> str | None:
        """See `Strategy.unsupported`."""
        return super().unsupported(cell) or optimizer_problem(cell)

    def start(self, cell: Cell, device: torch.device) -> None:  # noqa: ARG002
        """See `Strategy.start`."""
        start_colossalai(device)

    def prepare(self, module: nn.Module, cell: Cell, device: torch.device, *, learning_rate: float) -> Engine:  # noqa: ARG002
        """See `Strategy.prepare`. ColossalAI itself places the model on this rank's device."""
        return ZeroEngine(module, cell, zero_plugin(cell, stage=2), learning_rate=learning_rate)
