"""Linear layers in 8 or 4 bits whose bytes lie in shards, as `fully_shard` cuts them: weight and scales together are one parameter.

Facts that this file answers for
* `fully_shard` cuts parameters only, and of bitsandbytes' own it keeps the data and drops what hangs on them: the scales of `nf4`
  (<https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1945>), and 8 bits not at all
  (<https://github.com/huggingface/peft/issues/2833>). Here scales lie in front of the weight in one run of bytes.
* Parameters of integers cannot be made without gradients everywhere in torch, and are rounded by a mixed-precision policy in older ones;
  so the run of bytes is called floats of the type that the mode stores, which nobody computes with: they are copied bit by bit.
* What bitsandbytes keeps for the backward pass is a view of the gathered bytes, whose storage FSDP frees and fills again.

Torch is imported inside functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from bench.strategies.precision import storage_dtype
from bench.strategies.quantised import BLOCK, NESTED_BLOCK, OUTLIER, adapted_layers, bitsandbytes, small_layer

if TYPE_CHECKING:
    import torch
    from torch import nn

ALIGNED = 16
"""Bytes to whose multiples kernels may want a weight and its scales to begin."""


def pack_base(module: nn.Module, kind: str, precision: str, device: torch.device) -> None:
    """Replace, in place, the linear layers under adapters by packed ones, in host memory."""
    pack(module, adapted_layers(module), kind, precision, device)


def pack(module: nn.Module, names: list[str], kind: str, precision: str, device: torch.device) -> None:
    """Replace, in place, the linear layers `names` by packed ones, in host memory; each is quantised on `device`."""
    for name in names:
        layer = small_layer(module.get_submodule(name), kind, precision, device)
        module.set_submodule(name, KINDS[kind]()(layer, storage_dtype(precision)).cpu())


def unpacked(module: nn.Module, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Name and value that the whole `tensor` called `name` has where nothing is quantised; what is not packed as it is."""
    owner, _, kind = name.rpartition(".")
    if kind != "packed":
        return name, tensor
    layer: Any = module.get_submodule(owner)
    weight = layer.unpacked(tensor)
    return f"{owner}.weight", weight.T if layer.transposed else weight


# -- the modules around the bytes, each made when torch is first needed -----------------------------------------------


def joined(parts: list[torch.Tensor], dtype: torch.dtype) -> tuple[nn.Parameter, list[int]]:
    """The bytes of `parts` in one run that is called `dtype`, each begun at a multiple of `ALIGNED`, and how many each has."""
    import torch
    from torch import nn

    pieces = [part.detach().contiguous().flatten().view(torch.uint8) for part in parts]
    run = torch.cat([nn.functional.pad(piece, (0, -len(piece) % ALIGNED)) for piece in pieces])
    return nn.Parameter(run.view(dtype), requires_grad=False), [len(piece) for piece in pieces]


def parted(run: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """The pieces of a gathered run, as bytes."""
    import torch

    taken = run.view(torch.uint8).split([size + -size % ALIGNED for size in sizes])
    return [piece[:size] for piece, size in zip(taken, sizes, strict=True)]


@cache
def packed_int8() -> Any:
    """The module for `int8`: a layer as one parameter `packed`, its scales, then its weight."""
    import torch
    from torch import nn

    bnb = bitsandbytes()

    class PackedInt8(nn.Module):
        """A Linear8bitLt."""

        def __init__(self, inner: Any, dtype: torch.dtype) -> None:
            scales = inner.state.SCB if inner.state.SCB is not None else inner.weight.SCB
            super().__init__()
            self.shape, self.transposed, self.bias = (inner.out_features, inner.in_features), inner.transposed, inner.bias
            self.packed, self.sizes = joined([scales, inner.weight.data], dtype)

        def state(self, run: torch.Tensor) -> Any:
            """What bitsandbytes multiplies by."""
            outputs, inputs = self.shape
            scales, weight = parted(run, self.sizes)
            state = bnb.MatmulLtState()
            state.CB, state.SCB = weight.view(torch.int8).view(outputs, inputs), scales.view(torch.float32)
            state.threshold, state.has_fp16_weights, state.is_training = OUTLIER, False, self.training
            return state

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            """As Linear8bitLt."""
            state, bias = self.state(self.packed), self.bias
            output: torch.Tensor = bnb.matmul(inputs, state.CB, bias=None if bias is None else bias.to(inputs.dtype), state=state)
            return output

        def unpacked(self, run: torch.Tensor) -> torch.Tensor:
            """The fp32 weight, outputs x inputs, that the whole `run` stands for."""
            state = self.state(run)
            return state.CB.float() * (state.SCB / 127.0).unsqueeze(1)

    return PackedInt8


@cache
def packed_nf4() -> Any:
    """The module for `nf4`: likewise, with nested scales."""
    import torch
    from torch import nn

    bnb = bitsandbytes()

    class PackedNf4(nn.Module):
        """A Linear4bit with nested scales."""

        code: torch.Tensor
        nested_code: torch.Tensor

        def __init__(self, inner: Any, dtype: torch.dtype) -> None:
            found = inner.weight.quant_state
            nested = found.state2
            assert (found.blocksize, nested.blocksize) == (BLOCK, NESTED_BLOCK)
            super().__init__()
            self.shape, self.transposed, self.bias = (inner.out_features, inner.in_features), inner.transposed, inner.bias
            self.packed, self.sizes = joined([nested.absmax, found.offset, found.absmax, inner.weight.data], dtype)
            self.computes, self.stood_for = inner.compute_dtype, found.dtype
            self.register_buffer("code", found.code, persistent=False)
            self.register_buffer("nested_code", nested.code, persistent=False)

        def state(self, run: torch.Tensor) -> tuple[torch.Tensor, Any]:
            """The weight's bytes, and bitsandbytes' description of them."""
            kind = bnb.functional.QuantState
            nested, offset, scales, weight = parted(run, self.sizes)
            inner = kind(absmax=nested.view(torch.float32), blocksize=NESTED_BLOCK, code=self.nested_code, dtype=torch.float32)
            return weight.unsqueeze(1), kind(
                absmax=scales, shape=torch.Size(self.shape), code=self.code, blocksize=BLOCK, quant_type="nf4", dtype=self.stood_for,
                offset=offset.view(torch.float32).reshape(()), state2=inner,
            )  # fmt: skip

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            """As Linear4bit."""
            weight, state = self.state(self.packed)
            bias = None if self.bias is None else self.bias.to(self.computes)
            output: torch.Tensor = bnb.matmul_4bit(inputs.to(self.computes), weight, bias=bias, quant_state=state)
            return output.to(inputs.dtype)

        def unpacked(self, run: torch.Tensor) -> torch.Tensor:
            """The fp32 weight, outputs x inputs, that the whole `run` stands for."""
            weight, state = self.state(run)
            found: torch.Tensor = bnb.functional.dequantize_4bit(weight, state)
            return found.float()

    return PackedNf4


KINDS: dict[str, Callable[[], Any]] = {"int8": packed_int8, "nf4": packed_nf4}
"""The module by how weights are kept."""
