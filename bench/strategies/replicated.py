"""The engine of strategies that keep the whole model on every rank (naive, ddp)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from bench.cell import Cell
from bench.strategies.base import Engine
from bench.strategies.precision import MASTER_MODES, LossScale, global_norm, make_optimizer, set_learning_rate, trainable

if TYPE_CHECKING:
    import torch
    from torch import nn


class ReplicatedEngine(Engine):
    """Whole parameters, gradients and optimizer states on every rank; plain torch."""

    def __init__(self, module: nn.Module, cell: Cell, *, learning_rate: float) -> None:
        """`module` lies on its device in the storage type of the precision mode (`precision.place`)."""
        self.module = self._bare = module
        self._clip_norm = cell.settings.clip_norm
        self._parameters = trainable(module)
        self._masters = [p.detach().clone().float() for p in self._parameters] if cell.settings.precision in MASTER_MODES else None
        self._optimizer = make_optimizer(self._masters or self._parameters, cell, learning_rate)
        self._scale = LossScale() if cell.settings.precision == "fp16-master" else None

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:  # noqa: ARG002
        """See `Engine.backward`."""
        (loss * self._scale.value if self._scale else loss).backward()

    def step(self) -> float | torch.Tensor:
        """See `Engine.step`. Infinite where fp16 overflowed: that step was skipped and the loss scale goes down."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = global_norm(gradients) / (self._scale.value if self._scale else 1.0)
        if self._scale and self._skip(norm):
            return math.inf
        targets = self._masters or self._parameters
        if self._masters:
            for master, parameter in zip(self._masters, self._parameters, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
        self._rescale([target.grad for target in targets if target.grad is not None], norm)
        self._optimizer.step()
        self._copy_back()
        if self._scale:
            self._scale.update(overflow=False)
        self._zero()
        return norm

    def set_learning_rate(self, value: float) -> None:
        """See `Engine.set_learning_rate`."""
        set_learning_rate(self._optimizer, value)

    def full_state(self) -> dict[str, torch.Tensor] | None:
        """See `Engine.full_state`."""
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_rank() != 0:
            return None
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._bare.state_dict().items()}

    def training_state(self) -> dict[str, Any]:
        """See `Engine.training_state`; fp16 keeps its loss scale as well."""
        return {**super().training_state(), **({"loss_scale": dict(vars(self._scale))} if self._scale else {})}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """See `Engine.load_training_state`."""
        super().load_training_state(state)
        if self._scale:
            vars(self._scale).update(state["loss_scale"])

    def _skip(self, norm: torch.Tensor) -> bool:
        """Whether fp16 overflowed; gradients are the same on every rank, so all ranks agree."""
        assert self._scale is not None
        if math.isfinite(norm.item()):
            return False
        self._scale.update(overflow=True)
        self._zero()
        return True

    def _rescale(self, gradients: list[torch.Tensor], norm: torch.Tensor) -> None:
        """Take the loss scale out and clip to the largest norm."""
        import torch

        factor = 1.0 / self._scale.value if self._scale else 1.0
        if self._clip_norm is not None:
            torch._foreach_mul_(gradients, (self._clip_norm / (norm + 1e-6)).clamp(max=1.0) * factor)
        elif self._scale:
            torch._foreach_mul_(gradients, factor)

    def _copy_back(self) -> None:
        import torch

        if self._masters:
            with torch.no_grad():
                torch._foreach_copy_(list[torch.Tensor](self._parameters), self._masters)

    def _zero(self) -> None:
        for tensor in [*self._parameters, *(self._masters or [])]:
            tensor.grad = None
