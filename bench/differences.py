"""What tells cells apart that would otherwise be named alike: the settings in which they differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from bench.cell import Cell, cell_to_json

IDENTITY = ("stage", "model", "strategy", "lora_rank", "nodes", "processes_per_node")
HIDDEN_SETTINGS = ("tokenizer_data", "overlay")


def settings_of(cell: Cell) -> dict[str, Any]:
    """The settings that a report names, in the order of the schema."""
    return {name: value for name, value in cell_to_json(cell).items() if name not in (*IDENTITY, *HIDDEN_SETTINGS)}


def differing(contents: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names whose values are not the same everywhere.

    >>> differing([{"steps": 24, "seed": 1}, {"steps": 60, "seed": 1}])
    ['steps']
    """
    return [name for name in contents[0] if len({written(content[name]) for content in contents}) > 1]


def told_apart(contents: Sequence[Mapping[str, Any]], looks: Sequence[Hashable]) -> list[str]:
    """For each content, what tells it from those that look the same; nothing where it is alone.

    >>> told_apart([{"steps": 24, "seed": 1}, {"steps": 60, "seed": 1}, {"steps": 60, "seed": 1}], ["naive", "naive", "ddp"])
    ['steps 24', 'steps 60', '']
    """
    alike: dict[Hashable, list[Mapping[str, Any]]] = defaultdict(list)
    for content, look in zip(contents, looks, strict=True):
        alike[look].append(content)
    names = {look: differing(group) for look, group in alike.items()}
    return [named(content, names[look]) for content, look in zip(contents, looks, strict=True)]


def titled(
    cells: Iterable[Cell], words: Callable[[Cell], str], joint: str, content: Callable[[Cell], Mapping[str, Any]] = settings_of
) -> dict[Cell, str]:
    """Each cell in `words`, and where others have the same ones, what differs of their `content` behind the joint."""
    found = list(dict.fromkeys(cells))
    plain = [words(cell) for cell in found]
    told = told_apart([content(cell) for cell in found], plain)
    return {cell: f"{name}{joint}{settings}" if settings else name for cell, name, settings in zip(found, plain, told, strict=True)}


def named(content: Mapping[str, Any], names: Iterable[str]) -> str:
    """Settings with their values.

    >>> named({"micro_batch": 8, "activation_checkpointing": True, "clip_norm": None}, ["micro_batch", "clip_norm"])
    'micro_batch 8, clip_norm none'
    """
    return ", ".join(f"{name} {written(content[name])}" for name in names)


def written(value: Any) -> str:
    """A setting's value as reports write it.

    >>> [written(value) for value in (None, True, 2e-5, 8)]
    ['none', 'true', '2e-05', '8']
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
