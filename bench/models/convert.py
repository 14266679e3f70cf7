"""Weights from one form to another: state dicts of ColossalAI-Chat v0.2.8, Hugging Face folders and checkpoints of this project.

Every form is read into the same `Parts`, checked name by name and shape by shape against the real model, and written at once or not at
all. A checkpoint of this project is a Hugging Face folder; a scorer's has `value_head.weight` as well.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from bench.checkpoint import (
    HEAD,
    LM_HEAD,
    check_whole,
    embedding_name,
    merge_lora,
    read_facts,
    save_checkpoint,
    write_adapter,
    written_at_once,
)
from bench.errors import CheckpointError, UserError
from bench.models.coati_keys import Parts, coati_state, read_parts
from bench.models.fit import embedding_rows, find_model, named_config
from bench.weights_file import load_tensors, tensor_shapes, weight_files

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Form = Literal["folder", "actor", "reward-model", "critic"]
Lora = Literal["merge", "split", "refuse"]
FORMS: tuple[Form, ...] = ("folder", "actor", "reward-model", "critic")
LORA: tuple[Lora, ...] = ("merge", "split", "refuse")

ADAPTER = "adapter"


class Source(NamedTuple):
    """Weights as they were found."""

    parts: Parts
    config: PretrainedConfig
    model: str
    """The preset or folder whose architecture it is."""
    facts: dict[str, Any]
    """Of checkpoint.json, if it has one."""


def convert(source: Path, target: Path, *, to: Form, lora: Lora = "merge", model: str | None = None, stage: str | None = None,
            tokenizer: Path | None = None) -> dict[str, Any]:  # fmt: skip
    """Write the weights in `source` to `target` in the form `to`; return what was done, for people and for `checkpoint convert`.

    `model` names the architecture (a preset or a folder with config.json); None takes the source's own config.json, or the one preset
    that fits. `lora` says what becomes of adapters: merged, split off (folder: TARGET/base and TARGET/adapter; coati: beside their
    weights) or a reason to refuse. Raises CheckpointError, and leaves nothing, if the weights are not the whole model.
    """
    if to not in FORMS or lora not in LORA:
        raise UserError(f"--to {to} --lora {lora}: no such form; --to is one of {', '.join(FORMS)} and --lora one of {', '.join(LORA)}")
    if target.exists():
        raise UserError(f"{target}: there is something already; nothing is overwritten, so name a path that does not exist")
    found = read_source(source, model)
    parts = with_head(found.parts, found.config)
    if parts.adapters and lora == "refuse":
        raise CheckpointError(
            f"{source}: it has LoRA layers on {len(parts.adapters)} modules; `--lora merge` or `--lora split` would be right"
        )
    _check(source, parts, found.config, to, lora)
    report = _report(found, parts, to, lora)
    if to == "folder":
        words = _tokenizer(source, tokenizer)
        report |= _write_folder(target, found, parts, lora, stage or _stage(found), words) | {"tokenizer": words is not None}
    else:
        _write_state(target, found, parts, lora)
    return report


# -- reading ---------------------------------------------------------------------------------------------------------


def read_source(source: Path, model: str | None) -> Source:
    """The weights in `source`, and the architecture that they are of. Raises CheckpointError, UserError."""
    files = weight_files(source)
    name, config = _architecture(source, files, model)
    state = load_tensors(files)
    if (rows := embedding_rows(state, config)) is not None and rows != config.vocab_size:
        config.vocab_size = rows
    parts, facts = read_parts(state, config), read_facts(source) if source.is_dir() else {}
    if source.is_dir() and (source / ADAPTER).is_dir() and facts.get("lora"):
        parts = _with_adapter(parts, source / ADAPTER, facts["lora"])
    return Source(parts._replace(bias=facts.get("value_head_bias", parts.bias)), config, name, facts)


def _architecture(source: Path, files: list[Path], model: str | None) -> tuple[str, PretrainedConfig]:
    beside = files[0].parent
    if model is not None:
        return model, named_config(model)
    if (beside / "config.json").is_file():
        return str(beside), named_config(str(beside))
    return find_model(str(source), tensor_shapes(files))


def _with_adapter(parts: Parts, folder: Path, lora: dict[str, Any]) -> Parts:
    """Take the adapters of a checkpoint, whose weights are merged, out of them again."""
    stored = load_tensors(weight_files(folder))
    adapters: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in stored.items():
        module, _, layer = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        adapters.setdefault(module, {})[layer] = tensor
    negative = {module: {**layers, "lora_B": -layers["lora_B"]} for module, layers in adapters.items()}
    return parts._replace(weights=merge_lora(parts.weights, negative, lora), adapters=adapters, lora=lora)


def with_head(parts: Parts, config: PretrainedConfig) -> Parts:
    """`parts` with the head of the language model spelled out; one that is no longer the embedding unties the configuration."""
    if parts.kind == "scorer" or not config.tie_word_embeddings:
        return parts
    embedding, weights = parts.weights.get(embedding_name(config)), dict(parts.weights)
    if embedding is None:
        return parts
    head = weights.setdefault(LM_HEAD, embedding)
    if LM_HEAD.removesuffix(".weight") in parts.adapters or head.shape != embedding.shape or not bool((head == embedding).all()):
        config.tie_word_embeddings = False
        weights[LM_HEAD] = head.clone()
    return parts._replace(weights=weights)


def _check(source: Path, parts: Parts, config: PretrainedConfig, to: Form, lora: Lora) -> None:
    """Raise CheckpointError unless `parts` are the whole model and `to` can hold them."""
    if to == "actor" and parts.kind == "scorer":
        raise CheckpointError(f"{source}: it has a value head and no head of a language model; `--to reward-model` would be right")
    if to in ("reward-model", "critic") and parts.kind == "language-model":
        raise CheckpointError(f"{source}: a language model has no value head; `--to actor` would be right")
    if to != "folder" and lora == "split" and parts.lora.get("fan_in_fan_out"):
        raise CheckpointError(f"{source}: coati 0.2.8 has no adapters on GPT-2's transposed layers; `--lora merge` would be right")
    weights = {**parts.weights, **({} if parts.head is None else {HEAD: parts.head}), **dict.fromkeys(parts.unexpected, _NOTHING)}
    check_whole(weights, config, parts.kind, str(source))


class _Shape(NamedTuple):
    shape: tuple[int, ...]


_NOTHING: Any = _Shape(())


def _tokenizer(source: Path, named: Path | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was named, or that lies beside the weights; None where there is none. Raises UserError."""
    from bench.models.tokenizer import load_tokenizer

    if named is None and not (source / "tokenizer.json").is_file():
        return None
    return load_tokenizer(named or source)


def _stage(found: Source) -> str:
    return str(found.facts.get("stage") or ("rm" if found.parts.kind == "scorer" else "sft"))


# -- writing ---------------------------------------------------------------------------------------------------------


def _write_folder(
    target: Path, found: Source, parts: Parts, lora: Lora, stage: str, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """A checkpoint; with `split` two folders: what the adapters fit on, and the adapters as peft reads them."""
    split = bool(parts.adapters) and lora == "split"
    notes = {} if parts.bias is None else {"value_head_bias": parts.bias}
    rest: dict[str, Any] = {"config": found.config, "stage": stage, "tokenizer": tokenizer, "notes": notes,
                            "started_from": found.facts.get("started_from", {})}  # fmt: skip
    if not split:
        return {"sha256": save_checkpoint(target, state=_scorer_names(parts, found.config, adapters=True), lora=parts.lora, **rest)}
    with written_at_once(target) as draft:
        sha256 = save_checkpoint(draft / "base", state=_scorer_names(parts, found.config, adapters=False), lora={}, **rest)
        write_adapter(draft / ADAPTER, parts.adapters, parts.lora)
    return {"sha256": sha256}


def _scorer_names(parts: Parts, config: PretrainedConfig, *, adapters: bool) -> dict[str, torch.Tensor]:
    """What `save_checkpoint` takes: a language model's names, or those of a Scorer."""
    from bench.checkpoint import meta_model

    state = dict(parts.weights)
    for module, layers in parts.adapters.items() if adapters else ():
        state |= {f"{module}.{layer}": tensor for layer, tensor in layers.items()}
    if parts.head is None:
        return state
    inner = f"{meta_model(config).base_model_prefix}."
    return {**{f"model.{name.removeprefix(inner)}": tensor for name, tensor in state.items()}, HEAD: parts.head}


def _write_state(target: Path, found: Source, parts: Parts, lora: Lora) -> None:
    """A state dict of coati, by torch.save, complete or not at all."""
    import torch

    if lora == "merge" and parts.adapters:
        parts = parts._replace(weights=merge_lora(parts.weights, parts.adapters, parts.lora))
    state = {name: tensor.contiguous() for name, tensor in coati_state(parts, found.config, adapters=lora == "split").items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
        os.chmod(draft, 0o644)
        os.replace(draft, target)
    except BaseException:
        os.unlink(draft)
        raise


def _report(found: Source, parts: Parts, to: Form, lora: Lora) -> dict[str, Any]:
    matched = len(found.parts.weights) + (parts.head is not None)
    became = "merged" if lora == "merge" else "split off"
    adapters = {"rank": parts.lora["rank"], "modules": len(parts.adapters), "became": became} if parts.adapters else None
    return {
        "model": found.model, "kind": parts.kind, "to": to, "prefix": parts.prefix, "vocabulary": int(found.config.vocab_size),
        "matched": matched, "missing": [], "unexpected": [], "left_out": sorted(parts.left_out),
        "value_head_bias": parts.bias, "lora": adapters, "tokenizer": None,
    }  # fmt: skip


def report_text(report: dict[str, Any], target: Path) -> str:
    """What `convert` did, in lines."""
    prefix = f" under the prefix {report['prefix']!r}" if report["prefix"] else ""
    lines = [
        f"{target}: {report['kind']} of {report['model']}, vocabulary {report['vocabulary']}",
        f"matched {report['matched']} tensors{prefix}; missing 0; unexpected 0",
    ]
    if lora := report["lora"]:
        lines.append(f"LoRA layers of rank {lora['rank']} on {lora['modules']} modules: {lora['became']}")
    if report["left_out"]:
        lines.append(
            f"left out {len(report['left_out'])}: {', '.join(report['left_out'][:4])}{', ...' if len(report['left_out']) > 4 else ''}"
        )
    if report["value_head_bias"] is not None:
        lines.append(f"the value head's bias, {report['value_head_bias']:g}, shifts every score alike; it is kept as a note")
    if report["tokenizer"] is False:
        lines.append("no tokenizer lay beside the weights: `--tokenizer FOLDER` takes one along, and a stage that starts here needs it")
    return "\n".join(lines)
