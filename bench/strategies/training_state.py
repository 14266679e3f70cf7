"""What a rank must keep of a step's end so that training goes on as if it had never stopped: plain tensors, and back.

This rank's share only, whatever that is (a whole model, shards, DTensors): a stopped trial goes on at the same world size, so nothing is
gathered. Data order, schedule and sampling follow from seed and step, and are no part of it. Torch is imported inside functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import nn


def capture(module: nn.Module | None, optimizer: Any) -> dict[str, Any]:
    """Parameters that train, as they lie on this rank, and the state of a torch optimizer, also inside ColossalAI's wrappers.

    None as the module: the strategy keeps the parameters in another way. Tensors are copies on the CPU; everything else is a plain
    value, so that `torch.load(weights_only=True)` reads it back.
    """
    inner, parameters = innermost(optimizer), _trainable(module)
    known = {id(parameter) for parameter in parameters.values()}
    return {
        "parameters": {name: kept(parameter) for name, parameter in parameters.items()},
        "groups": [{key: value for key, value in group.items() if _is_plain(value)} for group in inner.param_groups],
        "masters": [None if id(parameter) in known else kept(parameter) for parameter in _updated(inner)],
        "states": [{key: _kept_value(value) for key, value in inner.state.get(parameter, {}).items()} for parameter in _updated(inner)],
    }


def restore(state: dict[str, Any], module: nn.Module | None, optimizer: Any) -> None:
    """Put back what `capture` kept. Raises CheckpointError if it is not of this model, strategy and number of ranks."""
    inner, parameters = innermost(optimizer), _trainable(module)
    if parameters.keys() != state["parameters"].keys() or len(_updated(inner)) != len(state["masters"]):
        raise CheckpointError(
            f"the saved training state is of another model or strategy; seen: {len(state['parameters'])} parameters, "
            f"{len(state['masters'])} updated by the optimizer; {len(parameters)} and {len(_updated(inner))} would be right"
        )
    for name, parameter in parameters.items():
        put_back(state["parameters"][name], parameter)
    for group, values in zip(inner.param_groups, state["groups"], strict=True):
        group.update(values)
    for parameter, master, values in zip(_updated(inner), state["masters"], state["states"], strict=True):
        if master is not None:
            put_back(master, parameter)
        if values:
            inner.state[parameter] = {key: _restored_value(item, parameter) for key, item in values.items()}


def innermost(optimizer: Any) -> Any:
    """The torch optimizer inside ColossalAI's wrappers."""
    while hasattr(optimizer, "optim"):
        optimizer = optimizer.optim
    return optimizer


def kept(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of this rank's share of `tensor`, on the CPU."""
    return _local(tensor).detach().to("cpu", copy=True)


def put_back(saved: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a kept share into this rank's share of `target`. Raises CheckpointError if shapes or types differ."""
    share = _local(target).detach()
    if share.shape != saved.shape or share.dtype != saved.dtype:
        raise CheckpointError(
            f"the saved training state does not fit; seen: {saved.dtype} {list(saved.shape)}; "
            f"{share.dtype} {list(share.shape)} would be right"
        )
    share.copy_(saved)


def _trainable(module: nn.Module | None) -> dict[str, Any]:
    return {} if module is None else {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _updated(optimizer: Any) -> list[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _local(tensor: Any) -> Any:
    """The share of a DTensor that lies on this rank; a plain tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float))


def _kept_value(value: Any) -> Any:
    """A plain value as it is; a tensor with its kind of device, since some optimizers count their steps on the host."""
    return {"tensor": kept(value), "device": value.device.type, "share": hasattr(value, "to_local")} if hasattr(value, "device") else value


def _restored_value(item: Any, parameter: Any) -> Any:
    if not isinstance(item, dict):
        return item
    local = item["tensor"].to(item["device"] if item["device"] != parameter.device.type else _local(parameter).device)
    if not item["share"]:
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
