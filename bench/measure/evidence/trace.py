"""Collectives of one step, seen where torch dispatches them, whoever asked: Python, DDP's reducer in C++, or a framework.

A dispatch mode sees every operator of the thread, and of the autograd threads that work for it. It is entered from a model's
first training forward pass to the end of its `step()`, once, and costs some microseconds an operator meanwhile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure.evidence.holdings import Engine, Holdings
from bench.measure.evidence.walk import Amount, digests
from bench.record import Traffic

NAMESPACES = frozenset({"c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd"})
"""Where torch's collectives live: torch.distributed, and its functional twin that DTensor uses."""

KINDS = (
    ("reduce_scatter", "reduce-scatter"), ("all_reduce", "all-reduce"), ("allreduce", "all-reduce"), ("all_gather", "all-gather"),
    ("allgather", "all-gather"), ("alltoall", "all-to-all"), ("all_to_all", "all-to-all"), ("broadcast", "broadcast"),
    ("reduce", "reduce"), ("gather", "gather"), ("scatter", "scatter"), ("send", "send"), ("recv", "receive"),
)  # fmt: skip
"""Part of an operator's name -> kind; the first that fits."""


def kind_of(operator: str) -> str | None:
    """The kind of a collective by its operator's name; None for what moves no data (barrier, wait).

    >>> kind_of("_reduce_scatter_base_"), kind_of("allreduce_"), kind_of("barrier")
    ('reduce-scatter', 'all-reduce', None)
    """
    return next((kind for part, kind in KINDS if part in operator), None)


def tensor_bytes(value: Any) -> int:
    """Bytes of a tensor, or of all tensors in lists of lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


class Listener(TorchDispatchMode):
    """Counts collectives while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator as it would have run, and count it if it is a collective."""
        if any(hasattr(kind, "_local_tensor") for kind in types):
            return NotImplemented  # a DTensor takes itself apart first; its collectives come by afterwards
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func.namespace in NAMESPACES and (kind := kind_of(func._opname)):
            count, size = self.seen.get(kind, (0, 0))
            self.seen[kind] = count + 1, size + max(map(tensor_bytes, [*args, result]))
        return result


class ModelTrace:
    """What one model's engine does in its traced step."""

    def __init__(self, engine: Engine, holdings: Holdings) -> None:
        self._engine, self._holdings = engine, holdings
        self._listener = Listener()
        self._listening = False
        self._backwards = 0
        self._handle: Any = None
        self._weights: dict[str, int] = {}
        self.micro_steps: tuple[int, int] | None = None
        """Weights that the second micro-step found otherwise than the first, of how many; None if there was no second one."""
        self.gradients: Amount | None = None
        """Just before the update."""
        self.done = False
        """The update took place."""

    @property
    def collectives(self) -> dict[str, Traffic]:
        """Kind -> how many and how much."""
        return {kind: Traffic(count=count, bytes=size) for kind, (count, size) in sorted(self._listener.seen.items())}

    def install(self) -> None:
        """Hook into the module's forward passes and stand in front of the engine's methods."""
        self._handle = self._engine.module.register_forward_pre_hook(self._before_forward, prepend=True)
        for name in ("backward", "run", "step"):
            if hasattr(self._engine, name):
                vars(self._engine)[name] = functools.partial(getattr(self, f"_{name}"), getattr(self._engine, name))

    def remove(self) -> None:
        """Leave the engine as it was."""
        self._silence()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            for name in ("backward", "run", "step"):
                vars(self._engine).pop(name, None)

    def _before_forward(self, module: nn.Module, arguments: Any) -> None:  # noqa: ARG002 (torch's signature)
        if not torch.is_grad_enabled():
            return
        if not self._listening:
            self._engine.reshard()  # so that the step gathers what it reads
            self._weights = self._bits()
            self._listen()
        elif self._backwards and self.micro_steps is None:
            now = self._bits()
            common = [name for name in now if name in self._weights]
            self.micro_steps = sum(now[name] != self._weights[name] for name in common), len(common)

    def _bits(self) -> dict[str, int]:
        weights = self._holdings.weights()
        return dict(zip(weights, digests(weights.values()), strict=True))

    def _backward(self, method: Callable[..., Any], *args: Any, **named: Any) -> Any:
        result = method(*args, **named)
        self._backwards += 1
        return result

    def _run(self, method: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """A pipelined engine's whole step of forward and backward passes."""
        if torch.is_grad_enabled():
            self._listen()
        return method(*args, **named)

    def _step(self, method: Callable[..., Any]) -> Any:
        gradients = self._holdings.gradients()
        norm = method()
        if math.isfinite(float(norm)):
            self.gradients, self.done = gradients, True
            self.remove()
        else:  # fp16 overflowed and nothing was updated; the next step may be traced
            self._silence()
            self._listener, self._backwards = Listener(), 0
        return norm

    def _listen(self) -> None:
        if not self._listening:
            self._listener.__enter__()
            self._listening = True

    def _silence(self) -> None:
        if self._listening:
            self._listening = False
            self._listener.__exit__(None, None, None)


@contextmanager
def tracing(traces: Iterable[ModelTrace]) -> Iterator[None]:
    """Trace the first step that each model does inside."""
    found = list(traces)
    for trace in found:
        trace.install()
    try:
        yield
    finally:
        for trace in found:
            trace.remove()
