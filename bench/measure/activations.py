"""Bytes that a forward pass leaves on the device for its backward pass, from numbers alone. Torch-free.

A layer keeps what its backward pass multiplies by: inputs of norms and linear layers, queries, keys, values, attention weights,
inputs of activation functions (Korthikanti et al. 2022, arXiv:2205.05198, section 4, which counts a GPT layer with dropout). What
exactly is kept depends on how transformers writes each architecture, so there is a row for each; tests count the tensors that
autograd really saves. docs/flops.md says what is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.measure.flops import CACHE_BYTES, WEIGHT_BYTES, Sequences
from bench.measure.shape import Network, Shape

CHUNK_ELEMENTS = 1 << 26
"""Logits that the loss holds in fp32 at a time (`bench.rl.losses.CHUNK_ELEMENTS`)."""
CHUNKS = 3
"""Chunks that are alive while the next one is made; of a single one, two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What one layer keeps for each position, as multiples of the widths of its shape."""

    hidden: float
    """Inputs and outputs of the norms."""
    scales: float = 0.0
    """Of these multiples, those that only the gradient of a norm's weight needs: none under LoRA."""
    query: float
    """Of the width of all query heads."""
    kv: float = 0.0
    """Of the width of all key heads."""
    inner: float
    wide: float = 0.0
    """Multiples of the hidden width that are fp32 in every mode: norms that compute in fp32."""
    square: bool = False
    """Whether attention weights are kept: heads x positions x positions, as fp32, and again in 16 bits."""


_LLAMA = Kept(hidden=4, scales=2, query=5, inner=4, wide=2)
KEPT = {
    "bloom": Kept(hidden=4, query=2, kv=2, inner=2, square=True),
    "gpt2": Kept(hidden=4, query=3, kv=2, inner=5),
    "opt": Kept(hidden=4, query=2, kv=2, inner=1),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}
"""By transformers' name of the architecture; checked with transformers 4.51. Key heads that are repeated for grouped-query
attention are kept repeated, so they count as query heads."""


def kept_bytes(
    network: Network, work: Sequences, precision: str, *, checkpointing: bool = False, layers: int | None = None, ways: int = 1
) -> float:
    """What `layers` (default: all) keep of one forward pass; with activation checkpointing the input of each, and one layer's
    recomputation. `ways`: ranks that share each layer's heads and feed-forward width.
    """
    layers, one = network.shape.layers if layers is None else layers, layer_bytes(network, work, precision, ways=ways)
    if not checkpointing:
        return layers * one
    return layers * work.positions * network.shape.hidden * WEIGHT_BYTES[precision] + one


def layer_bytes(network: Network, work: Sequences, precision: str, *, ways: int = 1) -> float:
    """What one layer keeps of one forward pass on one of `ways` ranks that share its heads and feed-forward width."""
    shape, kept, size = network.shape, KEPT[network.shape.model_type], CACHE_BYTES[precision]
    hidden = kept.hidden - (kept.scales if network.lora_rank else 0.0)
    shared = kept.query * shape.attention_width + kept.kv * shape.kv_width + kept.inner * shape.inner
    narrow = hidden * shape.hidden + shared / ways + network.lora_rank * len(shape.matrices)
    row = size * narrow + 4 * kept.wide * shape.hidden
    square = (4 + (size if size < 4 else 0)) * shape.heads / ways if kept.square else 0
    kept_of_sequences = work.count * (row * work.length + square * work.length**2)
    return kept_of_sequences + _autocast_bytes(network, work, precision) / shape.layers


def _autocast_bytes(network: Network, work: Sequences, precision: str) -> float:
    """Under autocast the residual stream stays fp32, and the 16-bit copy of every weight lives from forward to backward."""
    if precision != "bf16-autocast":
        return 0.0
    shape = network.shape
    stream = 2 * 2 * shape.hidden * work.positions * shape.layers
    return stream + 2 * (shape.layer_parameters + network.adapter_parameters)


def head_bytes(shape: Shape, positions: float, precision: str, *, gradient: bool = True) -> float:
    """What the language-model head and the loss hold at their largest: logits, their gradient, and the fp32 chunks of the softmax."""
    elements = positions * shape.vocabulary
    chunk = min(elements, CHUNK_ELEMENTS // shape.vocabulary * shape.vocabulary or shape.vocabulary)
    chunks = CHUNKS if elements > chunk else CHUNKS - 1
    return (2 if gradient else 1) * CACHE_BYTES[precision] * elements + chunks * 4 * chunk


def cache_bytes(shape: Shape, *, sequences: float, length: float, precision: str) -> float:
    """Keys and values of all layers for so many sequences."""
    return 2 * shape.layers * shape.kv_width * CACHE_BYTES[precision] * sequences * length
