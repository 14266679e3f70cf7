"""What the strategies made of DeepSpeed's ZeRO share: its configuration, its engine, and how weights are read from it.

DeepSpeed is an optional extra. On a CPU its own CPU accelerator trains over gloo; only its shared-memory collectives, which would be
compiled at first use, are left out, as DeepSpeed itself does where they do not fit.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

from bench.cell import Cell
from bench.strategies.base import Engine, Strategy
from bench.strategies.precision import (
    autocast_forward,
    make_optimizer,
    set_learning_rate,
    storage_dtype,
    trainable,
    unrounded_buffers,
)
from bench.strategies.requirement import Requirement

if TYPE_CHECKING:
    import torch
    from torch import nn

PRECISION: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16-autocast": {},
    "bf16-master": {"bf16": {"enabled": True}},
    "bf16-pure": {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
    "fp16-master": {"fp16": {"enabled": True, "initial_scale_power": 16}},
}
"""Precision mode -> DeepSpeed's words for it. Under `bf16-autocast` parameters, gradients and their reduction stay fp32."""

LARGEST_BUCKET = 500_000_000
"""DeepSpeed's default, in elements. It allocates whole buckets, so here they are no larger than what fills them."""

PERSISTENT = 100_000
"""ZeRO-3 leaves smaller parameters whole on every rank (DeepSpeed's default, in elements)."""


def configuration(module: nn.Module, cell: Cell, *, stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration of one model. All that is not named is at DeepSpeed's defaults."""
    sizes = [(parameter, getattr(parameter, "ds_numel", parameter.numel())) for parameter in module.parameters()]
    elements = sum(size for _, size in sizes)
    bucket = bucket_elements(sum(size for parameter, size in sizes if parameter.requires_grad) or elements)
    return {
        "train_micro_batch_size_per_gpu": cell.settings.micro_batch,
        "gradient_accumulation_steps": cell.accumulation,
        "gradient_clipping": cell.settings.clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 40,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_param_persistence_threshold": min(PERSISTENT, elements // 1000),
        },
        **PRECISION[cell.settings.precision],
    }


def bucket_elements(elements: int) -> int:
    """Elements of a bucket that so many fill."""
    return min(LARGEST_BUCKET, elements)


def lay_out(module: nn.Module, cell: Cell, device: torch.device, optimizer: torch.optim.Optimizer | None, *, stage: int) -> tuple[Any, Any]:
    """`deepspeed.initialize`: the engine around `module`, and the optimizer around `optimizer`. Buffers keep their type.

    It imports much of torch's compiler, whose warnings concern nobody here.
    """
    import deepspeed

    if cell.settings.precision == "bf16-autocast":
        autocast_forward(module, device)
    with unrounded_buffers(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, wrapped, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=configuration(module, cell, stage=stage))
    return engine, wrapped


class DeepSpeedZeroEngine(Engine):
    """A model under a DeepSpeedEngine, which averages over ranks, clips, and keeps masters and states in shards."""

    def __init__(self, module: nn.Module, cell: Cell, device: torch.device, *, learning_rate: float, stage: int) -> None:
        import torch.distributed as dist

        self.module: Any
        self._bare, self._ranks, self._precision = module, dist.get_world_size(), cell.settings.precision
        self.module, self._optimizer = lay_out(module, cell, device, make_optimizer(trainable(module), cell, learning_rate), stage=stage)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """See `Engine.backward`. Every micro-step reduces its gradients, so that they are never whole on a rank."""
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss * self._ranks, scale_wrt_gas=False)

    def step(self) -> float | torch.Tensor:
        """See `Engine.step`. Infinite where a gradient overflowed: DeepSpeed skipped that step and lowers its loss scale."""
        self.module.step()
        return self.module.get_global_grad_norm() if self.module.was_step_applied() else math.inf

    def set_learning_rate(self, value: float) -> None:
        """See `Engine.set_learning_rate`."""
        set_learning_rate(self._optimizer, value)

    def gradient_shares(self) -> list[torch.Tensor]:
        """See `Engine.gradient_shares`. Where a tensor straddles two ranks' shares, DeepSpeed's part of it is a view of the whole."""
        groups = self._optimizer.averaged_gradients.values()
        return [share for group in groups if group for share in group if share is not None]

    def training_state(self) -> dict[str, Any]:
        """See `Engine.training_state`; with the loss scale."""
        return {**super().training_state(), "scale": plain(self._optimizer.loss_scaler)}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """See `Engine.load_training_state`."""
        super().load_training_state(state)
        vars(self._optimizer.loss_scaler).update(state["scale"])

    def full_state(self) -> dict[str, torch.Tensor] | None:
        """See `Engine.full_state`. What ZeRO-3 keeps in shards is gathered tensor by tensor."""
        import deepspeed
        import torch.distributed as dist

        dtype, first = storage_dtype(self._precision), dist.get_rank() == 0
        found = {}
        for name, tensor in self._bare.state_dict(keep_vars=True).items():
            with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                if first:
                    found[name] = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True)
        return found if first else None


def ask_torch_for_memory(accelerator: type) -> None:
    """Let an accelerator of DeepSpeed's say what is free on a device known by its UUID.

    To ask NVML it takes CUDA_VISIBLE_DEVICES for numbers, and UUIDs are a ValueError (0.19.8, cuda_accelerator.py, `_get_nvml_gpu_id`).
    """
    import torch

    def available_memory(self: object, device_index: int | None = None) -> int:  # noqa: ARG001 (a method of theirs)
        return int(torch.cuda.mem_get_info(device_index)[0])

    accelerator.available_memory = available_memory  # type: ignore[attr-defined]


def plain(item: object) -> dict[str, Any]:
    """The numbers among the attributes of an object."""
    return {name: value for name, value in vars(item).items() if isinstance(value, (bool, int, float))}


class DeepSpeedZero(Strategy):
    """A stage of DeepSpeed's ZeRO with torch's AdamW."""

    precisions = frozenset(PRECISION)
    requires = (Requirement("deepspeed", "0.19", extra="deepspeed"),)
    flat_updates = True
    stage: ClassVar[int]
    engine: ClassVar[type[DeepSpeedZeroEngine]] = DeepSpeedZeroEngine

    def unsupported(self, cell: Cell) -> str | None:
        """See `Strategy.unsupported`."""
        if cell.settings.optimizer == "hybrid":
            return f"{self.name}: optimizer hybrid is ColossalAI's; adamw, foreach or fused would be right"
        return super().unsupported(cell)

    def emulated(self, cell: Cell) -> bool:
        """See `Strategy.emulated`. DeepSpeed refuses fp16 on most CPUs, though torch computes in it."""
        return cell.settings.device == "cpu" and cell.settings.precision == "fp16-master"

    def start(self, cell: Cell, device: torch.device) -> None:
        """See `Strategy.start`."""
        os.environ["DS_ACCELERATOR"] = device.type
        warnings.filterwarnings("ignore", module=r"deepspeed\.")
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
            import deepspeed.ops
            from deepspeed.accelerator import get_accelerator

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if device.type == "cpu":
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if device.type == "cuda":
            ask_torch_for_memory(type(get_accelerator()))
        if self.emulated(cell):
            type(get_accelerator()).is_fp16_supported = lambda _: True
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)

    def prepare(self, module: nn.Module, cell: Cell, device: torch.device, *, learning_rate: float) -> Engine:
        """See `Strategy.prepare`. DeepSpeed itself places the model on this rank's device."""
        return self.engine(module, cell, device, learning_rate=learning_rate, stage=self.stage)
