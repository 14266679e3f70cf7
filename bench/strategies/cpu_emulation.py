"""Stand-ins that let ColossalAI 0.5.0's own plugins run on a CPU with gloo.

Its CPU accelerator has no streams, events, memory counters or devices to count, and ZeRO and Gemini ask for a GPU by name. The
stand-ins do nothing where a CPU has nothing to do; all arithmetic and communication stay ColossalAI's. They live in the
process that installs them, and times and memory taken under them mean nothing (`Strategy.emulated`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class _NoStream:
    """A stream or event on a device that does everything in order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Whatever a stream or event takes."""

    def _nothing(self, *_: Any, **__: Any) -> None:
        """Work is done when it was asked for."""

    wait_stream = wait_event = synchronize = wait = record = _nothing

    def record_event(self, *_: Any) -> _NoStream:
        """The event, which has happened."""
        return self

    def query(self) -> bool:
        """All work is done."""
        return True


def _returns(value: Any) -> Callable[..., Any]:
    def stand_in(*_: Any, **__: Any) -> Any:
        return value

    return stand_in


def _makes_stream(*_: Any, **__: Any) -> _NoStream:
    return _NoStream()


def install() -> None:
    """Let ZeRO and hybrid parallelism run on this rank's CPU. Installing twice changes nothing."""
    import torch
    from colossalai.accelerator import set_accelerator
    from colossalai.accelerator.cpu_accelerator import CpuAccelerator
    from colossalai.zero.low_level.low_level_optim import LowLevelZeroOptimizer

    if getattr(CpuAccelerator, "coati_bench_stand_ins", False):
        return
    stand_ins: dict[str, Any] = {
        "coati_bench_stand_ins": True,
        **dict.fromkeys(("Stream", "Event", "current_stream", "default_stream"), _makes_stream),
        **dict.fromkeys(("set_stream", "synchronize", "empty_cache"), _returns(None)),
        **dict.fromkeys(("reset_peak_memory_stats", "reset_max_memory_allocated"), _returns(None)),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated"), _returns(0)),
        "stream": lambda *_: contextlib.nullcontext(),
        "device_count": _returns(1),
        "current_device": _returns(torch.device("cpu")),
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda _, state, *__, **___: torch.set_rng_state(state),
        "manual_seed": lambda _, seed: torch.manual_seed(seed),
    }
    for name, stand_in in stand_ins.items():
        setattr(CpuAccelerator, name, stand_in)
    LowLevelZeroOptimizer._sanity_checks = _returns(None)
    torch.Tensor.record_stream = _returns(None)  # type: ignore[method-assign]
    torch.cuda.set_device = _returns(None)  # GPT-2's stages of a pipeline call it
    torch.distributed.is_hccl_available = _returns(False)  # type: ignore[attr-defined]  # asked for by the pipeline's point-to-point calls
    set_accelerator("cpu")


def install_gemini() -> None:
    """Let Gemini run on this rank's CPU: it takes the accelerator for a GPU, and `PlainAdam` for one of its optimizers.

    `cpu:0` stands for the GPU and `cpu` for host memory, so that chunks are placed and moved as on a GPU, on paper: a shard that
    moves changes its attribute (`cuda_shard`, `cpu_shard`) and is not copied. Automatic placement sees a device without limits.
    """
    import torch
    from colossalai.accelerator import get_accelerator
    from colossalai.accelerator.cpu_accelerator import CpuAccelerator
    from colossalai.legacy.utils import memory
    from colossalai.zero.gemini import gemini_optimizer
    from colossalai.zero.gemini.chunk.chunk import Chunk
    from colossalai.zero.gemini.memory_tracer.memory_monitor import SyncCudaMemoryMonitor

    install()
    if get_accelerator().name == "cuda":
        return
    get_accelerator()._name = "cuda"
    CpuAccelerator.get_current_device = _returns(torch.device("cpu", 0))
    memory.colo_device_memory_capacity = _returns(2**40)
    SyncCudaMemoryMonitor.start, SyncCudaMemoryMonitor.finish = _returns(None), _returns(0)
    gemini_optimizer._AVAIL_OPTIM_LIST.add(plain_adam())
    make_chunk = Chunk.__init__

    def make_chunk_on_device(self: Any, *arguments: Any, **named: Any) -> None:
        make_chunk(self, *arguments, **named)
        self.shard_device = SimpleNamespace(type="cuda" if self.shard_device.index == 0 else "cpu")

    Chunk.__init__ = make_chunk_on_device
    Chunk.shard_move = _move_shard


def _move_shard(chunk: Any, device: torch.device, *_: Any, **__: Any) -> None:
    """What `Chunk.shard_move` does where host memory is not pinned, without a copy."""
    if not chunk.optim_sync_flag:
        chunk._Chunk__paired_shard_move()
        chunk.optim_sync_flag = True
    elif device.index == 0:
        chunk.cuda_shard, chunk.cpu_shard = chunk.cuda_shard if chunk.cpu_shard is None else chunk.cpu_shard, None
    elif chunk.cuda_shard is not None:
        chunk.cpu_shard, chunk.cuda_shard = chunk.cuda_shard, None


@cache
def plain_adam() -> type[torch.optim.Optimizer]:
    """The class that stands in for HybridAdam, whose kernels need a GPU: AdamW of torch with `step(div_scale=...)`."""
    import torch

    class PlainAdam(torch.optim.Optimizer):
        """AdamW whose gradients are divided by `div_scale`, and may be of a smaller type than the parameters.

        Gemini hands it slices of chunks as parameters; it calls `step` with -1 where there is nothing to divide by.
        """

        def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
            super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

        @torch.no_grad()
        def step(self, div_scale: float = -1.0) -> None:  # type: ignore[override]
            """Update every parameter that has a gradient."""
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group, 1.0 if div_scale == -1.0 else div_scale)

        def _update(self, parameter: Any, group: dict[str, Any], divisor: float) -> None:
            state, (beta1, beta2) = self.state[parameter], group["betas"]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(parameter.data), exp_avg_sq=torch.zeros_like(parameter.data))
            state["step"] += 1
            gradient = parameter.grad.to(parameter.dtype) / divisor
            state["exp_avg"].lerp_(gradient, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
            parameter.data.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.data.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1 ** state["step"]))

    return PlainAdam
