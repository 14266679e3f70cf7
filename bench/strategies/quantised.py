"""Frozen models in 8 bits: the linear layers of reference policy and reward model as bitsandbytes' LLM.int8.

Rows of each weight become int8 with one fp32 scale a row; inputs are quantised as they come, those with outliers are computed in 16 bits
(Dettmers et al. 2022, arXiv:2208.07339). Embeddings, norms and heads stay as the precision mode stores them, as in bitsandbytes' own
loading of transformers models. Torch is imported inside functions.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

from bench.strategies.precision import place

if TYPE_CHECKING:
    import torch
    from torch import nn

OUTLIER = 6.0
"""Inputs above it are computed in 16 bits: the threshold of the paper and of transformers."""


def quantised_copy(module: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """A copy of `module` that is only read, on `device`, in eval mode: linear layers in int8, all else in the mode's storage type.

    A layer is quantised as it reaches the device; the whole model is never there in 16 bits.
    """
    from bench.models.build import lora_targets

    copied = copy.deepcopy(module).requires_grad_(False)
    small = {}
    for name in lora_targets(copied):
        small[name] = int8_layer(copied.get_submodule(name), device)
        copied.set_submodule(name, _placeholder())
    copied = place(copied, precision, device)
    for name, layer in small.items():
        copied.set_submodule(name, layer)
    return copied.eval()


def int8_layer(layer: Any, device: torch.device) -> nn.Module:
    """The linear layer `layer` (GPT-2's, whose weight is transposed, too) on `device` in int8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bitsandbytes.nn import Int8Params, Linear8bitLt
    from torch import nn

    warnings.filterwarnings("ignore", message=r"MatMul8bitLt: inputs will be cast")
    weight = layer.weight.data if isinstance(layer, nn.Linear) else layer.weight.data.T.contiguous()
    outputs, inputs = weight.shape
    made = Linear8bitLt(inputs, outputs, bias=layer.bias is not None, has_fp16_weights=False, threshold=OUTLIER)
    made.weight = Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.data.clone(), requires_grad=False)
    placed: nn.Module = made.to(device)
    return placed


def _placeholder() -> nn.Module:
    from torch import nn

    return nn.Identity()
