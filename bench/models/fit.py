"""Which model a file of weights is of: by names and shapes, never by its file name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.checkpoint import HEAD, LM_HEAD, embedding_name, meta_model
from bench.errors import CheckpointError, UserError
from bench.layout import expanded
from bench.models.coati_keys import HEAD_BIAS, match_names
from bench.models.presets import PRESETS, Preset, model_problem

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Shapes = Mapping[str, tuple[str, list[int]]]
"""Name -> type and shape."""

_LAYER = re.compile(r"\.(\d+)\.")
_SIZES = {
    "bloom": ("n_layer", "hidden_size"), "gpt2": ("n_layer", "n_embd"), "opt": ("num_hidden_layers", "hidden_size"),
    "llama": ("num_hidden_layers", "hidden_size"), "mistral": ("num_hidden_layers", "hidden_size"),
    "qwen2": ("num_hidden_layers", "hidden_size"),
}  # fmt: skip
"""Architecture -> its names for the number of layers and the width."""


class Fit(NamedTuple):
    """A model that the weights are whole weights of."""

    model: str
    kind: str
    """`language-model`, `scorer` or `backbone` (no head at all, and none tied)."""
    prefix: str
    vocabulary: int

    def __str__(self) -> str:
        preset = PRESETS.get(self.model)
        other = preset is not None and self.vocabulary != preset.config["vocab_size"]
        prefix = f", under the prefix {self.prefix!r}" if self.prefix else ""
        return f"{self.kind} {self.model}{f' with vocabulary {self.vocabulary}' if other else ''}{prefix}"


def fitting_models(shapes: Shapes) -> list[Fit]:
    """The presets that the weights fit, adapters and constants of older versions aside; a vocabulary of another size fits too."""
    layers = 1 + max((int(number) for name in shapes for number in _LAYER.findall(name)), default=-1)
    sides = {side for _, shape in shapes.values() for side in shape}
    found = (fit_to(name, preset_config(preset), shapes) for name, preset in PRESETS.items() if _may_be(preset, layers, sides))
    return [fit for fit in found if fit]


def _may_be(preset: Preset, layers: int, sides: set[int]) -> bool:
    depth, width = _SIZES[preset.model_type]
    return preset.config[depth] == layers and preset.config[width] in sides


def fit_to(model: str, config: PretrainedConfig, shapes: Shapes) -> Fit | None:
    """How the weights fit the model of `config`, None if they are not all of it."""
    heads = {name for name in shapes if name.endswith((HEAD, HEAD_BIAS)) or ".value_head." in f".{name}"}
    try:
        names = match_names([name for name in shapes if name not in heads], config)
    except CheckpointError:
        return None
    plain = {new: shapes[old][1] for old, new in names.found.items() if ".lora_" not in new}
    plain = {name.replace(".base_layer.", "."): shape for name, shape in plain.items()}
    embedding = plain.get(embedding_name(config), [config.vocab_size, 1])
    if len(embedding) != 2 or not prod(embedding):
        return None
    rows = embedding[0]
    if isinstance(config.pad_token_id, int) and config.pad_token_id >= rows:
        return None
    config.vocab_size = rows
    wanted = {name: list(tensor.shape) for name, tensor in meta_model(config).state_dict().items()}
    missing = wanted.keys() - plain.keys() - {LM_HEAD}
    if names.unexpected or missing or any(wanted[name] != shape for name, shape in plain.items()):
        return None
    whole = LM_HEAD in plain or config.tie_word_embeddings
    return Fit(model, "scorer" if heads else "language-model" if whole else "backbone", names.prefix, rows)


def find_model(source: str, shapes: Shapes) -> tuple[str, PretrainedConfig]:
    """The one preset that the weights fit. Raises CheckpointError if none does, or if several do."""
    fits = fitting_models(shapes)
    if len(fits) != 1:
        seen = f"{len(shapes)} tensors ({', '.join(sorted(shapes)[:3])}, ...)" if not fits else f"{len(fits)} that fit"
        names = f": {', '.join(fit.model for fit in fits)}" if fits else ""
        raise CheckpointError(
            f"{source}: it is not clear which model this is of; seen: {seen}{names}; `--model` with a preset or a folder with config.json "
            "would be right"
        )
    return fits[0].model, named_config(fits[0].model)


def named_config(model: str) -> PretrainedConfig:
    """The architecture of a preset, or of a folder with config.json. Raises UserError, also if no model can be made of it."""
    from transformers import AutoConfig

    if model in PRESETS:
        return preset_config(PRESETS[model])
    folder = expanded(model)
    if not (folder / "config.json").is_file():
        raise UserError(f"model {model!r}: no preset and no folder with config.json is called so; presets: {', '.join(PRESETS)}")
    if problem := model_problem(model):
        raise UserError(f"{model}: {problem}")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        meta_model(config)
    except Exception as error:  # noqa: BLE001  odd values make transformers stumble in any way
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{model}/config.json: no architecture that transformers knows; {first}; that of a language model would be right"
        ) from None
    return config


def preset_config(preset: Preset) -> PretrainedConfig:
    """A preset's configuration."""
    from transformers import AutoConfig

    return AutoConfig.for_model(preset.model_type, **preset.config)


def embedding_rows(state: Mapping[str, Any], config: PretrainedConfig) -> int | None:
    """Rows of the input embedding in a state dict under any prefix: the vocabulary that it was trained with."""
    name = embedding_name(config)
    tail = name.removeprefix(f"{meta_model(config).base_model_prefix}.")
    found = [tensor for key, tensor in state.items() if f".{key}".endswith((f".{name}", f".{tail}")) and tensor.ndim and tensor.numel()]
    return int(found[0].shape[0]) if len(found) == 1 else None
