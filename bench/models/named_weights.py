"""Whether weights that a suite names fit its model, as far as their headers say. Torch-free: asked at planning."""

from __future__ import annotations

from pathlib import Path

from bench.errors import CheckpointError
from bench.models.presets import config_numbers
from bench.weights_file import stored_tensors

_SHAPE_NUMBERS = {
    "bloom": ("hidden_size", "n_layer", "n_head"),
    "gpt2": ("n_embd", "n_layer", "n_head"),
    **dict.fromkeys(("opt", "llama", "mistral", "qwen2"), ("hidden_size", "num_hidden_layers", "num_attention_heads")),
}
"""Architecture -> the names of its sizes in config.json, beside the vocabulary's."""


def reward_weights_problem(folder: Path, model: str) -> str | None:
    """Why the checkpoint in `folder` is no reward model of the shape of `model`, or None."""
    weights = folder / "model.safetensors"
    if not weights.is_file():
        return "no checkpoint is there; a folder with model.safetensors, as stage rm leaves it, would be right"
    wanted, seen = config_numbers(model), config_numbers(str(folder))
    names = ("model_type", "vocab_size", *_SHAPE_NUMBERS.get(str(wanted.get("model_type")), ()))
    other = [f"{name} {seen[name]}, not {wanted[name]}" for name in names if name in seen and name in wanted and seen[name] != wanted[name]]
    if other:
        return f"a checkpoint of another model than {model} ({'; '.join(other)}); a reward model trained from {model} would be right"
    try:
        tensors = stored_tensors([weights])
    except CheckpointError as error:
        return str(error)
    if "value_head.weight" not in tensors:
        return "a checkpoint without a value head, so of a language model; one that stage rm left would be right"
    return None
