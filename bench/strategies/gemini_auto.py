"""gemini_auto: gemini that decides from the memory it measures which parameter chunks stay on the device.

Gradients and optimizer states lie in host memory whatever is free (ColossalAI moves states to the device only for a
`gpu_margin_mem_ratio` above 0). Until a first backward pass has been measured, GeminiDDP refuses to infer ("You should run a completed
iteration as your warmup iter"); evaluations and rollouts come before it here, so `infer_before_warmup` lets them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from bench.cell import Cell
from bench.strategies.base import Engine
from bench.strategies.gemini import Gemini

if TYPE_CHECKING:
    import torch
    from torch import nn


class GeminiAuto(Gemini):
    """Gemini with automatic placement."""

    name = "gemini_auto"
    description = "ColossalAI Gemini: chunks sharded, parameters on the device as far as measured memory allows, the rest on the host"
    offloaded = frozenset({"gradients", "optimizer"})
    placement: ClassVar[dict[str, Any]] = {"placement_policy": "auto"}

    def gathered_share(self, elements: int, ranks: int) -> float:  # noqa: ARG002
        """See `Strategy.gathered_share`. A chunk that is gathered takes its shard's place, and stays for want of a reason to go."""
        return 1.0 - 1.0 / ranks

    def prepare(self, module: nn.Module, cell: Cell, device: torch.device, *, learning_rate: float) -> Engine:
        """See `Strategy.prepare`."""
        engine = super().prepare(module, cell, device, learning_rate=learning_rate)
        infer_before_warmup(engine.module)
        return engine


def infer_before_warmup(model: Any) -> None:
    """Let a GeminiDDP infer before its first backward pass, as it does later; nothing of it enters the warm-up's list of operations."""
    manager, forward = model.gemini_manager, model.forward

    def forward_any_time(*arguments: Any, **named: Any) -> Any:
        import torch

        if torch.is_grad_enabled() or not manager.is_warmup():
            return forward(*arguments, **named)
        outputs = model._inference_forward(*arguments, **named)
        manager._compute_list.clear()
        type(manager)._get_layout_info.cache_clear()
        return outputs

    model.forward = forward_any_time
