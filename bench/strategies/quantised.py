"""Weights that never train in 8 or 4 bits: linear layers of frozen models, and of the base under LoRA, by bitsandbytes.

`int8`: rows as int8 with one fp32 scale a row; inputs are quantised as they come, those with outliers computed in 16 bits (Dettmers et al.
2022, arXiv:2208.07339). `nf4`: blocks of 64 values as 4-bit quantiles with one scale a block, itself in 8 bits, unpacked for each
product (Dettmers et al. 2023, arXiv:2305.14314). Embeddings, norms and heads stay as the precision mode stores them. Torch is imported
inside functions.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

from bench.strategies.precision import place, storage_dtype

if TYPE_CHECKING:
    import torch
    from torch import nn

OUTLIER = 6.0
"""Inputs above it are computed in 16 bits: the threshold of the paper and of transformers."""


BLOCK, NESTED_BLOCK = 64, 256
"""Weights under one scale of `nf4`, and scales under one scale of theirs."""
TABLES_BYTES = 4 * (16 + 256 + 1)
"""What each layer in `nf4` has beside: the values that 4 bits stand for, those that 8 bits do, and the mean of the scales."""


def small_bytes(kind: str, inputs: int, outputs: int) -> int:
    """Bytes of a linear layer's weight in `int8` or `nf4` with its scales; the bias is stored as ever.

    >>> small_bytes("int8", 64, 192), small_bytes("nf4", 64, 192)
    (13056, 7432)
    """
    weights = inputs * outputs
    if kind == "int8":
        return weights + 4 * outputs
    scales = -(-weights // BLOCK)
    return -(-weights // 2) + scales + 4 * -(-scales // NESTED_BLOCK) + TABLES_BYTES


def quantised_copy(module: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """A copy of `module` that is only read, on `device`, in eval mode: linear layers in int8, all else in the mode's storage type."""
    from bench.models.build import lora_targets

    copied = copy.deepcopy(module).requires_grad_(False)
    return place_quantised(copied, lora_targets(copied), "int8", precision, device).eval()


def place_quantised_base(module: nn.Module, kind: str, precision: str, device: torch.device) -> nn.Module:
    """`precision.place`, in place, but that the linear layers under adapters become `int8` or `nf4`."""
    return place_quantised(module, adapted_layers(module), kind, precision, device)


def adapted_layers(module: nn.Module) -> list[str]:
    """Names of the linear layers under adapters."""
    from peft.tuners.lora import LoraLayer

    return [f"{name}.base_layer" for name, child in module.named_modules() if isinstance(child, LoraLayer)]


def place_quantised(module: nn.Module, names: list[str], kind: str, precision: str, device: torch.device) -> nn.Module:
    """`precision.place`, in place, but that the linear layers `names` become `int8` or `nf4`.

    Each is quantised as it reaches the device; the model is never there whole in 16 bits.
    """
    from torch import nn

    small = {}
    for name in names:
        small[name] = small_layer(module.get_submodule(name), kind, precision, device)
        module.set_submodule(name, nn.Identity())
    place(module, precision, device)
    for name, layer in small.items():
        module.set_submodule(name, layer)
    return module


def small_layer(layer: Any, kind: str, precision: str, device: torch.device) -> nn.Module:
    """The linear layer `layer` (GPT-2's, whose weight is transposed, too) on `device` in `int8` or `nf4`."""
    import torch
    from torch import nn

    bnb = bitsandbytes()
    weight = (layer.weight.data if isinstance(layer, nn.Linear) else layer.weight.data.T.contiguous()).clone()
    sizes = {"input_features": weight.shape[1], "output_features": weight.shape[0], "bias": layer.bias is not None}
    made: Any
    if kind == "int8":
        made = bnb.nn.Linear8bitLt(**sizes, has_fp16_weights=False, threshold=OUTLIER)
        made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        computes = torch.bfloat16 if precision == "bf16-autocast" else storage_dtype(precision)
        made = bnb.nn.Linear4bit(**sizes, compute_dtype=computes, quant_type="nf4")
        made.support_avx512bf16_for_cpu = False  # else eval mode packs the weight anew, in a way that has no backward pass
        made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.data.to(storage_dtype(precision)), requires_grad=False)
    made.transposed = not isinstance(layer, nn.Linear)
    placed: nn.Module = made.to(device)
    return placed


def whole_state(module: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """The state dict of `module` as if nothing in it were quantised: weights unpacked to `dtype`, scales left out."""
    bnb, state = bitsandbytes(), dict(module.state_dict())
    for name, child in module.named_modules():
        if isinstance(child, (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)):
            weight = unpacked(child).T if child.transposed else unpacked(child)
            bias = None if child.bias is None else child.bias.to(dtype)  # under autocast bitsandbytes rounds it in place
            kept = {f"{name}.weight": weight.to(dtype), f"{name}.bias": bias}
            state = {key: kept.get(key, value) for key, value in state.items() if key in kept or not key.startswith(f"{name}.")}
    return state


def unpacked(layer: Any) -> torch.Tensor:
    """The fp32 weight that a quantised layer stands for, outputs x inputs."""
    bnb = bitsandbytes()
    if isinstance(layer, bnb.nn.Linear4bit):
        found: torch.Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        return found
    scales = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
    rows: torch.Tensor = layer.weight.data.float() * (scales.float() / 127.0).unsqueeze(1)
    return rows


def bitsandbytes() -> Any:
    """The package, without what only its authors can act on."""
    warnings.filterwarnings("ignore", message=r"MatMul8bitLt: inputs will be cast")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes
        import bitsandbytes.functional
    return bitsandbytes
