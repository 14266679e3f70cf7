"""The one protocol of all strategies. Torch-free at import: planning reads only names and `unsupported`.

A strategy is one file in this folder with one subclass of `Strategy`; it is found by listing the folder. It imports its
framework inside its methods.

Contract of a prepared model (`Engine`)
* The loss handed to `backward` is the *global* one: sum of token losses of this micro-batch / loss tokens of the whole
  step over all ranks and micro-steps. Where a framework averages gradients over ranks, the engine multiplies by the
  data-parallel size, so that the step's gradient is that of the global mean whatever the number of ranks.
* `backward(loss, last=...)` is called once a micro-step; `last` is true in the step's last one (gradients synchronise there
  at the latest). `step()` clips, updates, zeroes the gradients and returns the gradient norm before clipping.
* Between two steps, `training_state()` is all that this rank needs to go on in a new process; `load_training_state()` puts it into a
  freshly prepared engine. The defaults suit whatever keeps a torch optimizer in `_optimizer`; an engine that keeps more (masters
  outside its optimizer, a loss scale) adds it, and a strategy that cannot says `resumable = False`.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from bench.cell import Cell
from bench.strategies.kernels import kernel_problem
from bench.strategies.requirement import Requirement
from bench.strategies.slices import Slice, whole

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bench.measure.shape import Network


class Engine(ABC):
    """A model as a strategy laid it out, ready for forward, backward and step."""

    module: nn.Module
    """Call this for every forward pass (training, scoring and, with a KV cache, generation)."""
    _optimizer: Any
    """A torch optimizer, or a wrapper with one in `.optim`."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate the gradients of the global loss of one micro-batch."""

    @abstractmethod
    def step(self) -> float | torch.Tensor:
        """Clip, update, zero the gradients. Returns the global gradient norm before clipping (may stay on the device)."""

    @abstractmethod
    def set_learning_rate(self, value: float) -> None:
        """Learning rate of the next step."""

    def reshard(self) -> None:  # noqa: B027 (most have nothing to do)
        """Give back weights that a forward pass without gradients left whole (`Strategy.stays_gathered`). Collective."""

    @abstractmethod
    def full_state(self) -> dict[str, torch.Tensor] | None:
        """All weights, unsharded, on the CPU, under the names that the bare module has (LoRA layers included).

        Collective: every rank calls it; rank 0 gets the weights, the others None.
        """

    def gradient_shares(self) -> list[torch.Tensor] | None:
        """Gradients as this rank holds them between the last `backward` and `step`, where they lie in no `parameter.grad` but in parts
        of something larger. For evidence; None: whoever wants to know has to look.
        """
        return None

    def training_state(self) -> dict[str, Any]:
        """What this rank needs to go on after this step: CPU tensors and plain values (`bench.strategies.training_state`). Collective."""
        from bench.strategies.training_state import capture

        return capture(self.module, self._optimizer)

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on from what `training_state` gave on this rank of a job of the same size, before the first step. Collective.

        Raises CheckpointError if it does not fit.
        """
        from bench.strategies.training_state import restore

        restore(state, self.module, self._optimizer)


class PipelinedEngine(Engine):
    """An engine whose ranks hold a run of layers each, so that no single call of `module` is a whole forward pass."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:  # noqa: ARG002
        """`run` does it."""
        raise AssertionError("a pipelined engine runs whole steps")

    @abstractmethod
    def run(self, inputs: dict[str, Any], rows: int, losses: Callable[[Any, int], torch.Tensor], *, values: int = 1) -> torch.Tensor:
        """Forward passes of micro-batches of `rows` sequences through all stages and, with gradients enabled, their backward passes.

        `inputs` are the module's arguments for all micro-batches together. `losses(output, index)` runs on the last stage: a vector of
        `values` numbers, of which the first is the global loss that is differentiated. Returns the sum over the micro-batches, detached,
        on every rank. A training step is one call. Collective over the ranks that hold one model.
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
    """What lies in equal shares over the data-parallel ranks: parameters, gradients, optimizer; and `frozen`, if weights do that
    never train (the base under LoRA, PPO's reference policy and reward model)."""
    offloaded: ClassVar[frozenset[str]] = frozenset()
    """What lies in host memory between its uses, and so takes none of the device's: parameters that train, gradients, optimizer."""
    stays_gathered: ClassVar[bool] = False
    """Whether what `gathered_share` tells of is still there after a forward pass without gradients, of a model that trains."""
    gathers_root: ClassVar[bool] = False
    """Whether what lies outside of the layers (embeddings, an untied head) is whole from forward to backward pass, beside its shards."""
    copies_gradients: ClassVar[bool] = True
    """Whether a step in a mode with masters copies all of a rank's 16-bit gradients to fp32 at once."""
    spends_gradients: ClassVar[bool] = False
    """Whether those 16-bit gradients are gone once they are copied."""
    keeps_accumulated: ClassVar[bool] = False
    """Whether room in which gradients were accumulated is never given back, that of every model (Gemini's chunks)."""
    keeps_buckets: ClassVar[bool] = False
    """Whether room for all gradients of every model is always there, in which the last micro-step's lie (DDP's buckets)."""
    flat_updates: ClassVar[bool] = False
    """Whether the optimizer updates what a rank holds as one tensor, not parameter by parameter."""
    requires: ClassVar[tuple[Requirement, ...]] = ()
    """Packages and versions without which no cell can run."""
    model_parallel: ClassVar[bool] = False
    """Whether it splits one model over ranks that see the same sequences (settings `tensor_parallel`, `pipeline_parallel`)."""
    quantises: ClassVar[bool] = False
    """Whether the base under LoRA may be in 8 or 4 bits (setting `base_weights`), in shards where frozen weights are."""
    quantising_threads: ClassVar[tuple[str, ...]] = ()
    """Upstream threads about that, as `owner/repository#number`."""
    resumable: ClassVar[bool] = True
    """Whether its engines can save their training state and go on from it (setting `save_every`)."""

    def unsupported(self, cell: Cell) -> str | None:
        """Why `cell` can never run under this strategy here, or None. Subclasses add to it."""
        if missing := self.missing(cell.settings.container):
            return missing
        if problem := kernel_problem(cell, self.forced_settings(cell).get("optimizer", cell.settings.optimizer)):
            return f"{self.name}: {problem}"
        if cell.settings.precision not in self.precisions:
            return f"{self.name} does not offer precision {cell.settings.precision}; it offers {', '.join(sorted(self.precisions))}"
        if cell.model_parallel_size > 1 and not self.model_parallel:
            return f"{self.name} splits no model over ranks; tensor_parallel and pipeline_parallel are for hybrid"
        if cell.settings.save_every is not None and not self.resumable:
            return f"{self.name} cannot save its training state; `save_every: null` would be right"
        if problem := self._small_base_problem(cell):
            return problem
        if _frozen_in_host(cell) and "frozen" in self.sharded:
            return f"{self.name} keeps frozen models in shards; `frozen_placement: device` would be right"
        if frozen_in_int8(cell) and "frozen" in self.sharded and not self.quantises:
            return (
                f"{self.name} keeps frozen models in shards, into which int8 with its scales is not cut; `frozen_weights: stored` is right"
                f"{self._see()}"
            )
        if frozen_in_int8(cell) and _frozen_in_host(cell):
            return "frozen models are in int8 on the device, or visit it from host memory; `frozen_placement: device` would be right"
        return None

    def _small_base_problem(self, cell: Cell) -> str | None:
        kind = cell.settings.base_weights
        if kind != "stored" and cell.lora_rank == 0:
            return f"{kind} weights cannot train; a lora_rank above 0, or `base_weights: stored`, would be right"
        if kind != "stored" and not self.quantises:
            return f"{self.name} lays out no {kind} weights; `base_weights: stored` would be right{self._see()}"
        return None

    def _see(self) -> str:
        return f"; see {', '.join(self.quantising_threads)}" if self.quantising_threads else ""

    def missing(self, container: str = "none") -> str | None:
        """What it needs and is not installed here, or not in the image `container`, or None."""
        problems = [problem for requirement in self.requires if (problem := requirement.problem(container))]
        return f"{self.name}: {'; '.join(problems)}" if problems else None

    def updated_at_once(self, elements: int) -> int:
        """Of the elements that a rank updates: how many gradients are copied to fp32, and updated, before the next ones are."""
        return elements

    def shapes_suffice(self, cell: Cell, rank: int) -> bool:  # noqa: ARG002
        """Whether `rank` may hand in models without weights (torch's meta device), since the first rank's are sent to it."""
        return False

    def forced_settings(self, cell: Cell) -> dict[str, Any]:  # noqa: ARG002 (for those that force something)
        """Settings that it replaces whatever the cell says (Gemini: optimizer), setting -> value in force."""
        return {}

    def slices(self, network: Network, cell: Cell) -> tuple[Slice, ...]:  # noqa: ARG002 (for those that split models)
        """What a rank holds of a model before data-parallel ranks share it, one slice for each pipeline stage; theory and evidence ask."""
        return (whole(network),)

    def gathered_share(self, elements: int, ranks: int) -> float:  # noqa: ARG002 (for those that keep weights gathered)
        """Of a model of so many elements in shards over so many ranks: the share that a rank has whole, beside what it holds between steps,
        at the end of a forward pass and until the backward pass. One unit of gathering (a layer, a chunk) counts as nothing.
        """
        return 0.0

    def reserved_elements(self, trainable: int) -> int:  # noqa: ARG002 (for those that reserve some)
        """Elements of a model's storage type that are always there for communication, where so many parameters of it train."""
        return 0

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
        from bench.strategies.quantised import quantised_copy
        from bench.strategies.visiting import visiting_copy

        make = visiting_copy if _frozen_in_host(cell) else quantised_copy if frozen_in_int8(cell) else frozen_copy
        return make(module, cell.settings.precision, device)


def frozen_in_int8(cell: Cell) -> bool:
    """Whether PPO's frozen models are to be in 8 bits."""
    return getattr(cell.settings, "frozen_weights", "stored") == "int8"


def _frozen_in_host(cell: Cell) -> bool:
    return getattr(cell.settings, "frozen_placement", "device") == "host"


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
