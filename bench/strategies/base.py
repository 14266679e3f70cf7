"""The one protocol of all strategies. Torch-free at import: planning reads only names and `unsupported`.

A strategy is one file in this folder with one subclass of `Strategy`; it is found by listing the folder. It imports its
framework inside its methods.

Contract of a prepared model (`Engine`)
* The loss handed to `backward` is the *global* one: sum of token losses of this micro-batch / loss tokens of the whole
  step over all ranks and micro-steps. Where a framework averages gradients over ranks, the engine multiplies by the
  data-parallel size, so that the step's gradient is that of the global mean whatever the number of ranks.
* `backward(loss, last=...)` is called once a micro-step; `last` is true in the step's last one (gradients synchronise there
  at the latest). `step()` clips, updates, zeroes the gradients and returns the gradient norm before clipping.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from bench.cell import Cell

if TYPE_CHECKING:
    import torch
    from torch import nn


class Engine(ABC):
    """A model as a strategy laid it out, ready for forward, backward and step."""

    module: nn.Module
    """Call this for every forward pass (training, scoring and, with a KV cache, generation)."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate the gradients of the global loss of one micro-batch."""

    @abstractmethod
    def step(self) -> float | torch.Tensor:
        """Clip, update, zero the gradients. Returns the global gradient norm before clipping (may stay on the device)."""

    @abstractmethod
    def set_learning_rate(self, value: float) -> None:
        """Learning rate of the next step."""

    @abstractmethod
    def full_state(self) -> dict[str, torch.Tensor] | None:
        """All weights, unsharded, on the CPU, under the names that the bare module has (LoRA layers included).

        Collective: every rank calls it; rank 0 gets the weights, the others None.
        """


class Strategy(ABC):
    """How model and optimizer state lie over ranks."""

    name: ClassVar[str]
    precisions: ClassVar[frozenset[str]]
    """Precision modes that it offers."""
    description: ClassVar[str] = ""
    """One line for people."""
    uses_colossalai: ClassVar[bool] = False
    sharded: ClassVar[frozenset[str]] = frozenset()
    """What lies in equal shares over the data-parallel ranks: parameters, gradients, optimizer."""

    def unsupported(self, cell: Cell) -> str | None:
        """Why `cell` can never run under this strategy, or None. Subclasses add to it."""
        if cell.settings.precision not in self.precisions:
            return f"{self.name} does not offer precision {cell.settings.precision}; it offers {', '.join(sorted(self.precisions))}"
        return None

    def forced_settings(self, cell: Cell) -> dict[str, Any]:  # noqa: ARG002 (for those that force something)
        """Settings that it replaces whatever the cell says (Gemini: optimizer), setting -> value in force."""
        return {}

    def emulated(self, cell: Cell) -> bool:
        """Whether it runs on a CPU only behind stand-ins, so that its times and memory mean nothing."""
        return self.uses_colossalai and cell.settings.device == "cpu"

    @abstractmethod
    def start(self, cell: Cell, device: torch.device) -> None:
        """Set up the framework on this rank, once, after the process group exists (CPU stand-ins included)."""

    @abstractmethod
    def prepare(self, module: nn.Module, cell: Cell, device: torch.device, *, learning_rate: float) -> Engine:
        """Lay out `module` (fp32, on the CPU, adapters already in, frozen parameters marked) and make its optimizer.

        Works on several modules of one trial (PPO: policy and critic).
        """

    def place_frozen(self, module: nn.Module, cell: Cell, device: torch.device) -> nn.Module:
        """Put a model that is only read (reference policy, reward model) on the device, in the precision's storage type."""
        from bench.strategies.precision import frozen_copy

        return frozen_copy(module, cell.settings.precision, device)


@cache
def all_strategies() -> dict[str, Strategy]:
    """Every strategy in this folder, by name."""
    import bench.strategies as package

    for item in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{item.name}")
    return {strategy.name: strategy for strategy in sorted((kind() for kind in _leaves(Strategy)), key=lambda it: it.name)}  # type: ignore[type-abstract]


def _leaves(kind: type[Strategy]) -> Iterable[Callable[[], Strategy]]:
    for child in kind.__subclasses__():
        yield from _leaves(child)
        if "name" in vars(child):
            yield child
