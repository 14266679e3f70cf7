"""Models under ColossalAI's HybridParallelPlugin: every rank holds a slice of each layer (tensor parallel), or a run of layers (pipeline).

Facts of ColossalAI 0.5.0 that this file answers for
* Shardformer replaces modules, the LM head among them; hooks of the old ones are moved to the new ones.
* The schedule of the pipeline keeps the shapes of its first batch; it is set anew for each call, since widths differ.
* The norm is computed only while clipping; an infinite largest norm computes it and clips nothing.
* In that norm it takes slices of GPT-2's fused matrices for whole ones, and divides their squares by the tensor-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bench.cell import Cell
from bench.strategies.base import Engine, PipelinedEngine
from bench.strategies.colossal import load_loss_scale, loss_scale_state
from bench.strategies.ddp import arm, synchronise_when_armed
from bench.strategies.precision import make_optimizer, set_learning_rate, storage_dtype, trainable, unrounded_buffers

if TYPE_CHECKING:
    import torch
    from torch import nn


class HybridEngine(Engine):
    """A model over tensor- and data-parallel ranks. DDP averages over the latter."""

    def __init__(self, module: nn.Module, cell: Cell, plugin: Any, *, learning_rate: float) -> None:
        from colossalai.booster import Booster

        self.module: Any
        know_fused_slices()
        self._precision, self._plugin, self._booster = cell.settings.precision, plugin, Booster(plugin=plugin)
        optimizer = make_optimizer(trainable(module), cell, learning_rate)
        with unrounded_buffers(module), moved_hooks(module):
            self.module, self._optimizer, *_ = self._booster.boost(module, optimizer)
        self._arrange()

    def _arrange(self) -> None:
        """Gradients are reduced when asked for only."""
        synchronise_when_armed(self.module.module)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """See `Engine.backward`. Only the last micro-step synchronises; DDP averages, so the loss is multiplied by its ranks."""
        if last:
            arm(self.module.module)
        self._booster.backward(loss * self._plugin.dp_size, self._optimizer)

    def step(self) -> float | torch.Tensor:
        """See `Engine.step`. Infinite where fp16 overflowed: ColossalAI skipped that step and lowers its loss scale."""
        self._optimizer._current_grad_norm = None
        self._optimizer.step()
        norm = self._optimizer.get_grad_norm()
        scale = self._optimizer.mixed_precision.loss_scale if self._precision == "fp16-master" else 1.0
        self._optimizer.zero_grad()
        return math.inf if norm is None else norm / scale

    def set_learning_rate(self, value: float) -> None:
        """See `Engine.set_learning_rate`."""
        set_learning_rate(self._optimizer, value)

    def full_state(self) -> dict[str, torch.Tensor] | None:
        """See `Engine.full_state`. ColossalAI's parallel modules gather their slices; the runs of layers come together on rank 0."""
        import torch.distributed as dist

        dtype = storage_dtype(self._precision)
        state = {
            name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True)
            for name, tensor in self.module.unwrap().state_dict().items()
        }
        if self._plugin.pp_size > 1:
            group, first = self._plugin.pp_group, dist.get_rank(self._plugin.pp_group) == 0
            parts: list[Any] | None = [None] * self._plugin.pp_size if first else None
            dist.gather_object(state, parts, dst=dist.get_global_rank(group, 0), group=group)
            state = {name: tensor for part in parts or () for name, tensor in part.items()}
        return state if dist.get_rank() == 0 else None

    def training_state(self) -> dict[str, Any]:
        """See `Engine.training_state`: this rank's slices, masters and moments."""
        return {**super().training_state(), "loss_scale": loss_scale_state(self._mixin)}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """See `Engine.load_training_state`."""
        super().load_training_state(state)
        load_loss_scale(self._mixin, state["loss_scale"])

    @property
    def _mixin(self) -> Any:
        return getattr(self._optimizer, "mixed_precision", None)


class HybridPipelineEngine(HybridEngine, PipelinedEngine):
    """A model whose layers lie over pipeline stages, each of them over tensor- and data-parallel ranks."""

    backward = PipelinedEngine.backward

    def _arrange(self) -> None:
        """There is no DDP: ColossalAI averages gradients over data-parallel ranks at the end of a step.

        And it adds up the gradients of what two stages share (a tied embedding), which has none where it is frozen; the norm looks for
        its master.
        """
        pairs = zip(self.module.shared_params, self.module.shared_param_process_groups, strict=True)
        kept = [(shared, group) for shared, group in pairs if all(parameter.requires_grad for parameter in shared.values())]
        self.module.shared_params = self._optimizer.shared_params = [shared for shared, _ in kept]
        self.module.shared_param_process_groups = [group for _, group in kept]

    def run(self, inputs: dict[str, Any], rows: int, losses: Callable[[Any, int], torch.Tensor], *, values: int = 1) -> torch.Tensor:
        """See `PipelinedEngine.run`. One forward, one backward (1F1B)."""
        import torch
        import torch.distributed as dist

        plugin, total, done = self._plugin, torch.zeros(values, device=_device(inputs)), 0
        count = len(inputs["input_ids"]) // rows
        _reset(plugin.scheduler, rows=rows, count=count)

        def criterion(output: Any, _: Any) -> torch.Tensor:
            nonlocal done
            found = losses(output, done)
            done += 1
            total.add_(found.detach())
            return found[0] * (count * plugin.dp_size)

        optimizer = self._optimizer if torch.is_grad_enabled() else None
        self.module.require_grad_sync = optimizer is not None  # else it adds up gradients that are not there
        self._booster.execute_pipeline(iter([inputs]), self.module, criterion, optimizer, return_loss=False)
        dist.broadcast(total, src=dist.get_global_rank(plugin.pp_group, plugin.pp_size - 1), group=plugin.pp_group)
        return total


def know_fused_slices() -> None:
    """Let the gradient norm know GPT-2's fused matrices, which are cut by functions of their own, as slices."""
    from colossalai.booster.plugin import hybrid_parallel_plugin
    from colossalai.tensor.d_tensor.api import is_customized_distributed_tensor, is_distributed_tensor

    def is_slice(tensor: torch.Tensor) -> bool:
        return bool(is_distributed_tensor(tensor) or is_customized_distributed_tensor(tensor))

    hybrid_parallel_plugin.is_distributed_tensor = is_slice


def _device(inputs: dict[str, Any]) -> torch.device:
    device: torch.device = inputs["input_ids"].device
    return device


def _reset(schedule: Any, *, rows: int, count: int) -> None:
    """Make the 1F1B schedule forget the shapes of the last call; within a call they are sent once."""
    schedule.microbatch_size, schedule.num_microbatches, schedule.last_batch_size = rows, count, rows * count
    schedule.enable_metadata_cache = schedule.send_tensor_metadata = schedule.send_grad_metadata = True
    schedule.tensor_metadata_recv = schedule.grad_metadata_recv = None


@contextmanager
def moved_hooks(module: nn.Module) -> Iterator[None]:
    """Forward pre-hooks of modules that are replaced inside belong to what replaced them afterwards."""
    before = {name: list(child._forward_pre_hooks.values()) for name, child in module.named_modules() if child._forward_pre_hooks}
    yield
    for name, hooks in before.items():
        child = module.get_submodule(name)
        for hook in hooks if not child._forward_pre_hooks else ():
            child.register_forward_pre_hook(hook)
