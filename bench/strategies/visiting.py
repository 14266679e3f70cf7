"""Frozen models larger than what the device has left: weights stay in host memory, and each part visits the device while it computes.

A part is a layer of a stack of layers, or a module with weights of its own outside of them. Its weights are copied to the device before its
forward pass and forgotten after it; there is nothing to copy back. Of the model the device holds its buffers, the largest part and what is
on its way. Copies come from pinned memory, so that the host does not wait for them. Torch is imported inside functions.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from bench.strategies.precision import autocast_forward, storage_dtype

if TYPE_CHECKING:
    import torch
    from torch import nn


def visiting_copy(module: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """A copy of `module` that is only read: weights in host memory, in the mode's storage type, computing on `device`; in eval mode."""
    import torch

    dtype, pinned = storage_dtype(precision), device.type == "cuda"
    cast: dict[int, Any] = {}
    for one in module.parameters():
        held = one.detach().to("cpu", dtype, copy=True)
        cast[id(one)] = torch.nn.Parameter(held.pin_memory() if pinned else held, requires_grad=False)
    copied = copy.deepcopy(module, cast).requires_grad_(False).eval()
    for buffer in copied.buffers():
        buffer.data = buffer.data.to(device)
    for part in visiting_parts(copied):
        Visit(part, device)
    if precision == "bf16-autocast":
        autocast_forward(copied, device)
    return copied


def visiting_parts(module: nn.Module) -> list[nn.Module]:
    """The parts of `module` that together hold all of its weights, none inside another."""
    from torch import nn

    parts: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            parts += list(child)
        elif not any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
            parts += [child] if any(True for _ in child.parameters()) else []
        else:
            parts += visiting_parts(child)
    return parts


class Visit:
    """Brings a part's weights to the device for each of its forward passes."""

    def __init__(self, part: nn.Module, device: torch.device) -> None:
        self._device = device
        self._home = [(parameter, parameter.data) for parameter in part.parameters()]
        part.register_forward_pre_hook(self._arrive)
        part.register_forward_hook(self._leave, always_call=True)

    def _arrive(self, *_: Any) -> None:
        for parameter, home in self._home:
            parameter.data = home.to(self._device, non_blocking=True)

    def _leave(self, *_: Any) -> None:
        for parameter, home in self._home:
            parameter.data = home
