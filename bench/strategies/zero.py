"""What the strategies made of ColossalAI's LowLevelZero share: zero1, zero2, and both with optimizer states in host memory.

Parameters are whole on every rank. Stage 1 shards the optimizer states and masters, and reduces whole gradients once a step;
stage 2 shards the gradients too, and for that reduces them in every micro-step.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from bench.cell import Cell
from bench.strategies.base import Engine
from bench.strategies.colossal import (
    INITIAL_LOSS_SCALE,
    PLUGIN_PRECISION,
    ColossalStrategy,
    forced_hybrid,
    in_force,
    load_loss_scale,
    loss_scale_state,
)
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


class ZeroEngine(Engine):
    """A model under LowLevelZeroOptimizer. The optimizer averages over ranks, clips, and keeps the fp32 masters in shards."""

    def __init__(self, module: nn.Module, cell: Cell, plugin: Any, *, learning_rate: float) -> None:
        import torch.distributed as dist
        from colossalai.booster import Booster

        self._bare, self._ranks = module, dist.get_world_size()
        self._precision, self._stage = cell.settings.precision, plugin.stage
        self._booster = Booster(plugin=plugin)
        optimizer = make_optimizer(trainable(module), cell, learning_rate)
        with unrounded_buffers(module):
            self.module, self._optimizer, *_ = self._booster.boost(module, optimizer)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """See `Engine.backward`. Only stage 1 can leave the reduction to the last micro-step."""
        self._optimizer.require_grad_sync = last or self._stage == 2
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

    def training_state(self) -> dict[str, Any]:
        """See `Engine.training_state`: working parameters, and this rank's masters and moments."""
        return {**super().training_state(), "loss_scale": loss_scale_state(self._optimizer.mixed_precision_mixin)}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """See `Engine.load_training_state`."""
        super().load_training_state(state)
        load_loss_scale(self._optimizer.mixed_precision_mixin, state["loss_scale"])


class Zero(ColossalStrategy):
    """LowLevelZero; a subclass names the stage and whether optimizer states lie in host memory."""

    precisions = frozenset(PLUGIN_PRECISION)
    stage: ClassVar[int]

    def unsupported(self, cell: Cell) -> str | None:
        """See `Strategy.unsupported`."""
        if self.offloaded and cell.settings.precision in PLUGIN_PRECISION.keys() - MASTER_MODES:
            return f"{self.name}: ColossalAI's cpu_offload moves masters only, and precision {cell.settings.precision} has none"
        return super().unsupported(cell) or (None if self.offloaded else optimizer_problem(cell))

    def forced_settings(self, cell: Cell) -> dict[str, Any]:
        """States in host memory are updated there, which only ColossalAI's Adam does fast enough to be of use."""
        return forced_hybrid(cell) if self.offloaded else {}

    def prepare(self, module: nn.Module, cell: Cell, device: torch.device, *, learning_rate: float) -> Engine:  # noqa: ARG002
        """See `Strategy.prepare`. ColossalAI itself places the model on this rank's device."""
        cell = in_force(cell, self.forced_settings(cell))
        return ZeroEngine(module, cell, self._plugin(cell), learning_rate=learning_rate)

    def _plugin(self, cell: Cell) -> Any:
        """A fresh LowLevelZeroPlugin; a plugin serves one model."""
        from colossalai.booster.plugin import LowLevelZeroPlugin

        return LowLevelZeroPlugin(
            stage=self.stage,
            precision=PLUGIN_PRECISION[cell.settings.precision],
            master_weights=cell.settings.precision in MASTER_MODES,
            max_norm=cell.settings.clip_norm or 0.0,
            initial_scale=INITIAL_LOSS_SCALE,
            overlap_communication=cell.settings.device == "cuda",
            cpu_offload=bool(self.offloaded),
        )
