"""fsdp: torch's `fully_shard` (FSDP2). Every tensor in shards over the ranks; a layer is gathered when it computes.

What this file decides
* A unit of gathering is a layer of the transformer; embeddings, last norm and head, which are often one tensor, are the root's.
  torch keeps the root gathered from a forward to its backward pass; after a forward pass without gradients it is dropped here.
* Gradients are reduced in every micro-step, so that they are never whole on a rank; torch's other way, to reduce in the last one
  only, keeps whole gradients of the model meanwhile.
* `bf16-master` and `fp16-master` are torch's `MixedPrecisionPolicy`: the shards are the fp32 masters, and a layer is rounded when it is
  gathered. Parameters that never train are stored in 16 bits. Gradients are added up over ranks and micro-steps in fp32.
* Generation gathers each layer anew for every token, as training does for every forward pass.
* Only the first rank reads or draws weights, in host memory; the others build models on torch's meta device and get each layer when it is
  cut. So there is one copy of a model in host memory, not one a rank. Weights in 8 or 4 bits are packed on every rank, and read there.
* Frozen models (PPO's reference policy and reward model) are in shards as well, and so are linear layers in 8 or 4 bits, with their scales.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

from bench.cell import Cell
from bench.strategies.base import Engine, Strategy, frozen_in_int8
from bench.strategies.precision import MASTER_MODES, autocast_forward, global_norm, storage_dtype, trainable
from bench.strategies.quantised_shards import pack, pack_base, unpacked
from bench.strategies.requirement import Requirement
from bench.strategies.update import TorchEngine

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy


class FsdpEngine(TorchEngine):
    """A model under `fully_shard`. Parameters, gradients and optimizer states are DTensors, of which this rank holds a shard."""

    def __init__(self, module: nn.Module, cell: Cell, device: torch.device, *, learning_rate: float) -> None:
        import torch.distributed as dist

        self._precision, self._ranks = cell.settings.precision, dist.get_world_size()
        if cell.settings.base_weights != "stored":
            pack_base(module, cell.settings.base_weights, self._precision, device)
        store(module, self._precision)
        if self._precision == "bf16-autocast":
            autocast_forward(module, device)
        self._sharded = shard(module, device, mp_policy=_policy(self._precision))
        self.module = module
        super().__init__(trainable(module), cell, learning_rate=learning_rate, masters=False)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """See `Engine.backward`. FSDP averages over the ranks, so the loss is multiplied by their number."""
        super().backward(loss * self._ranks, last=last)

    def step(self) -> float | torch.Tensor:
        """See `Engine.step`. What a forward pass may have left gathered is of the old weights, so it is dropped."""
        self._sharded.reshard()
        return super().step()

    def full_state(self) -> dict[str, torch.Tensor] | None:
        """See `Engine.full_state`. Gathers tensor by tensor."""
        return gathered_state(self.module, storage_dtype(self._precision))

    def _local(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor._local_tensor for tensor in tensors]  # type: ignore[attr-defined]

    def _norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        import torch.distributed as dist

        squared = global_norm(gradients).double().square()
        dist.all_reduce(squared)
        return squared.sqrt().float()


def layers(module: nn.Module) -> list[nn.Module]:
    """The layers of the transformer inside `module`: the members of its outermost lists of modules."""
    from torch import nn

    names = [name for name, child in module.named_modules() if isinstance(child, nn.ModuleList)]
    outermost = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    return [layer for name in outermost for layer in module.get_submodule(name).children()]


def store(module: nn.Module, precision: str) -> None:
    """Round all parameters to the mode's storage type; those that train are fp32 again afterwards where the shards are the masters."""
    dtype = storage_dtype(precision)
    for parameter in module.parameters():
        rounded = parameter.data.to(dtype)
        parameter.data = rounded.float() if precision in MASTER_MODES and parameter.requires_grad else rounded


def shard(module: nn.Module, device: torch.device, **arguments: Any) -> FSDPModule:
    """Put the parameters of `module` in shards over all ranks, in place; the same object with the methods of FSDP.

    Where a rank has no weights, the first rank's are sent, layer by layer.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, lacking = init_device_mesh(device.type, (dist.get_world_size(),)), somebody_lacks_weights(module, device)
    for part in (*layers(module), module):
        if lacking:
            send_weights(part, device)
        sharded = fully_shard(part, mesh=mesh, **arguments)
    module.register_forward_hook(_drop_unless_needed)
    return sharded


def somebody_lacks_weights(module: nn.Module, device: torch.device) -> bool:
    """Whether `module` is on the meta device on any rank. Collective."""
    import torch
    import torch.distributed as dist

    lacking = torch.tensor(int(any(tensor.is_meta for tensor in module.parameters())), device=device)
    dist.all_reduce(lacking, op=dist.ReduceOp.MAX)
    return bool(lacking)


def send_weights(module: nn.Module, device: torch.device) -> None:
    """Put the first rank's parameters and buffers into `module` on every rank, on `device`; not what is in shards already. Collective.

    The tensors stay the objects that they are, so that whoever else refers to one (a tied head, a plain attribute) has it, too.
    """
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.tensor import DTensor

    for held in (*module.parameters(), *module.buffers()):
        if isinstance(held, DTensor):
            continue
        if held.is_meta:
            here = torch.empty_like(held, device=device, requires_grad=False)
            torch.utils.swap_tensors(held, nn.Parameter(here, held.requires_grad) if isinstance(held, nn.Parameter) else here)
        else:
            held.data = held.data.to(device)
        dist.broadcast(held.detach(), src=0)


def _drop_unless_needed(root: Any, _: Any, __: Any) -> None:
    """After FSDP's own hook: no backward pass follows a forward pass without gradients, so nothing has to stay gathered."""
    import torch

    if not torch.is_grad_enabled():
        root.reshard()


def gathered_state(module: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """The state dict of a sharded module on rank 0, in `dtype`, on the CPU; None elsewhere. Collective, tensor by tensor.

    Packed weights are unpacked.
    """
    import torch.distributed as dist

    found = {}
    for name, tensor in module.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if dist.get_rank() == 0:
            key, whole = unpacked(module, name, whole)
            found[key] = whole.detach().to("cpu", dtype if whole.is_floating_point() else None, copy=True)
    return found if dist.get_rank() == 0 else None


def _policy(precision: str) -> MixedPrecisionPolicy:
    """Nothing is cast on the way into a layer: what arrives is of the type that the layer before computed in, as without shards."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if precision not in MASTER_MODES:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(param_dtype=storage_dtype(precision), reduce_dtype=torch.float32, cast_forward_inputs=False)


class Fsdp(Strategy):
    """FSDP2."""

    name = "fsdp"
    precisions = frozenset({"fp32", "bf16-pure", "bf16-master", "bf16-autocast", "fp16-master"})
    description = "torch FSDP2 (fully_shard): parameters, gradients and optimizer states in shards, layer by layer"
    sharded = frozenset({"parameters", "gradients", "optimizer", "frozen"})
    gathers_root = True
    copies_gradients = False
    requires = (Requirement("torch", "2.6"),)
    quantises = True

    def unsupported(self, cell: Cell) -> str | None:
        """See `Strategy.unsupported`."""
        if cell.settings.optimizer == "hybrid":
            return f"{self.name}: optimizer hybrid (ColossalAI's HybridAdam) takes no DTensors; adamw, foreach or fused would be right"
        return super().unsupported(cell)

    def shapes_suffice(self, cell: Cell, rank: int) -> bool:
        """See `Strategy.shapes_suffice`. What is packed is packed before it is cut, by the rank that holds the shard."""
        return rank > 0 and cell.settings.base_weights == "stored" and not frozen_in_int8(cell)

    def start(self, cell: Cell, device: torch.device) -> None:  # noqa: ARG002
        """See `Strategy.start`. torch warns of outputs that are views, since changing them in place loses gradients; no stage does."""
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")

    def prepare(self, module: nn.Module, cell: Cell, device: torch.device, *, learning_rate: float) -> Engine:
        """See `Strategy.prepare`. torch moves a layer to the device and cuts it before it takes the next one."""
        return FsdpEngine(module, cell, device, learning_rate=learning_rate)

    def place_frozen(self, module: nn.Module, cell: Cell, device: torch.device) -> nn.Module:
        """See `Strategy.place_frozen`. In shards."""
        from bench.models.build import lora_targets

        copied = copy.deepcopy(module).requires_grad_(False)
        if frozen_in_int8(cell):
            pack(copied, lora_targets(copied), "int8", cell.settings.precision, device)
        copied.eval()
        store(copied, cell.settings.precision)
        if cell.settings.precision == "bf16-autocast":
            autocast_forward(copied, device)
        shard(copied, device)
        return copied
