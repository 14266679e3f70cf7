"""State dicts of ColossalAI-Chat v0.2.8 as checkpoints of today.

What that release saved, by `torch.save`
* actor: `model.` before every name of the language model (`model.transformer.h.0...`, LLaMA: `model.model.layers.0...`)
* reward model, critic: `model.` before every name of the backbone, and `value_head.weight`, `value_head.bias`
* stage 1 by way of `save_pretrained`: transformers' own names
* LoRA layers, unmerged, as `lora_A` and `lora_B` beside `weight`, with alpha 1 and so a scaling of 1 / rank; also on the tied
  head and on the critic's value head

Prefixes are found by matching names against the real model, never guessed: the snippets in circulation loaded none of 48
tensors without an error, or lost the value head. A head's bias shifts every score by one number; scorers have none here, so it
is left out and told.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

HEAD, HEAD_BIAS = "value_head.weight", "value_head.bias"


def convert_coati(
    source: Path, folder: Path, *, config: PretrainedConfig, stage: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """Write the state dict in `source` as a checkpoint of the model that `config` describes; return what was done.

    Keys: sha256, kind, matched (tensors), lora (rank, 0 without; merged), left_out (name -> value of a head's bias). Raises
    CheckpointError with missing and unexpected names if it is not the whole model, and if no name matches at all.
    """
    from bench.checkpoint import save_checkpoint
    from bench.weights_file import load_state_dict_file

    state = load_state_dict_file(source)
    head, bias = _take_head(state)
    names = _bare_names(state, config, scorer=head is not None)
    matched = sum(1 for name in names.values() if "lora_" not in name)
    renamed = {new: state[old] for old, new in names.items()}
    if head is not None:
        renamed = {**{f"model.{name}": tensor for name, tensor in renamed.items()}, HEAD: head}
    facts = _lora_facts(renamed)
    sha256 = save_checkpoint(folder, state=renamed, config=config, stage=stage, tokenizer=tokenizer, started_from={}, lora=facts)
    return {
        "sha256": sha256, "kind": "language-model" if head is None else "scorer", "matched": matched + (head is not None),
        "lora": facts.get("rank", 0), "left_out": {} if bias is None else {HEAD_BIAS: bias},
    }  # fmt: skip


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


def _bare_names(state: dict[str, torch.Tensor], config: PretrainedConfig, *, scorer: bool) -> dict[str, str]:
    """Old name -> name in the bare backbone (scorer) or language model, under the prefix with the most matches."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = set((model.base_model if scorer else model).state_dict())
    own = f"{model.base_model_prefix}."
    prefixes = ["", "model.", "model.model.", *([own, f"model.{own}"] if scorer else [])]
    matches = {prefix: {name: name.removeprefix(prefix) for name in state if name.startswith(prefix)} for prefix in prefixes}
    best = max(prefixes, key=lambda prefix: len(wanted & set(matches[prefix].values())))
    if not wanted & set(matches[best].values()):
        raise CheckpointError(
            f"no tensor matches {type(model).__name__} of {len(wanted)}; seen: {', '.join(sorted(state)[:3])}, ...; "
            "a state dict of this model and size would be right"
        )
    return {name: matches[best].get(name, name) for name in state}


def _lora_facts(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Facts that merging needs: alpha was 1."""
    ranks = {int(tensor.shape[0]) for name, tensor in state.items() if name.endswith("lora_A")}
    if not ranks:
        return {}
    if len(ranks) > 1:
        raise CheckpointError(f"LoRA layers of several ranks; seen: {sorted(ranks)}; one rank would be right")
    rank = ranks.pop()
    targets = sorted({name.removesuffix(".lora_A").rpartition(".")[2] for name in state if name.endswith("lora_A")})
    return {"rank": rank, "alpha": 1.0, "scaling": 1.0 / rank, "targets": targets, "fan_in_fan_out": False}
