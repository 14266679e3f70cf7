"""Files of weights, read at the level of bytes: safetensors headers without torch, pickled state dicts without running them."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.errors import CheckpointError

if TYPE_CHECKING:
    import torch


class Stored(NamedTuple):
    """Where one tensor of a safetensors file lies."""

    file: Path
    dtype: str
    shape: list[int]
    begin: int
    end: int


def pieces(path: Path, begin: int, end: int, size: int = 1 << 24) -> Iterator[bytes]:
    """The bytes of `path` from `begin` to `end`, piece by piece. Raises CheckpointError if the file ends before."""
    with path.open("rb") as file:
        file.seek(begin)
        while begin < end:
            piece = file.read(min(size, end - begin))
            if not piece:
                raise CheckpointError(f"{path}: cut off; seen: {begin} bytes; {end} or more would be right")
            begin += len(piece)
            yield piece


def stored_tensors(files: list[Path]) -> dict[str, Stored]:
    """Where every tensor of some safetensors files lies, by name. Raises CheckpointError."""
    tensors: dict[str, Stored] = {}
    for path in files:
        header, start = read_header(path)
        for name, item in header.items():
            if name != "__metadata__":
                begin, end = item["data_offsets"]
                tensors[name] = Stored(path, item["dtype"], item["shape"], start + begin, start + end)
    return tensors


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file and where its data begin (format: 8 bytes length, JSON, data)."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            return json.loads(file.read(length)), 8 + length
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: no safetensors file; {error}; a complete one would be right") from None


def listing(folder: Path) -> str:
    """What lies in `folder`, for an error text."""
    return ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "an empty folder" if folder.is_dir() else "no folder"


def tensor_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash of named tensors: names, types, shapes and bytes, in the order of the names."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"\n{name} {plain.dtype} {list(plain.shape)}\n".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_state_dict_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that `torch.save` wrote. Raises CheckpointError if it is none or holds more than tensors."""
    import pickle

    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a state dict (.pt) or a checkpoint folder would be right") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise CheckpointError(
            f"{path}: no state dict; {(str(error).splitlines() or ['empty'])[0]}; a file of torch.save would be right"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: no state dict; seen: {type(content).__name__}; a dict of names and tensors would be right")
    return content
