"""What one engine holds on this rank: parameters, shards, masters, optimizer states and gradients, found by walking over it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from bench.measure.evidence.walk import NOTHING, Amount, Slot, amount, local, state_tensors, storages, walk
from bench.measure.flops import WEIGHT_BYTES

SCALES = ("SCB", "CB", "quant_state")
"""Where bitsandbytes keeps the scales of 8- and 4-bit weights: attributes of the parameters. They are fp32, but no masters."""


PARTITION = "ds_tensor"
"""Where DeepSpeed's ZeRO-3 keeps this rank's share of a parameter: an attribute of it."""


class Engine(Protocol):
    """What evidence needs of an engine (`bench.strategies.base.Engine`)."""

    module: nn.Module

    def step(self) -> float | Tensor:
        """Update; returns the gradient norm."""

    def reshard(self) -> None:
        """Give back weights that were left whole."""


def has_masters(precision: str) -> bool:
    """Whether the mode keeps fp32 masters beside 16-bit parameters.

    >>> has_masters("bf16-master"), has_masters("bf16-autocast")
    (True, False)
    """
    return precision.endswith("-master")


class Holdings:
    """Where the tensors of one engine lie, found once, right after it was prepared; what lies there is read anew each time."""

    def __init__(self, engine: Engine, precision: str, device: torch.device) -> None:
        self._engine, self._device = engine, device
        self.names = dict(engine.module.named_parameters())
        found = walk(engine)
        self.optimizers = found.optimizers
        self.shards = _partitions(self.names.values(), trainable=True)
        """Trainable parameters that lie elsewhere than the module's own, which are empty meanwhile: chunks, DeepSpeed's partitions."""
        self._frozen_shards = _partitions(self.names.values(), trainable=False)
        self.masters: list[Slot] = []
        scales = [vars(parameter)[name] for parameter in self.names.values() for name in SCALES if name in vars(parameter)]
        beside = [tensor for slot in walk(scales).slots if (tensor := slot.read()) is not None]
        self._sort(found.slots, beside, WEIGHT_BYTES[precision], has_masters(precision))
        stored = {tensor.dtype for tensor in self.own(trainable=True).values()}
        self.masters_are_parameters = has_masters(precision) and torch.float32 in stored
        """The module's parameters are the fp32 masters; 16-bit ones exist only while they are used (FSDP)."""

    def _sort(self, slots: list[Slot], beside: list[Tensor], weight_bytes: int, masters: bool) -> None:
        """Tell shards and masters from all else by their type: both are floating, and neither parameters of the module nor buffers."""
        partitions = [*_read(self.shards, "").values(), *_read(self._frozen_shards, "").values()]
        known = storages([*self._own().values(), *partitions, *beside, *map(local, self._engine.module.buffers())])
        released = not partitions and any(not tensor.untyped_storage().nbytes() for tensor in self._own(trainable=True).values())
        for slot in slots:
            tensor = slot.read()
            if tensor is None or not tensor.is_floating_point() or not (new := storages([tensor]).keys() - known.keys()):
                continue
            if masters and tensor.dtype == torch.float32:
                self.masters.append(slot)
            elif released and tensor.element_size() == weight_bytes:
                self.shards.append(slot)
            else:
                continue
            known |= dict.fromkeys(new, tensor)

    def _own(self, *, trainable: bool | None = None) -> dict[str, Tensor]:
        return {
            name: local(parameter) for name, parameter in self.names.items() if trainable is None or parameter.requires_grad == trainable
        }

    def own(self, *, trainable: bool) -> dict[str, Tensor]:
        """Parameters of the module that are there, by name.

        Not those that lie in DeepSpeed's partitions: what is whole of them is for use, and may stay there until it is used again.
        """
        there = {name: tensor for name, tensor in self._own(trainable=trainable).items() if tensor.untyped_storage().nbytes()}
        return {name: tensor for name, tensor in there.items() if not hasattr(self.names[name], PARTITION)}

    def weights(self) -> dict[str, Tensor]:
        """Everything trainable that forward passes read, as this rank holds it."""
        return self.own(trainable=True) | _read(self.shards, "shard")

    def frozen_weights(self) -> dict[str, Tensor]:
        """Everything that does not train, as this rank holds it."""
        return self.own(trainable=False) | _read(self._frozen_shards, "frozen shard")

    def updated(self) -> dict[str, Tensor]:
        """What the optimizer updates: masters where there are any, else the weights."""
        return self.weights() if self.masters_are_parameters else _read(self.masters, "master") or self.weights()

    def count_trainable(self) -> int:
        """Trainable parameters of the module, over all ranks where a framework says so."""
        sizes = [(parameter, getattr(parameter, "ds_numel", parameter.numel())) for parameter in self.names.values()]
        return sum(size for parameter, size in sizes if parameter.requires_grad)

    # -- amounts -----------------------------------------------------------------------------------------------------

    def parameters(self) -> Amount:
        """Trainable parameters; nothing where they are their own masters."""
        return NOTHING if self.masters_are_parameters else self._amount(self.weights().values())

    def frozen(self) -> Amount:
        """Parameters that do not train."""
        return self._amount(self.frozen_weights().values())

    def optimizer(self) -> Amount:
        """Masters, and the states that the optimizers keep."""
        masters = self.weights() if self.masters_are_parameters else _read(self.masters, "master")
        return self._amount([*masters.values(), *map(local, state_tensors(self.optimizers))])

    def gradients(self) -> Amount:
        """Gradients before the update: what the engine names, else those of the parameters, else what it has got since it was prepared."""
        told = getattr(self._engine, "gradient_shares", None)
        if told is not None and (shares := told()) is not None:
            return sum((_view(local(share), self._device) for share in shares), NOTHING)
        known = [*self.names.values(), *(slot.raw() for slot in self.masters if slot.read() is not None)]
        own = [local(tensor.grad) for tensor in known if tensor.is_leaf and tensor.grad is not None]
        return self._amount(own) if own else self._amount(self._newcomers())

    def _newcomers(self) -> list[Tensor]:
        there = [tensor for slot in walk(self._engine).slots if (tensor := slot.read()) is not None and tensor.is_floating_point()]
        buffers, states = map(local, self._engine.module.buffers()), map(local, state_tensors(self.optimizers))
        known = storages([*self._own().values(), *_read(self.shards, "").values(), *_read(self.masters, "").values(), *buffers, *states])
        return [tensor for address, tensor in storages(there).items() if address not in known and tensor.dim()]

    def _amount(self, tensors: Iterable[Tensor]) -> Amount:
        return amount(tensors, self._device)


def _partitions(parameters: Iterable[Tensor], *, trainable: bool) -> list[Slot]:
    """Where DeepSpeed's ZeRO-3 keeps this rank's shares of the parameters; nothing under any other framework."""
    return [
        Slot(vars(parameter), PARTITION)
        for parameter in parameters
        if parameter.requires_grad == trainable and hasattr(parameter, PARTITION)
    ]


def _view(tensor: Tensor, device: torch.device) -> Amount:
    """What a part of a larger storage takes."""
    size, elements = tensor.numel() * tensor.element_size(), tensor.numel()
    return Amount(size, elements) if tensor.device.type == device.type else Amount(0, 0, size, elements)


def _read(slots: list[Slot], name: str) -> dict[str, Tensor]:
    return {f"{name}{index}": tensor for index, slot in enumerate(slots) if (tensor := slot.read()) is not None}
