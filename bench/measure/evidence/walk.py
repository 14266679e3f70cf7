"""Finding tensors inside an object of any framework, and reading them without asking the framework."""

from __future__ import annotations

import logging
import threading
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

MOST_OBJECTS = 500_000
"""A walk that has seen so many objects stops; an engine of a model with hundreds of layers has some ten thousand."""

SAMPLES = 1024
"""Values of a tensor that are kept to see how far it moves."""

_PIECE = 1 << 23
"""Bytes of which a copy is made at a time where a tensor does not begin at a multiple of 8 bytes."""

_LEAVES = (
    str, bytes, bytearray, int, float, complex, bool, type(None), type, range, types.ModuleType, types.FunctionType, types.MethodType,
    types.BuiltinFunctionType, torch.device, torch.dtype, torch.Size, torch.Generator, dist.ProcessGroup, logging.Logger, threading.Thread,
)  # fmt: skip


class Slot(NamedTuple):
    """A place that holds a tensor: the dictionary or list it is in, and its key there. What is there may be replaced."""

    owner: Any
    key: Any

    def raw(self) -> Any:
        """What is there now; None if the place is gone. DeepSpeed's dictionaries gather what they are asked for in a forward pass."""
        try:
            return dict.__getitem__(self.owner, self.key) if isinstance(self.owner, dict) else self.owner[self.key]
        except (KeyError, IndexError):
            return None

    def read(self) -> Tensor | None:
        """What this rank holds of the tensor that is there now."""
        found = self.raw()
        return local(found) if isinstance(found, Tensor) else None


class Found(NamedTuple):
    """What a walk found."""

    slots: list[Slot]
    optimizers: list[torch.optim.Optimizer]


def walk(root: Any) -> Found:
    """Every place below `root` that holds a tensor, and the torch optimizers; states of optimizers and gradients are left out.

    It follows attributes, dictionary values and members of lists, tuples and sets; not closures, nor dictionary keys.
    """
    seen: set[int] = set()
    slots: list[Slot] = []
    optimizers: list[torch.optim.Optimizer] = []
    waiting = [Slot([root], 0)]
    while waiting and len(seen) < MOST_OBJECTS:
        slot = waiting.pop()
        item = slot.raw()
        if isinstance(item, _LEAVES) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            slots.append(slot)
        elif isinstance(item, torch.optim.Optimizer):
            optimizers.append(item)
        waiting += _inside(item)
    return Found(slots, optimizers)


def _inside(item: Any) -> Iterator[Slot]:
    if isinstance(item, Mapping):
        for key in list(item):
            yield Slot(item, key)
    elif isinstance(item, (list, tuple)):
        for index in range(len(item)):
            yield Slot(item, index)
    elif isinstance(item, (set, frozenset)):
        for member in list(item):
            yield Slot([member], 0)
    attributes = getattr(item, "__dict__", {})
    for name in list(attributes):
        if not (name == "state" and isinstance(item, torch.optim.Optimizer)):
            yield Slot(attributes, name)


def state_tensors(optimizers: Iterable[torch.optim.Optimizer]) -> list[Tensor]:
    """The states that the optimizers keep of their parameters: moments, step counts."""
    found = [walk(state).slots for optimizer in optimizers for state in list(optimizer.state.values())]
    return [tensor for slots in found for slot in slots if (tensor := slot.read()) is not None]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`: of a DTensor its shard; without the hooks of a framework's own tensor class."""
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        return getattr(tensor, "_local_tensor", tensor).detach()


class Amount(NamedTuple):
    """Bytes and elements on the device that computes, and elsewhere (host memory)."""

    bytes: int = 0
    elements: int = 0
    host_bytes: int = 0
    host_elements: int = 0

    def __add__(self, other: tuple[Any, ...]) -> Amount:
        return Amount(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


NOTHING = Amount()


def storages(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """One tensor of each storage that has memory, by the storage's address."""
    found: dict[int, Tensor] = {}
    for tensor in tensors:
        if tensor.device.type != "meta" and tensor.untyped_storage().nbytes():
            found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
    return found


def amount(tensors: Iterable[Tensor], device: torch.device) -> Amount:
    """What the tensors take, a shared storage once and as a whole."""
    total = NOTHING
    for tensor in storages(tensors).values():
        size = tensor.untyped_storage().nbytes()
        here = (size, size // tensor.element_size())
        total += Amount(*here) if tensor.device.type == device.type else Amount(0, 0, *here)
    return total


def digests(tensors: Iterable[Tensor]) -> list[int]:
    """A number for the bits of each tensor: equal bits give equal numbers, a changed bit another one (sums in 64 bits, exact)."""
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        return _together([_digest(tensor) for tensor in tensors])


def _digest(tensor: Tensor) -> Tensor:
    """Sum of the 64-bit words, and of the bytes that are left over."""
    flat = (tensor.contiguous() if tensor.dim() else tensor.reshape(1)).view(torch.uint8).flatten()
    whole = flat.numel() // 8 * 8
    pieces = [flat[:whole]] if flat.storage_offset() % 8 == 0 else flat[:whole].split(_PIECE)
    total = flat[whole:].to(torch.int64).sum()
    for piece in pieces:
        aligned = piece if piece.storage_offset() % 8 == 0 else piece.clone()
        total = total + aligned.view(torch.int64).sum()
    return total


def _together(values: list[Tensor]) -> list[Any]:
    """The numbers, read from each device at once."""
    devices: dict[torch.device, list[int]] = {}
    for index, value in enumerate(values):
        devices.setdefault(value.device, []).append(index)
    numbers: list[Any] = [None] * len(values)
    for members in devices.values():
        for index, number in zip(members, torch.stack([values[index] for index in members]).tolist(), strict=True):
            numbers[index] = number
    return numbers


def samples(tensors: Iterable[Tensor]) -> list[Tensor]:
    """At most `SAMPLES` values of each tensor, evenly spread, fp32 on the CPU."""
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        return [_sample(tensor) for tensor in tensors]


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    return flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].float().to("cpu", copy=True)
