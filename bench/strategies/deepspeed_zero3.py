"""deepspeed_zero3: DeepSpeed's ZeRO, stage 3. Parameters, gradients and optimizer states in shards, gathered module by module.

DeepSpeed gathers ahead until 10^9 parameters are whole (`stage3_max_live_parameters`), and lets nothing go that it has seen will be used
again. So a model of fewer is whole on every rank from its forward to its backward pass, and is gathered once a micro-step; if it trains it
stays whole after a forward pass without gradients. Of a larger one as many parameters are whole. A frozen model is gathered ahead too, but
nothing of it is used again: it is gone at the end of its pass. The bucket in which gradients are
reduced is always there.
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


LIVE = 1_000_000_000
"""So many parameters of a model may be whole at once (DeepSpeed's default, `stage3_max_live_parameters`)."""

SUB_GROUP = 1_000_000_000
"""A rank's elements that are copied and updated at once (DeepSpeed's default, `sub_group_size`)."""


class Zero3Engine(DeepSpeedZeroEngine):
    """Shards of the parameters lie in `parameter.ds_tensor`, their fp32 masters in flat tensors, whatever the precision."""

    def __init__(self, module: nn.Module, cell: Cell, device: torch.device, *, learning_rate: float, stage: int) -> None:
        super().__init__(module, cell, device, learning_rate=learning_rate, stage=stage)
        forget_with_the_trace(self._optimizer.parameter_offload.get_param_coordinator())

    def reshard(self) -> None:
        """See `Engine.reshard`."""
        self._optimizer.empty_partition_cache()

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


def forget_with_the_trace(coordinator: Any) -> None:
    """Have DeepSpeed forget what it does after each module of a trace when it gives up that trace.

    It caches what it lets go by module and place (0.19.8, `__params_to_release`) and never clears that. So after an evaluation, whose trace
    has no backward pass, it would let go of every weight after its forward pass for good, and gather all of them twice a micro-step.
    """
    decide = getattr(type(coordinator), "_PartitionedParameterCoordinator__params_to_release", None)
    caches = [cell.cell_contents for cell in getattr(decide, "__closure__", None) or () if hasattr(cell.cell_contents, "cache_clear")]
    give_up = coordinator._invalidate_trace

    def give_up_and_forget() -> None:
        give_up()
        for cache in caches:
            cache.cache_clear()

    coordinator._invalidate_trace = give_up_and_forget


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
    stays_gathered = True
    quantising_threads = ("deepspeedai/DeepSpeed#5819",)

    def gathered_share(self, elements: int, ranks: int) -> float:
        """See `Strategy.gathered_share`."""
        return min(1.0, LIVE / elements) if ranks > 1 else 0.0

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
