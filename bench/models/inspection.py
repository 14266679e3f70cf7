"""What `checkpoint inspect` says of weights: names, shapes, types, and which model they fit. No tensor's value is read."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from bench.checkpoint import checkpoint_sha256
from bench.errors import CheckpointError
from bench.models.fit import Fit, Shapes, fit_to, fitting_models, named_config
from bench.weights_file import METADATA, is_safetensors, read_header, tensor_shapes, weight_files


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """What a folder, a safetensors file, an index of shards or a pickled state dict holds.

    Keys: format, files, tensors, parameters, dtypes, names (name -> type and shape), value_head, lora (names), fits (in words), facts,
    sha256 (of folders). A pickle is read with torch's `weights_only`, which runs no code of it. Raises CheckpointError.
    """
    path = Path(path)
    files = weight_files(path)
    shapes = tensor_shapes(files)
    stored = [file for file in files if is_safetensors(file)]
    facts: dict[str, Any] = {}
    for file in stored:
        facts |= _facts(file)
    return {
        "format": "safetensors" if stored else "pickle", "files": [file.name for file in files], "tensors": len(shapes),
        "parameters": sum(prod(shape) for _, shape in shapes.values()), "dtypes": sorted({dtype for dtype, _ in shapes.values()}),
        "names": {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in shapes.items()},
        "value_head": any(name.endswith("value_head.weight") for name in shapes), "lora": [name for name in shapes if ".lora_" in name],
        "fits": [str(fit) for fit in _fits(files[0].parent, shapes)], "facts": facts,
        "sha256": checkpoint_sha256(path) if path.is_dir() and stored else None,
    }  # fmt: skip


def _facts(file: Path) -> dict[str, Any]:
    """What this project noted in the header of a safetensors file. Raises CheckpointError."""
    noted = read_header(file)[0].get(METADATA, {}).get("coati-bench", "{}")
    try:
        facts = json.loads(noted)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise CheckpointError(f"{file}: its metadata `coati-bench` are no facts; seen: {noted[:60]!r}; a JSON object would be right")
    return facts


def _fits(folder: Path, shapes: Shapes) -> list[Fit]:
    """Presets, and the configuration that lies beside the weights."""
    own = fit_to(str(folder), named_config(str(folder)), shapes) if (folder / "config.json").is_file() else None
    return [*([own] if own else []), *fitting_models(shapes)]


def inspection_text(found: dict[str, Any], path: Path) -> str:
    """The same for people: a few lines, and one for each tensor."""
    facts, lora = found["facts"], found["lora"]
    files = f" in {len(found['files'])} files" if len(found["files"]) > 1 else ""
    lines = [
        f"{path}: {found['tensors']} tensors, {found['parameters']:,} parameters, {', '.join(found['dtypes'])}; {found['format']}{files}",
        f"fits: {'; '.join(found['fits']) or 'no model that is known here'}",
        f"value head: {'yes' if found['value_head'] else 'no'}; LoRA layers: {len(lora) or 'none'}",
    ]
    if facts:
        lines.append(f"made by stage {facts.get('stage')}; started from {facts.get('started_from') or 'nothing'}; LoRA {facts.get('lora')}")
    if found["sha256"]:
        lines.append(f"sha256 {found['sha256']}")
    width = max(map(len, found["names"]), default=0)
    lines += [f"  {name:<{width}}  {item['dtype']:<8} {item['shape']}" for name, item in found["names"].items()]
    return "\n".join(lines)
