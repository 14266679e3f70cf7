"""What a step does with gradients in plain torch: fp32 masters, the loss scale, the norm, clipping, AdamW."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from bench.cell import Cell
from bench.strategies.base import Engine
from bench.strategies.precision import LossScale, global_norm, make_optimizer, set_learning_rate

if TYPE_CHECKING:
    import torch
    from torch import nn


class TorchEngine(Engine):
    """An engine whose gradients lie in `parameter.grad` when `step` begins, reduced over the ranks."""

    def __init__(self, parameters: list[nn.Parameter], cell: Cell, *, learning_rate: float, masters: bool) -> None:
        """`parameters` train. `masters`: they are of 16 bits, and the optimizer works on fp32 copies of them."""
        self._parameters = parameters
        self._clip_norm = cell.settings.clip_norm
        self._masters = [parameter.detach().clone().float() for parameter in parameters] if masters else None
        self._optimizer = make_optimizer(self._masters or parameters, cell, learning_rate)
        self._scale = LossScale() if cell.settings.precision == "fp16-master" else None

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:  # noqa: ARG002
        """See `Engine.backward`."""
        (loss * self._scale.value if self._scale else loss).backward()

    def step(self) -> float | torch.Tensor:
        """See `Engine.step`. Infinite where fp16 overflowed: that step was skipped and the loss scale goes down."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = self._norm(self._local(gradients)) / (self._scale.value if self._scale else 1.0)
        if self._scale and self._skip(norm):
            return math.inf
        targets = self._masters or self._parameters
        if self._masters:
            for master, parameter in zip(self._masters, self._parameters, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
        self._rescale(self._local([target.grad for target in targets if target.grad is not None]), norm)
        self._optimizer.step()
        self._copy_back()
        if self._scale:
            self._scale.update(overflow=False)
        self._zero()
        return norm

    def set_learning_rate(self, value: float) -> None:
        """See `Engine.set_learning_rate`."""
        set_learning_rate(self._optimizer, value)

    def training_state(self) -> dict[str, Any]:
        """See `Engine.training_state`; with the loss scale."""
        return {**super().training_state(), **({"loss_scale": self._scale.state()} if self._scale else {})}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """See `Engine.load_training_state`."""
        super().load_training_state(state)
        if self._scale:
            self._scale.load(state["loss_scale"])

    def _local(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """What this rank holds of the tensors, sharing their memory."""
        return tensors

    def _norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """The norm over all ranks of gradients of which this rank holds these; the same on every rank."""
        return global_norm(gradients)

    def _skip(self, norm: torch.Tensor) -> bool:
        """Whether fp16 overflowed; the norm is the same on every rank, so all ranks agree."""
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
