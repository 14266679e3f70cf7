"""deepspeed_zero3: DeepSpeed's ZeRO, stage 3. Parameters, gradients and optimizer states in shards, gathered module by module.

By default DeepSpeed lets nothing go that is used again within 10^9 parameters (`stage3_max_reuse_distance`). So a model of less than
half of that is whole on every rank from its forward to its backward pass, and if it trains it stays so after a forward pass without
gradients; of a larger one the first layers go. Seen on two H200: BLOOM-560m, whose head is its embedding, is hardly there at all at the end
of its forward pass. The bucket in which gradients are reduced is always there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bench.cell import Cell
from bench.errors import CheckpointError
from bench.strategies.deepspeed_zero import DeepSpeedZero, DeepSpeedZeroEngine, bucket_elements, lay_out, plain
from bench.strategies.training_state import kept, put_back

if TYPE_CHECKING:
    import torch
    from torch import nn


REUSE = 1_000_000_000
"""What is used again before so many parameters have been used is not let go (DeepSpeed's default)."""

SUB_GROUP = 1_000_000_000
"""A rank's elements that are copied and updated at once (DeepSpeed's default, `sub_group_size`)."""


class Zero3Engine(DeepSpeedZeroEngine):
    """Shards of the parameters lie in `parameter.ds_tensor`, their fp32 masters in flat tensors, whatever the precision."""

    def training_state(self) -> dict[str, Any]:
        """See `Engine.training_state`."""
        moments = self._optimizer.optimizer.state
        return {
            "scale": plain(self._optimizer.loss_scaler),
            "parameters": {name: kept(shard) for name, shard in self._shards().items()},
            "masters": [kept(master) for master in self._masters()],
            "states": [{name: _saved(value) for name, value in moments.get(master, {}).items()} for master in self._masters()],
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """See `Engine.load_training_state`."""
        shards, masters = self._shards(), self._masters()
        if shards.keys() != state["parameters"].keys() or len(masters) != len(state["masters"]):
            raise CheckpointError(
                f"the saved training state is of another model or strategy; seen: {len(state['parameters'])} parameters; "
                f"{len(shards)} would be right"
            )
        for name, shard in shards.items():
            put_back(state["parameters"][name], shard)
        for master, saved, values in zip(masters, state["masters"], state["states"], strict=True):
            put_back(saved, master)
            self._optimizer.optimizer.state[master] = {name: _restored(value, master) for name, value in values.items()}
        vars(self._optimizer.loss_scaler).update(state["scale"])
        self._gather_again()

    def _shards(self) -> dict[str, torch.Tensor]:
        named: Iterable[tuple[str, Any]] = self._bare.named_parameters()
        return {name: parameter.ds_tensor for name, parameter in named if parameter.requires_grad}

    def _masters(self) -> list[torch.Tensor]:
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def _gather_again(self) -> None:
        """Small parameters are whole on every rank all the time; drop them and gather them from the new shards."""
        whole = self._optimizer.persistent_parameters
        if whole:
            whole[0].partition(whole)
            whole[0].all_gather(whole)


def _saved(value: torch.Tensor) -> dict[str, Any]:
    """A tensor with its kind of device: some optimizers count their steps on the host."""
    return {"tensor": kept(value), "device": value.device.type}


def _restored(saved: dict[str, Any], master: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = saved["tensor"].to(master.device if saved["device"] == master.device.type else saved["device"])
    return found


class DeepSpeedZero3(DeepSpeedZero):
    """DeepSpeed ZeRO-3."""

    name = "deepspeed_zero3"
    stage = 3
    engine = Zero3Engine
    description = "DeepSpeed ZeRO stage 3: parameters, gradients and optimizer states in shards"
    sharded = frozenset({"parameters", "gradients", "optimizer", "frozen"})
    stays_gathered = gathers_frozen = True
    quantising_threads = ("deepspeedai/DeepSpeed#5819",)

    def gathered_share(self, elements: int, ranks: int) -> float:
        """See `Strategy.gathered_share`. On the way to its last layer and back a pass uses each parameter twice."""
        return 1.0 if ranks > 1 and 2 * elements <= REUSE else 0.0

    def updated_at_once(self, elements: int) -> int:
        """See `Strategy.updated_at_once`."""
        return min(elements, SUB_GROUP)

    def reserved_elements(self, trainable: int) -> int:
        """See `Strategy.reserved_elements`. The bucket in which gradients are reduced."""
        return bucket_elements(trainable)

    def __init__(self) -> None:
        self._engines: list[object] = []
        """Of frozen models: DeepSpeed takes an engine's hooks away when the engine is collected."""

    def place_frozen(self, module: nn.Module, cell: Cell, device: torch.device) -> nn.Module:
        """See `Strategy.place_frozen`. In shards, by an engine of DeepSpeed's without an optimizer."""
        copied = copy.deepcopy(module).requires_grad_(False)
        engine, _ = lay_out(copied, cell, device, None, stage=self.stage)
        self._engines.append(engine)
        return copied.eval()
