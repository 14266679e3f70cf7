"""The shape of a transformer as numbers: its matrix products, its heads, its key-value cache. Torch-free.

A `Shape` has what FLOPs, bytes and LoRA adapters are computed from; `Network` is a shape in a role: with which head, and with
adapters or without. Biases, norms and embedding look-ups take part in no matrix product and count in `parameters` only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.models.presets import config_numbers, config_parameter_count


class Matrix(NamedTuple):
    """One linear layer."""

    fan_in: int
    fan_out: int

    @property
    def parameters(self) -> int:
        """Weights, the bias not counted."""
        return self.fan_in * self.fan_out


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder-only transformer."""

    model_type: str
    """transformers' name of the architecture."""
    layers: int
    hidden: int
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads; fewer than `heads` with grouped-query attention."""
    head_dim: int
    inner: int
    """Width of the feed-forward block."""
    gated: bool
    """Whether the feed-forward block has a third matrix, the gate."""
    fused_qkv: bool
    """Whether query, key and value are one linear layer: one LoRA target instead of three."""
    vocabulary: int
    tied: bool
    """Whether the head's weight is the input embedding."""
    parameters: int
    """Everything, a tied head counted once."""
    causal_kernel: bool
    """Whether attention runs through scaled_dot_product_attention, whose kernels can skip the future; BLOOM's ALiBi does not."""

    @property
    def attention_width(self) -> int:
        """Width d of the attention products: query heads x their width."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of a position's keys, and of its values."""
        return self.kv_heads * self.head_dim

    @property
    def entry_matrices(self) -> tuple[Matrix, ...]:
        """The linear layers that read a layer's input: query, key, value."""
        if self.fused_qkv:
            return (Matrix(self.hidden, self.attention_width + 2 * self.kv_width),)
        return (Matrix(self.hidden, self.attention_width), Matrix(self.hidden, self.kv_width), Matrix(self.hidden, self.kv_width))

    @property
    def exit_matrix(self) -> Matrix:
        """The linear layer that writes a layer's output."""
        return Matrix(self.inner, self.hidden)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every linear layer of one layer: attention, then feed-forward."""
        widening = (Matrix(self.hidden, self.inner),) * (2 if self.gated else 1)
        return (*self.entry_matrices, Matrix(self.attention_width, self.hidden), *widening, self.exit_matrix)

    @property
    def layer_parameters(self) -> int:
        """Parameters in matrix products of all layers, the heads not counted."""
        return self.layers * sum(matrix.parameters for matrix in self.matrices)

    @property
    def head_parameters(self) -> int:
        """Parameters of the language-model head; it is computed also where it is tied."""
        return self.hidden * self.vocabulary


def adapter_parameters(matrix: Matrix, rank: int) -> int:
    """Parameters of one LoRA adapter: A is rank x fan_in, B is fan_out x rank (Hu et al. 2021, arXiv:2106.09685, section 4.1)."""
    return rank * (matrix.fan_in + matrix.fan_out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A shape in a role.

    >>> policy = Network(shape=shape_of("bloom-560m"), lora_rank=8)
    >>> policy.adapter_parameters, policy.parameters, policy.trainable
    (3145728, 562360320, 3145728)
    """

    shape: Shape
    scalar_head: bool = False
    """A reward model or critic: a hidden x 1 head instead of the language-model head."""
    lora_rank: int = 0
    """0: no adapters. They sit on every linear layer of the layers."""
    frozen: bool = False
    """Only read: reference policy, reward model of PPO."""

    @property
    def head_parameters(self) -> int:
        """Parameters of the head in use."""
        return self.shape.hidden if self.scalar_head else self.shape.head_parameters

    @property
    def adapter_parameters(self) -> int:
        """Parameters of all LoRA adapters."""
        return self.shape.layers * sum(adapter_parameters(matrix, self.lora_rank) for matrix in self.shape.matrices)

    @property
    def parameters(self) -> int:
        """Everything that is stored: a scorer has no language-model head (a tied one stays as its embedding)."""
        own = self.shape.parameters + self.adapter_parameters
        if not self.scalar_head:
            return own
        return own + self.shape.hidden - (0 if self.shape.tied else self.shape.head_parameters)

    @property
    def largest_update(self) -> int:
        """Parameters of the largest tensor that trains: an embedding as a rule, with adapters one of their matrices."""
        if self.lora_rank:
            return self.lora_rank * max(max(matrix) for matrix in self.shape.matrices)
        return max(self.shape.head_parameters, *(matrix.parameters for matrix in self.shape.matrices))

    @property
    def head_trains(self) -> bool:
        """A scalar head trains beside adapters; a language-model head is frozen under them."""
        return not self.frozen and (self.lora_rank == 0 or self.scalar_head)

    @property
    def trainable(self) -> int:
        """Parameters that the optimizer updates."""
        if self.frozen:
            return 0
        if self.lora_rank == 0:
            return self.parameters
        return self.adapter_parameters + (self.head_parameters if self.scalar_head else 0)


def shape_of(name: str) -> Shape | None:
    """The shape of model `name`: a preset, or a folder with config.json.

    None where the numbers are not at hand (a hub id) or the architecture is not one of those below.
    """
    return shape_of_config(config_numbers(name))


def shape_of_config(config: dict[str, Any]) -> Shape | None:
    """The shape of a model by its configuration, as transformers writes it.

    None where the architecture is not one of those below, or a number has another name.
    """
    parameters, read = config_parameter_count(config), _READERS.get(str(config.get("model_type")))
    try:
        return None if parameters is None or read is None else read(config, parameters)
    except KeyError:
        return None


SIZES = frozenset({
    "model_type", "n_layer", "n_embd", "n_head", "n_inner", "n_positions", "hidden_size", "vocab_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "ffn_dim", "word_embed_proj_dim",
    "max_position_embeddings", "attention_bias", "tie_word_embeddings",
})  # fmt: skip
"""What of a configuration decides its shape."""


def config_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that `shape_of_config` reads, for a record: from it the shape is known without the model.

    >>> config_sizes({"model_type": "bloom", "n_layer": 24, "use_cache": True})
    {'model_type': 'bloom', 'n_layer': 24}
    """
    return {name: config[name] for name in sorted(SIZES & config.keys())}


def _bloom(config: dict[str, Any], parameters: int) -> Shape:
    size = _Size(config["n_layer"], config["hidden_size"], config["n_head"], 4 * config["hidden_size"], config["vocab_size"])
    return _plain("bloom", size, parameters, fused_qkv=True, causal_kernel=False)


def _gpt2(config: dict[str, Any], parameters: int) -> Shape | None:
    size = _Size(config["n_layer"], config["n_embd"], config["n_head"], 4 * config["n_embd"], config["vocab_size"])
    if config.get("n_inner") not in (None, size.inner):
        return None
    return _plain("gpt2", size, parameters, fused_qkv=True, causal_kernel=True)


def _opt(config: dict[str, Any], parameters: int) -> Shape:
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    size = _Size(layers, config["hidden_size"], heads, config["ffn_dim"], config["vocab_size"])
    return _plain("opt", size, parameters, fused_qkv=False, causal_kernel=True)


class _Size(NamedTuple):
    layers: int
    hidden: int
    heads: int
    inner: int
    vocabulary: int


def _plain(model_type: str, size: _Size, parameters: int, *, fused_qkv: bool, causal_kernel: bool) -> Shape:
    """As many key heads as query heads, two feed-forward matrices, a tied head."""
    return Shape(
        model_type=model_type, layers=size.layers, hidden=size.hidden, heads=size.heads, kv_heads=size.heads,
        head_dim=size.hidden // size.heads, inner=size.inner, gated=False, fused_qkv=fused_qkv, vocabulary=size.vocabulary, tied=True,
        parameters=parameters, causal_kernel=causal_kernel,
    )  # fmt: skip


def _llama_like(config: dict[str, Any], parameters: int) -> Shape:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    return Shape(
        model_type=config["model_type"], layers=config["num_hidden_layers"], hidden=hidden, heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads, head_dim=config.get("head_dim") or hidden // heads,
        inner=config["intermediate_size"], gated=True, fused_qkv=False, vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings")), parameters=parameters, causal_kernel=True,
    )  # fmt: skip


_READERS: dict[str, Callable[[dict[str, Any], int], Shape | None]] = {
    "bloom": _bloom, "gpt2": _gpt2, "opt": _opt, "llama": _llama_like, "mistral": _llama_like, "qwen2": _llama_like,
}  # fmt: skip
