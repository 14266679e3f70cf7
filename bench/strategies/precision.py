"""Precision modes: how parameters are stored, which copy the optimizer updates, and the one meaning of the gradient norm.

    mode            parameters  optimizer works on               forward
    fp32            fp32        the parameters                   as stored
    bf16-pure       bf16        the parameters (states bf16)     as stored
    bf16-master     bf16        fp32 masters of the trainable    as stored
    bf16-autocast   fp32        the parameters                   torch.autocast to bf16
    fp16-master     fp16        fp32 masters of the trainable    as stored; the loss is scaled

Floating-point buffers (rotary frequencies) stay fp32 in every mode, as transformers' own `from_pretrained(torch_dtype=...)`
leaves them: rounded, they shift every position. Torch is imported inside functions: planning reads this package.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bench.cell import Cell
from bench.strategies.kernels import load_prebuilt_without_compiler

if TYPE_CHECKING:
    import torch
    from torch import nn

MASTER_MODES = frozenset({"bf16-master", "fp16-master"})
"""Modes with fp32 copies of the trainable parameters."""


def storage_dtype(precision: str) -> torch.dtype:
    """Type of the parameters in a precision mode."""
    import torch

    return {"bf16-pure": torch.bfloat16, "bf16-master": torch.bfloat16, "fp16-master": torch.float16}.get(precision, torch.float32)


def place(module: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """Cast the parameters to the mode's storage type and move all to `device`, in place; buffers keep their type."""
    dtype = storage_dtype(precision)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(device=device, dtype=dtype)
    module.to(device)
    if precision == "bf16-autocast":
        autocast_forward(module, device)
    return module


def frozen_copy(module: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """A copy of `module` that is only read: in the mode's storage type, on `device`, in eval mode, without gradients.

    Parameters are cast as they are copied: there is no second copy of the whole in fp32.
    """
    import torch

    dtype = storage_dtype(precision)
    cast = {id(one): torch.nn.Parameter(one.detach().to(device=device, dtype=dtype, copy=True)) for one in module.parameters()}
    copied = place(copy.deepcopy(module, cast), precision, device)
    copied.requires_grad_(False)
    return copied.eval()


def autocast_forward(module: nn.Module, device: torch.device) -> None:
    """Make every call of `module` run under torch.autocast to bf16; its signature stays."""
    import torch

    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return inner(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]


@contextmanager
def unrounded_buffers(module: nn.Module) -> Iterator[None]:
    """Whatever a framework casts inside, floating-point buffers have their own type and values again afterwards."""
    before = {name: buffer.detach().clone() for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    yield
    for name, buffer in module.named_buffers():
        if name in before:
            buffer.data = before[name].to(buffer.device)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, a tied one once."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def make_optimizer(parameters: list[Any], cell: Cell, learning_rate: float) -> torch.optim.Optimizer:
    """The AdamW that the cell's settings name, on `parameters`."""
    import torch

    optimizer = cell.settings.optimizer
    if optimizer == "hybrid":
        return hybrid_adam(parameters, cell, learning_rate)
    return torch.optim.AdamW(parameters, foreach=optimizer == "foreach", fused=optimizer == "fused", **adamw_arguments(cell, learning_rate))


def hybrid_adam(parameters: list[Any], cell: Cell, learning_rate: float) -> torch.optim.Optimizer:
    """ColossalAI's HybridAdam in AdamW mode; its GPU kernels are built at first use, unless they are there prebuilt."""
    from colossalai.nn.optimizer import HybridAdam

    load_prebuilt_without_compiler()
    return HybridAdam(parameters, adamw_mode=True, **adamw_arguments(cell, learning_rate))


def adamw_arguments(cell: Cell, learning_rate: float) -> dict[str, Any]:
    """The numbers of AdamW, the same for every implementation."""
    settings = cell.settings
    return {"lr": learning_rate, "betas": (settings.beta1, settings.beta2), "eps": 1e-8, "weight_decay": settings.weight_decay}


def optimizer_problem(cell: Cell) -> str | None:
    """Why the cell's optimizer cannot run on its device, or None."""
    if cell.settings.optimizer == "hybrid" and cell.settings.device != "cuda":
        return "optimizer hybrid (HybridAdam) has kernels for cuda only; adamw, foreach or fused run on a cpu"
    return None


def global_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """L2 norm over all gradients together, whatever their type; fp32 sums, and fp64 on a CPU, whose kernel adds in sequence."""
    import torch

    dtype = torch.float64 if gradients[0].device.type == "cpu" else torch.float32
    norms = torch._foreach_norm(gradients, 2, dtype=dtype)
    return torch.linalg.vector_norm(torch.stack(norms)).float()


def set_learning_rate(optimizer: Any, value: float) -> None:
    """Learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


class LossScale:
    """Dynamic loss scaling with the numbers of ColossalAI v0.2.8: halved after 2 overflows, doubled after 1000 steps without."""

    def __init__(self) -> None:
        self.value = 2.0**16
        self._overflows = self._clean = 0

    def state(self) -> dict[str, Any]:
        """What a save keeps, for `load`."""
        return {"value": self.value, "overflows": self._overflows, "clean": self._clean}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a save."""
        self.value, self._overflows, self._clean = state["value"], state["overflows"], state["clean"]

    def update(self, *, overflow: bool) -> None:
        """Adapt the scale of the next step to whether this one overflowed."""
        if overflow:
            self._overflows, self._clean = self._overflows + 1, 0
            if self._overflows >= 2:
                self.value = max(self.value / 2, 1.0)
            return
        self._clean += 1
        if self._clean == 1000:
            self.value, self._overflows, self._clean = min(self.value * 2, 2.0**32), 0, 0
