"""gemini: ColossalAI's chunked ZeRO-3. Parameters, gradients and optimizer states in shards, gathered chunk by chunk.

Facts of ColossalAI 0.5.0 that this file answers for
* 16-bit only: there is no fp32.
* More than one micro-step needs `enable_gradient_accumulation`; without it training silently stands still.
* It takes only ColossalAI's own Adams, so `optimizer` is forced (`forced_settings`).
* The norm is computed only while clipping; an infinite largest norm computes it and clips nothing.
* It clips through `div_scale`, which HybridAdam does not heed for bf16 gradients in host memory; `heed_divisor` has it do so.
* A skipped fp16 step leaves the overflowed sums in place, and the next step would add to them for ever; `step` drops them.
* Parameters that do not train are not sharded: every rank holds them whole. So with LoRA the base model is.
* By default less than 32 Mi elements stay gathered on every rank, and accumulation over such chunks is wrong on more than one
  rank: the sum so far is multiplied by the ranks before an all-reduce that adds it up over the ranks again
  (colossalai/zero/gemini/chunk/manager.py, rearrange_accumulated_grad_chunk). Here the chunks of a smaller model, or of LoRA
  adapters, are smaller instead, so that they are always sharded.
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
    load_loss_scale,
    loss_scale_state,
    start_colossalai,
)
from bench.strategies.precision import (
    MASTER_MODES,
    adamw_arguments,
    hybrid_adam,
    set_learning_rate,
    storage_dtype,
    trainable,
    unrounded_buffers,
)

if TYPE_CHECKING:
    import torch
    from torch import nn


class GeminiEngine(Engine):
    """A model under GeminiDDP and GeminiOptimizer, which average over ranks, clip, and keep the fp32 masters in chunks."""

    def __init__(self, module: nn.Module, cell: Cell, plugin: Any, *, learning_rate: float) -> None:
        import torch.distributed as dist
        from colossalai.booster import Booster
        from colossalai.zero.gemini import GeminiDDP

        self.module: Any
        self._ranks, self._precision = dist.get_world_size(), cell.settings.precision
        self._booster = Booster(plugin=plugin)
        optimizer = _adam(trainable(module), cell, learning_rate)
        GeminiDDP.set_params_to_ignore([parameter for parameter in module.parameters() if not parameter.requires_grad])
        with unrounded_buffers(module):
            self.module, self._optimizer, *_ = self._booster.boost(module, optimizer)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:  # noqa: ARG002  every micro-step reduces its chunks
        """See `Engine.backward`."""
        self._booster.backward(loss * self._ranks, self._optimizer)

    def step(self) -> float | torch.Tensor:
        """See `Engine.step`. Infinite where fp16 overflowed: ColossalAI skipped that step and lowers its loss scale."""
        self._optimizer._current_grad_norm = None
        self._optimizer.step()
        self.module.chunk_manager.accumulating_grads = False
        norm = self._optimizer.get_grad_norm()
        scale = self._optimizer.mix_precision_mixin.loss_scale if self._precision == "fp16-master" else 1.0
        return math.inf if norm is None else norm / scale

    def set_learning_rate(self, value: float) -> None:
        """See `Engine.set_learning_rate`."""
        set_learning_rate(self._optimizer, value)

    def full_state(self) -> dict[str, torch.Tensor] | None:
        """See `Engine.full_state`. Gathers chunk by chunk."""
        import torch.distributed as dist

        self._take_over_late_updates()
        state = self.module.state_dict(only_rank_0=True)
        if dist.get_rank() != 0:
            return None
        dtype = storage_dtype(self._precision)
        return {name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True) for name, tensor in state.items()}

    def _take_over_late_updates(self) -> None:
        """Round into working chunks in host memory what their masters have become. ColossalAI does so only when such a chunk next moves to
        the device (`Chunk.optim_sync_flag`), but under accumulation `state_dict` reads working chunks where they lie.
        """
        for chunk in self._optimizer.chunk16_set:
            if not chunk.optim_sync_flag:
                chunk.cpu_shard.copy_(chunk.paired_chunk.cpu_shard)

    def training_state(self) -> dict[str, Any]:
        """See `Engine.training_state`: this rank's shares of the chunks that the optimizer updates, and its moments."""
        from bench.strategies.training_state import capture, kept

        chunks = [kept(chunk.payload) for chunk in self._updated_chunks()]
        return {**capture(None, self._optimizer), "chunks": chunks, "loss_scale": loss_scale_state(self._optimizer.mix_precision_mixin)}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """See `Engine.load_training_state`. ColossalAI itself copies the masters into the working chunks."""
        from bench.errors import CheckpointError
        from bench.strategies.training_state import put_back, restore

        chunks = self._updated_chunks()
        if len(chunks) != len(state["chunks"]):
            raise CheckpointError(f"the saved training state has {len(state['chunks'])} chunks; {len(chunks)} would be right")
        for saved, chunk in zip(state["chunks"], chunks, strict=True):
            put_back(saved, chunk.payload)
        if self.module.master_weights:
            for chunk in self._optimizer.chunk16_set:
                chunk.optim_update()
        restore(state, None, self._optimizer)
        load_loss_scale(self._optimizer.mix_precision_mixin, state["loss_scale"])

    def _updated_chunks(self) -> list[Any]:
        """Chunks with the values that the optimizer updates (masters, if there are any), all in shards, in the order of the parameters."""
        for chunk in self._optimizer.chunk16_set:
            self.module.chunk_manager.release_chunk(chunk)
        working = dict.fromkeys(self._optimizer.param_to_chunk16.values())
        return [chunk.paired_chunk if self.module.master_weights else chunk for chunk in working]


def _adam(parameters: list[Any], cell: Cell, learning_rate: float) -> Any:
    """HybridAdam on a GPU; on a CPU, where its kernels cannot be built, the stand-in."""
    if cell.settings.device == "cuda":
        return heed_divisor(hybrid_adam(parameters, cell, learning_rate))
    from bench.strategies.cpu_emulation import plain_adam

    return plain_adam()(parameters, **adamw_arguments(cell, learning_rate))


def heed_divisor(optimizer: Any) -> Any:
    """Have a HybridAdam divide by `div_scale` also the bf16 gradients in host memory, which it updates without its kernel; return it."""
    step, update = optimizer.step, optimizer.torch_adam_update

    def step_by_divided(closure: Any = None, div_scale: float = -1.0) -> Any:
        def update_by_divided(data: torch.Tensor, gradient: torch.Tensor, *rest: Any) -> None:
            update(data, gradient.to(data.dtype).div_(div_scale), *rest)

        optimizer.torch_adam_update = update if div_scale == -1.0 else update_by_divided
        return step(closure, div_scale)

    optimizer.step = step_by_divided
    return optimizer


class Gemini(ColossalStrategy):
    """Gemini with static placement on the device; subclasses place chunks elsewhere."""

    name = "gemini"
    precisions = frozenset(PLUGIN_PRECISION) - {"fp32"}
    description = "ColossalAI Gemini: parameters, gradients and optimizer states in sharded chunks (ZeRO-3)"
    sharded = frozenset({"parameters", "gradients", "optimizer"})
    copies_gradients = False
    keeps_accumulated = True
    quantising_threads = ("hpcaitech/ColossalAI#4929", "hpcaitech/ColossalAI#6138")
    placement: ClassVar[dict[str, Any]] = {"placement_policy": "static"}
    """Arguments of GeminiPlugin that say where chunks lie."""

    def forced_settings(self, cell: Cell) -> dict[str, Any]:
        """Gemini takes ColossalAI's Adam only; on a CPU an AdamW with the same arithmetic stands in."""
        return forced_hybrid(cell)

    def start(self, cell: Cell, device: torch.device) -> None:  # noqa: ARG002
        """See `Strategy.start`."""
        start_colossalai(device, gemini=True)

    def prepare(self, module: nn.Module, cell: Cell, device: torch.device, *, learning_rate: float) -> Engine:  # noqa: ARG002
        """See `Strategy.prepare`. ColossalAI itself places the model on this rank's device."""
        return GeminiEngine(module, cell, _plugin(module, cell, self.placement), learning_rate=learning_rate)


def _plugin(module: nn.Module, cell: Cell, placement: dict[str, Any]) -> Any:
    """A fresh GeminiPlugin; a plugin serves one model."""
    from colossalai.booster.plugin import GeminiPlugin

    on_gpu = cell.settings.device == "cuda"
    chunk = chunk_mebielements(sum(parameter.numel() for parameter in trainable(module)))
    return GeminiPlugin(
        **placement,
        precision=PLUGIN_PRECISION[cell.settings.precision],
        master_weights=cell.settings.precision in MASTER_MODES,
        enable_gradient_accumulation=cell.accumulation > 1,
        max_norm=cell.settings.clip_norm or math.inf,
        initial_scale=INITIAL_LOSS_SCALE,
        min_chunk_size_m=chunk,
        search_range_m=chunk,
        pin_memory=on_gpu,
        enable_async_reduce=on_gpu,
    )


def chunk_mebielements(trainable_elements: int) -> float:
    """Smallest chunk, in 2**20 elements: ColossalAI's 32, or a quarter of what trains, so that it is sharded in any case."""
    return min(32.0, trainable_elements // 4 / 2**20)
