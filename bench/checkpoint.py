"""One weight format between the stages: a folder that transformers and peft can read as well.

    model.safetensors   merged full weights under the names of transformers' causal language model; a tied head is not
                        stored; a scorer has `value_head.weight` and no language-model head
    config.json, tokenizer files
    checkpoint.json     what it is: stage, kind, tied names, sha256 of what it started from, LoRA facts, its own sha256
    adapter/            the LoRA layers as a peft folder, if there were any; they fit the weights that training started from

The facts of checkpoint.json are in the metadata of model.safetensors as well. Importing this module and hashing need no torch.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench.errors import CheckpointError
from bench.weights_file import Stored, json_object, listing, pieces, read_into, stored_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

SCHEMA = "coati-bench/checkpoint/1"
WEIGHTS = "model.safetensors"
FACTS = "checkpoint.json"
HEAD = "value_head.weight"
LM_HEAD = "lm_head.weight"

SETTLED_SECONDS = 2.0
"""A younger file may change once more without its time of change showing it."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_NOT_HASHED_IN_CONFIG = ("_name_or_path", "transformers_version", "torch_dtype")


# ---------------------------------------------------------------------------------------------------------------- hashes


def checkpoint_sha256(folder: Path) -> str:
    """Hash of what a model folder holds: tensors (names, types, shapes, bytes), architecture and tokenizer; torch-free.

    How tensors are split over files, file times, metadata and checkpoint.json do not count, so equal weights have equal hashes.
    A folder with a tokenizer alone has one too. Files that have not changed since this process hashed them are not read again.
    Raises CheckpointError if there is nothing to hash.
    """
    folder = Path(folder)
    stamps = [path.stat() for path in sorted(folder.glob("*")) if path.is_file()]
    if time.time() - max((stamp.st_ctime for stamp in stamps), default=0.0) < SETTLED_SECONDS:
        return _hash_folder(folder)
    return _hash_settled(folder, tuple((stamp.st_ino, stamp.st_size, stamp.st_mtime_ns, stamp.st_ctime_ns) for stamp in stamps))


@lru_cache(maxsize=64)
def _hash_settled(folder: Path, stamps: tuple[tuple[int, ...], ...]) -> str:  # noqa: ARG001 (part of the key)
    return _hash_folder(folder)


def _hash_folder(folder: Path) -> str:
    digest, seen = hashlib.sha256(), False
    tensors = stored_tensors(sorted(folder.glob("*.safetensors")))
    for name in sorted(tensors):
        _hash_stored(digest, name, tensors[name])
        seen = True
    for path in [*sorted(folder.glob("*.bin")), *(folder / name for name in _TOKENIZER_FILES)]:
        if path.is_file():
            digest.update(f"\nfile {path.name}\n".encode())
            for piece in pieces(path, 0, path.stat().st_size):
                digest.update(piece)
            seen = True
    if (folder / "config.json").is_file():
        config = json_object(folder / "config.json", "model configuration")
        kept = {key: value for key, value in config.items() if key not in _NOT_HASHED_IN_CONFIG}
        digest.update(b"\nconfig " + json.dumps(kept, sort_keys=True).encode())
    if not seen:
        raise CheckpointError(
            f"{folder}: no checkpoint or tokenizer; seen: {listing(folder)}; model.safetensors or tokenizer.json would be right"
        )
    return digest.hexdigest()


def _hash_stored(digest: Any, name: str, tensor: Stored) -> None:
    digest.update(f"\n{name} {tensor.dtype} {tensor.shape}\n".encode())
    for piece in pieces(tensor.file, tensor.begin, tensor.end):
        digest.update(piece)


# ------------------------------------------------------------------------------------------------------------------ save


def save_checkpoint(
    folder: Path,
    *,
    state: dict[str, torch.Tensor],
    config: PretrainedConfig,
    stage: str,
    tokenizer: PreTrainedTokenizerBase | None,
    started_from: dict[str, str],
    lora: dict[str, Any],
    notes: dict[str, Any] | None = None,
) -> str:
    """Write `state` (of a language model or a Scorer, LoRA layers included) as a checkpoint; return its sha256.

    `lora` is what `add_lora` returned, {} without adapters; `notes` are more facts. LoRA layers are merged in fp32 and merged
    tensors stay fp32: in bf16 a small change would be rounded away. Other tensors keep their type. An older checkpoint in `folder`
    is replaced, at once, when the new one is complete. Raises CheckpointError if `state` is not a whole model of this architecture.
    """
    folder = Path(folder)
    weights, adapters = split_lora(_canonical(state, config))
    merged = merge_lora(weights, adapters, lora)
    kind = "scorer" if HEAD in merged else "language-model"
    config, tied = _drop_tied(merged, config, {f"{name}.weight" for name in adapters})
    check_whole(merged, config, kind, "the state to save")
    facts = {"schema": SCHEMA, "stage": stage, "kind": kind, "tied": tied, "started_from": started_from, "lora": lora or None}
    facts |= notes or {}
    with written_at_once(folder) as draft:
        _write_weights(draft, merged, facts, config)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        if adapters:
            write_adapter(draft / "adapter", adapters, lora)
        sha256 = checkpoint_sha256(draft)
        _write_json(draft / FACTS, {**facts, "sha256": sha256, "parameters": sum(tensor.numel() for tensor in merged.values())})
    return sha256


def _canonical(state: dict[str, torch.Tensor], config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """`state` under the names of transformers' causal language model; a Scorer's backbone gets that model's prefix."""
    if HEAD not in state:
        return dict(state)
    prefix = _causal_class(config).base_model_prefix
    return {key if key == HEAD else f"{prefix}.{key.removeprefix('model.')}": value for key, value in state.items()}


def split_lora(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Weights under the names of the bare model, and the LoRA layers: module name -> {lora_A, lora_B}."""
    weights: dict[str, torch.Tensor] = {}
    adapters: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        module, mark, rest = key.partition(".lora_")
        if mark:
            adapters.setdefault(module, {})[f"lora_{rest[0]}"] = value
        else:
            weights[key.replace(".base_layer.", ".")] = value
    return weights, adapters


def merge_lora(
    weights: dict[str, torch.Tensor], adapters: dict[str, dict[str, torch.Tensor]], lora: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """`weights` with the change of every LoRA layer added, in fp32. Raises CheckpointError without LoRA facts."""
    if adapters and not lora:
        raise CheckpointError("the state has LoRA layers, but no LoRA facts were given; those that add_lora returned would be right")
    merged = dict(weights)
    for module, layers in adapters.items():
        change = layers["lora_B"].float() @ layers["lora_A"].float() * lora["scaling"]
        merged[f"{module}.weight"] = weights[f"{module}.weight"].float() + (change.T if lora["fan_in_fan_out"] else change)
    return merged


def _drop_tied(state: dict[str, torch.Tensor], config: PretrainedConfig, adapted: set[str]) -> tuple[PretrainedConfig, dict[str, str]]:
    """Remove the tied head from `state`; return the configuration to store and {head: embedding}.

    A head with its own adapter is no longer the embedding: it is stored, and the configuration says that it is not tied.
    """
    config = type(config).from_dict(config.to_dict())
    if not config.tie_word_embeddings:
        return config, {}
    embedding = embedding_name(config)
    if LM_HEAD in adapted or embedding in adapted:
        config.tie_word_embeddings = False
        return config, {}
    state.pop(LM_HEAD, None)
    return config, {LM_HEAD: embedding}


def embedding_name(config: PretrainedConfig) -> str:
    """Name of the input embedding's weight."""
    model = meta_model(config)
    return next(name for name, child in model.named_modules() if child is model.get_input_embeddings()) + ".weight"


def check_whole(state: dict[str, torch.Tensor], config: PretrainedConfig, kind: str, source: str) -> None:
    """Raise CheckpointError unless `state` is a whole `language-model` or `scorer` of this architecture; a tied head may be in it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in meta_model(config).state_dict().items()}
    if kind == "scorer":
        shapes[HEAD] = (1, config.hidden_size)
    if kind == "scorer" or (config.tie_word_embeddings and LM_HEAD not in state):
        shapes.pop(LM_HEAD, None)
    _check_names(source, {name: tuple(tensor.shape) for name, tensor in state.items()}, shapes)


def meta_model(config: PretrainedConfig) -> Any:
    """The causal language model of `config` without storage."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _causal_class(config: PretrainedConfig) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _write_weights(folder: Path, state: dict[str, torch.Tensor], facts: dict[str, Any], config: PretrainedConfig) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", "coati-bench": json.dumps(facts, sort_keys=True)})
    config.architectures = [_causal_class(config).__name__]
    config.save_pretrained(folder)


def write_adapter(folder: Path, adapters: dict[str, dict[str, torch.Tensor]], lora: dict[str, Any]) -> None:
    """Write LoRA layers (module -> {lora_A, lora_B}) as a peft folder. `lora`: rank, alpha, fan_in_fan_out."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {
        f"base_model.model.{module}.{layer}.weight": tensor.detach().cpu().contiguous()
        for module, layers in adapters.items()
        for layer, tensor in layers.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(
        r=lora["rank"], lora_alpha=lora["alpha"], target_modules=list(adapters), lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        fan_in_fan_out=lora["fan_in_fan_out"], inference_mode=True,
    ).to_dict()  # fmt: skip
    _write_json(
        folder / "adapter_config.json", {key: sorted(value) if isinstance(value, (set, list)) else value for key, value in config.items()}
    )


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def written_at_once(folder: Path) -> Iterator[Path]:
    """A draft folder that becomes `folder` at the end; nothing is left of it after an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield draft
        draft.chmod(0o755)
        if folder.exists():
            old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
            folder.replace(old / "old")
            draft.replace(folder)
            shutil.rmtree(old)
        else:
            draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------------ load


def load_checkpoint(module: nn.Module, folder: Path, *, part: Literal["all", "backbone"]) -> dict[str, Any]:
    """Copy the weights of a checkpoint into `module` (a language model or a Scorer, adapters or not); return its facts.

    `all` fills every weight but the adapters, heads included; `backbone` leaves heads as they are and ignores those stored, so it
    also reads a language model into a Scorer. Strict: raises CheckpointError with the missing, unexpected and mismatched names.
    """
    import torch

    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no weights; seen: {listing(folder)}; a folder with {WEIGHTS} would be right")
    stored = stored_tensors(files)
    targets = _targets(module)
    if part == "backbone":
        stored = {name: item for name, item in stored.items() if name not in (HEAD, LM_HEAD)}
        targets = {name: tensor for name, tensor in targets.items() if name not in (HEAD, LM_HEAD)}
    _check_names(
        str(folder),
        {name: tuple(item.shape) for name, item in stored.items()},
        {name: tuple(tensor.shape) for name, tensor in targets.items()},
    )
    with torch.no_grad():
        read_into([(stored[name], target) for name, target in targets.items()])
    return read_facts(folder)


def read_facts(folder: Path) -> dict[str, Any]:
    """What checkpoint.json says, {} for a folder that another program wrote; torch-free."""
    path = Path(folder) / FACTS
    return json_object(path, "facts of a checkpoint") if path.is_file() else {}


def _targets(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of `module` that a checkpoint fills, by stored name; adapters and tied heads are none."""
    config: Any = module.config
    weights, _ = split_lora(_canonical(dict(module.state_dict()), config))
    if config.tie_word_embeddings:
        weights.pop(LM_HEAD, None)
    return weights


def _check_names(source: str, seen: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    missing, unexpected = sorted(wanted.keys() - seen.keys()), sorted(seen.keys() - wanted.keys())
    mismatched = [
        f"{name} {list(seen[name])} for {list(wanted[name])}" for name in sorted(wanted.keys() & seen.keys()) if seen[name] != wanted[name]
    ]
    if not (missing or unexpected or mismatched):
        return
    matched = len(wanted.keys() & seen.keys()) - len(mismatched)
    parts = [("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)]
    told = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in parts if names)
    hint = " (a language model has no value head: a fresh head would be right)" if missing == [HEAD] else ""
    raise CheckpointError(
        f"{source}: not the weights of this model; {matched} of {len(wanted)} tensors match; {told}; "
        f"a checkpoint of the same model would be right{hint}"
    )


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f", ... ({len(names) - limit} more)" if len(names) > limit else "")
