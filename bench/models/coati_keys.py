"""The names of ColossalAI-Chat v0.2.8's state dicts and of transformers' models, and how to get from one to the other.

What that release saved, by `torch.save`
* actor: `model.` before every name of the language model (`model.transformer.h.0...`, LLaMA: `model.model.layers.0...`)
* reward model, critic: `model.` before every name of the backbone, and `value_head.weight`, `value_head.bias`; LLaMA's critic holds
  a whole language model instead of the backbone
* stage 1 by way of `save_pretrained`: transformers' own names
* LoRA layers, unmerged, as `lora_A` and `lora_B` beside `weight`, with alpha 1 and so a scaling of 1 / rank; also on the tied
  head and on the critic's value head

What circulates besides: backbones alone without any prefix, `model.` before every name (`model.value_head.weight` too), and `module.`
of data-parallel wrappers before any of these. The prefix is found by matching names against the real model, never guessed: the snippets
in circulation loaded none of 48 tensors without an error, or lost the value head.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.checkpoint import HEAD, LM_HEAD, meta_model, split_lora
from bench.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch
    from transformers import PretrainedConfig

HEAD_BIAS = "value_head.bias"

_LORA = re.compile(r"(.+)\.lora_[AB](\.default)?(\.weight)?")
_OLD_BUFFERS = re.compile(r"\.(attn\.(masked_)?bias|attention\.(masked_)?bias|rotary_emb\.inv_freq)$")
"""Constants that older versions of transformers stored (causal masks, rotary frequencies) and that are computed today."""


class Names(NamedTuple):
    """What the names of a state dict mean to a model."""

    prefix: str
    """What stands before the model's own names."""
    found: dict[str, str]
    """Name in the state dict -> transformers' name in the causal language model, LoRA layers included."""
    left_out: list[str]
    """Constants of older versions."""
    unexpected: list[str]


def match_names(keys: Iterable[str], config: PretrainedConfig) -> Names:
    """Find the prefix under which most of `keys` (value heads apart) are names of the language model or of its backbone alone.

    Raises CheckpointError if none is.
    """
    keys, model = list(keys), meta_model(config)
    own, inner = set(model.state_dict()), f"{model.base_model_prefix}."
    backbone = {name.removeprefix(inner) for name in own if name.startswith(inner)}
    ranked = [
        (count, not added, prefix, added) for added, table in (("", own), (inner, backbone)) for prefix, count in _prefixes(keys, table)
    ]
    if not ranked:
        raise CheckpointError(
            f"no tensor matches {type(model).__name__} of {len(own)}; seen: {', '.join(sorted(keys)[:3])}, ...; "
            "a state dict of this model and size would be right"
        )
    _, _, prefix, added = max(ranked)
    found: dict[str, str] = {}
    rest = []
    for key in keys:
        name = key if key == LM_HEAD else added + key.removeprefix(prefix)
        if (key.startswith(prefix) or key == LM_HEAD) and _plain(name) in own:
            found[key] = name
        else:
            rest.append(key)
    return Names(prefix, found, [key for key in rest if _OLD_BUFFERS.search(key)], [key for key in rest if not _OLD_BUFFERS.search(key)])


def _prefixes(keys: Sequence[str], table: set[str]) -> list[tuple[str, int]]:
    """Every text before a name of `table` in `keys`, and how many names stand behind it."""
    counts: Counter[str] = Counter()
    for key in keys:
        parts = _plain(key).split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in table:
                counts["".join(f"{part}." for part in parts[:cut])] += 1
    return list(counts.items())


def _plain(key: str) -> str:
    """The weight that a LoRA layer belongs to; any other name as it is."""
    found = _LORA.fullmatch(key)
    return f"{found[1]}.weight" if found else key.replace(".base_layer.", ".")


class Parts(NamedTuple):
    """The weights of one model, whatever file they come from."""

    weights: dict[str, torch.Tensor]
    """Without adapters, under the names of transformers' causal language model; a scorer has no head of the language model."""
    adapters: dict[str, dict[str, torch.Tensor]]
    """Module -> {lora_A, lora_B}."""
    lora: dict[str, Any]
    """Facts of the adapters: rank, alpha, scaling, targets, fan_in_fan_out; {} without."""
    head: torch.Tensor | None
    """The value head, its own adapter merged; None for a language model."""
    bias: float | None
    """The value head's bias, which scorers have none of here: it shifts every score by one number."""
    left_out: list[str]
    unexpected: list[str]
    prefix: str

    @property
    def kind(self) -> str:
        """`scorer` or `language-model`."""
        return "language-model" if self.head is None else "scorer"


def read_parts(state: dict[str, torch.Tensor], config: PretrainedConfig) -> Parts:
    """Sort the tensors of a state dict, of the old release or of transformers. Raises CheckpointError."""
    state = dict(state)
    head, bias = _take_head(state)
    names = match_names(state, config)
    weights, adapters = split_lora({new: state[old] for old, new in names.found.items()})
    left_out = list(names.left_out)
    if head is not None and weights.pop(LM_HEAD, None) is not None:
        adapters.pop(LM_HEAD.removesuffix(".weight"), None)
        left_out.append(LM_HEAD)
    return Parts(weights, adapters, _lora_facts(adapters), head, bias, left_out, names.unexpected, names.prefix)


def _take_head(state: dict[str, torch.Tensor]) -> tuple[torch.Tensor | None, float | None]:
    """Remove the value head from `state`; return its weight, adapter merged, and its bias. Raises CheckpointError for two heads."""
    found = [name for name in state if name.endswith(HEAD)]
    if not found:
        return None, None
    if len(found) > 1:
        raise CheckpointError(f"two value heads; seen: {', '.join(found)}; one would be right")
    prefix = found[0].removesuffix("weight")
    parts = {name.removeprefix(prefix): state.pop(name) for name in [name for name in state if name.startswith(prefix)]}
    weight = parts["weight"]
    if "lora_A" in parts:
        weight = weight.float() + parts["lora_B"].float() @ parts["lora_A"].float() / parts["lora_A"].shape[0]
    return weight, parts["bias"].item() if "bias" in parts else None


def _lora_facts(adapters: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Facts that merging needs: alpha was 1. Raises CheckpointError for halves of adapters and for several ranks."""
    halves = [module for module, layers in adapters.items() if layers.keys() != {"lora_A", "lora_B"}]
    if halves:
        raise CheckpointError(f"LoRA layers without their other half; seen: {', '.join(halves[:4])}; lora_A and lora_B would be right")
    ranks = {int(layers["lora_A"].shape[0]) for layers in adapters.values()}
    if not ranks:
        return {}
    if len(ranks) > 1:
        raise CheckpointError(f"LoRA layers of several ranks; seen: {sorted(ranks)}; one rank would be right")
    rank = ranks.pop()
    targets = sorted({module.rpartition(".")[2] for module in adapters})
    return {"rank": rank, "alpha": 1.0, "scaling": 1.0 / rank, "targets": targets, "fan_in_fan_out": False}


def coati_state(parts: Parts, config: PretrainedConfig, *, adapters: bool) -> dict[str, torch.Tensor]:
    """The state dict that v0.2.8 loads strictly: of an actor, or of a reward model or critic where there is a value head.

    With `adapters` LoRA layers stand beside their weights, B scaled so that alpha 1 gives the same change; else they must be merged.
    """
    import torch

    inner = f"{meta_model(config).base_model_prefix}."
    rename = (lambda name: name) if parts.head is None else (lambda name: name.removeprefix(inner))
    state = {f"model.{rename(name)}": tensor for name, tensor in parts.weights.items()}
    if adapters:
        for module, layers in parts.adapters.items():
            factor = parts.lora["scaling"] * parts.lora["rank"]
            state[f"model.{rename(module)}.lora_A"] = layers["lora_A"]
            state[f"model.{rename(module)}.lora_B"] = layers["lora_B"] * factor
    if parts.head is not None:
        state[HEAD] = parts.head
        state[HEAD_BIAS] = torch.tensor([parts.bias or 0.0], dtype=parts.head.dtype)
    return state
