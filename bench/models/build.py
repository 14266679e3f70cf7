"""Models as one module each: the language model, and the scorer (reward model, critic) with its scalar head.

Shapes: B sequences, T tokens. Weights are built in fp32 on the CPU, so that they are the same whatever the strategy, device
and number of ranks; a strategy casts and moves them. Asked for `shapes`, a model has none: it is on torch's meta device, for a
strategy that sends the first rank's weights to the others (`Strategy.shapes_suffice`). Random weights come from `base_seed` alone,
not from the trial's seed: trials repeat the training, not the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import no_init_weights

from bench.cell import Cell
from bench.checkpoint import load_checkpoint
from bench.errors import UserError
from bench.layout import expanded
from bench.models.presets import PRESETS, model_problem
from bench.models.random_weights import draw
from bench.models.tokenizer import load_tokenizer
from bench.weights_file import tensor_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from bench.trial import Trial

HEAD_SEED_OFFSET = 1_000_003
"""Keeps the head's random numbers apart from those of the backbone."""


class Scorer(nn.Module):
    """A backbone without its language-model head, and a scalar head on every position: reward model or critic.

    The head has no bias: a reward model's loss sees only differences, and one tensor less is one convention less. Its
    initial weights are N(0, 1 / (hidden + 1)) as in ColossalAI v0.2.8 (coati/models/base, bloom_rm.py).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.value_head = nn.Linear(_hidden_size(model.config), 1, bias=False)

    @property
    def config(self) -> PretrainedConfig:
        """Configuration of the backbone."""
        return self.model.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of every position, (B, T), as fp32 of the precision that the head computes in; those at masked positions mean nothing."""
        places = {} if position_ids is None else {"position_ids": position_ids}
        hidden_BTH = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **places).last_hidden_state
        return self.value_head(hidden_BTH).squeeze(-1).float()


def build_policy(trial: Trial, *, shapes: bool = False) -> PreTrainedModel:
    """The causal language model of `trial`, fp32, on the CPU, without adapters; `shapes`: without weights.

    Its weights are those of the start `policy` if the trial has one, else what `settings.weights` says. Raises UserError for
    a model that cannot be had here, CheckpointError for a start that does not fit.
    """
    cell, start = trial.parsed_cell, trial.start("policy")
    model = _shapes(cell) if shapes else _language_model(cell, replaced=start is not None)
    if start is not None and not shapes:
        load_checkpoint(model, Path(start.path), part="all")
    return _ready(model, cell)


def build_scorer(trial: Trial, *, fresh_head: bool, source: str, shapes: bool = False) -> Scorer:
    """A reward model or critic, fp32, on the CPU, without adapters; `shapes`: without weights.

    `source` names the start (`policy` or `reward`) that the backbone comes from, and the head too unless `fresh_head`. Without that
    start the backbone is what `settings.weights` says and the head is fresh. A fresh head is seeded by `base_seed`.
    """
    cell, start = trial.parsed_cell, trial.start(source)
    if shapes:
        with torch.device("meta"):
            return _ready(Scorer(_shapes(cell).base_model), cell)
    language_model = _language_model(cell, replaced=start is not None)
    with seeded(cell.settings.base_seed + HEAD_SEED_OFFSET):
        scorer = Scorer(language_model.base_model)
        scorer.value_head.weight.data.normal_(mean=0.0, std=1.0 / (_hidden_size(scorer.config) + 1))
    if start is not None:
        load_checkpoint(scorer, Path(start.path), part="backbone" if fresh_head else "all")
    return _ready(scorer, cell)


def build_tokenizer(trial: Trial) -> PreTrainedTokenizerFast:
    """The tokenizer of `trial`: its start `tokenizer`, else that beside its start `policy`, else the model's own.

    Raises UserError if it has more tokens than the model has embeddings.
    """
    cell = trial.parsed_cell
    folders = [
        start.path for role in ("tokenizer", "policy") if (start := trial.start(role)) and (Path(start.path) / "tokenizer.json").is_file()
    ]
    tokenizer = load_tokenizer(folders[0]) if folders else load_tokenizer(*_source(cell))
    room = int(model_config(cell).vocab_size)
    if len(tokenizer) > room:
        raise UserError(
            f"model {cell.model!r}: its vocabulary is smaller than the tokenizer's; seen: {len(tokenizer)} tokens for {room} embeddings; "
            f"`tokenizer_vocabulary: {room}` or less would be right"
        )
    return tokenizer


def _language_model(cell: Cell, *, replaced: bool) -> PreTrainedModel:
    """The model of `cell`; `replaced`: its weights are overwritten next and need no values."""
    if replaced or cell.settings.weights == "random":
        config = model_config(cell)
        make = partial(AutoModelForCausalLM.from_config, config, torch_dtype=torch.float32)
        with seeded(cell.settings.base_seed), no_init_weights() if replaced else nullcontext():
            model = make() if replaced else draw(make, config, cell.settings.base_seed)
        model.tie_weights()  # skipped together with the initial values
        return model
    name, revision = _source(cell)
    with _explained(name, "weights"):
        return AutoModelForCausalLM.from_pretrained(
            name, revision=revision, config=model_config(cell), torch_dtype=torch.float32, trust_remote_code=False
        )


def _shapes(cell: Cell) -> PreTrainedModel:
    """The model of `cell` on the meta device: names, shapes, what is tied; no weights."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(model_config(cell), torch_dtype=torch.float32)
    model.tie_weights()
    return model


def model_config(cell: Cell) -> PretrainedConfig:
    """The architecture of the cell's model, with all dropout at 0 (see presets.py). Raises UserError."""
    problem = model_problem(cell.model)
    if problem:
        raise UserError(f"model {cell.model!r}: {problem}")
    preset = PRESETS.get(cell.model)
    if preset is not None and cell.settings.weights == "random":
        return AutoConfig.for_model(preset.model_type, **preset.config)
    name, revision = _source(cell)
    with _explained(name, "configuration"):
        return without_dropout(AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False))


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """`config` with every dropout probability set to 0, in place."""
    for key, value in config.to_dict().items():
        if isinstance(value, float) and (key.endswith(("dropout", "pdrop")) or key == "layerdrop"):
            setattr(config, key, 0.0)
    return config


def _source(cell: Cell) -> tuple[str, str | None]:
    """Folder or hub id, and revision, of the cell's model."""
    if cell.settings.weights not in ("random", "pretrained"):
        return cell.settings.weights, None
    preset = PRESETS.get(cell.model)
    if preset is None:
        folder = expanded(cell.model)
        return str(folder) if folder.exists() else cell.model, None
    if preset.hub_id is None:
        raise UserError(
            f"model {cell.model!r}: no weights or tokenizer of this shape are published; seen: weights {cell.settings.weights!r}; "
            "`weights: random` with `tokenizer_data`, or a folder, would be right"
        )
    return preset.hub_id, preset.revision


@contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model {name!r}: its {what} cannot be loaded; {first}; trials run with the hub offline, so download it before "
            f"(`huggingface-cli download {name}`) or name a folder with config.json and safetensors; code from a repository is never run"
        ) from None


def _ready(module: nn.Module, cell: Cell) -> Any:
    if cell.settings.activation_checkpointing:
        checkpoint_activations(module)
    return module.train()


def checkpoint_activations(module: nn.Module) -> None:
    """Recompute the activations of every layer in the backward pass. In `train()` mode it also turns the KV cache off."""
    backbone(module).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's CPU generator starts at `seed` inside, and is as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def backbone(module: nn.Module) -> PreTrainedModel:
    """The transformers model inside `module`: a language model itself, a Scorer's backbone, through any wrappers."""
    inner: Any = module
    while not isinstance(inner, PreTrainedModel):
        inner = inner.model if isinstance(inner, Scorer) else inner.module
    return inner


def _hidden_size(config: PretrainedConfig) -> int:
    return int(config.hidden_size)


def add_lora(module: nn.Module, cell: Cell, seed: int) -> dict[str, Any]:
    """Put LoRA adapters of rank `cell.lora_rank` into every linear layer of the transformer layers, in place; freeze the rest.

    The LM head and the embeddings (often one tensor) are never touched; a Scorer's head stays trainable. The first adapters
    depend on `seed` alone (A uniform, B zero). Returns facts for the record: rank, alpha, scaling as the live layers have it,
    targets (kinds of layers), trainable (parameters), and `fan_in_fan_out` (GPT-2's transposed layers), which merging needs.
    Rank 0 changes nothing and returns {}.
    """
    if cell.lora_rank == 0:
        return {}
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    targets = lora_targets(module)
    transposed = isinstance(module.get_submodule(targets[0]), Conv1D)
    config = LoraConfig(
        r=cell.lora_rank, lora_alpha=cell.lora_alpha, target_modules=targets, lora_dropout=0.0, bias="none", fan_in_fan_out=transposed
    )
    with seeded(seed), _without_quantised_layers():
        inject_adapter_in_model(config, module)
    if isinstance(module, Scorer):
        module.value_head.requires_grad_(True)
    layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
    scalings = {layer.scaling["default"] for layer in layers}
    assert len(layers) == len(targets)
    assert len(scalings) == 1
    return {
        "rank": cell.lora_rank, "alpha": cell.lora_alpha, "scaling": scalings.pop(), "fan_in_fan_out": transposed,
        "targets": sorted({name.rpartition(".")[2] for name in targets}), "trainable": counts(module)["trainable"],
    }  # fmt: skip


@contextmanager
def _without_quantised_layers() -> Iterator[None]:
    """Keep peft from asking bitsandbytes whether a layer is quantised: none is, and its import takes as long as the start of a trial."""
    from peft.tuners.lora import model as tuner

    names = ("is_bnb_available", "is_bnb_4bit_available")
    before = {name: getattr(tuner, name) for name in names}
    for name in names:
        setattr(tuner, name, lambda: False)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(tuner, name, function)


def lora_targets(module: nn.Module) -> list[str]:
    """Names of the linear layers inside the transformer layers of `module`. Raises UserError if there are none."""
    from transformers.pytorch_utils import Conv1D

    stacks = [f"{name}." for name, child in module.named_modules() if isinstance(child, nn.ModuleList)]
    names = [
        name
        for name, child in module.named_modules()
        if isinstance(child, (nn.Linear, Conv1D)) and any(name.startswith(stack) for stack in stacks)
    ]
    if not names:
        raise UserError(f"LoRA: {type(module).__name__} has no linear layers in a stack of layers; lora_rank 0 would be right")
    return names


def initial_sha256(module: nn.Module) -> str | None:
    """Hash of all parameters of `module`, adapters included: names, types, shapes and values; a tied tensor counts once.

    None for a model without weights, which another rank has.
    """
    if any(parameter.is_meta for parameter in module.parameters()):
        return None
    return tensor_digest(module.named_parameters())


def counts(module: nn.Module) -> dict[str, int]:
    """Parameters (a tied tensor once, adapters included) and how many of them train."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    return {"parameters": sum(size for size, _ in sizes), "trainable": sum(size for size, trains in sizes if trains)}


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions (B, T) that count only unmasked tokens from 0, so that left padding does not shift them; masked ones get 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def accepts_position_ids(module: nn.Module) -> bool:
    """Whether the model inside `module` takes `position_ids` (LLaMA, GPT-2, OPT) or finds positions itself (BLOOM's ALiBi)."""
    return "position_ids" in inspect.signature(backbone(module).forward).parameters
