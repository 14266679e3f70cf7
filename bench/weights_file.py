"""Files of weights, read at the level of bytes: safetensors headers without torch, pickled state dicts without running them."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import struct
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.errors import CheckpointError, json_fault, shown

if TYPE_CHECKING:
    import torch


class Stored(NamedTuple):
    """Where one tensor of a safetensors file lies."""

    file: Path
    dtype: str
    shape: list[int]
    begin: int
    end: int
    name: str


METADATA = "__metadata__"
"""The entry of a header that is no tensor."""

DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64), **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16), **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6), "F4": 4,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
}  # fmt: skip
"""Type of a safetensors file -> bits of one number (safetensors, src/tensor.rs, Dtype::bitsize)."""

READ_BYTES, READERS = 1 << 26, 8
"""How much is read at once, and how many such reads are under way."""


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
        found = [_stored(path, name, item, start) for name, item in header.items() if name != METADATA]
        _check_data(path, found, start)
        tensors |= {item.name: item for item in found}
    return tensors


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file and where its data begin (format: 8 bytes length, JSON, data).

    It is a JSON object, and its `__metadata__`, if there, are texts by name. Raises CheckpointError.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
    except (OSError, ValueError, struct.error, RecursionError) as error:
        raise _no_safetensors(path, json_fault(error)) from None
    if not isinstance(header, dict):
        raise _no_safetensors(path, f"its header is JSON, but no object: {shown(header)}")
    metadata = header.get(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _no_safetensors(path, f"its header's {METADATA} is no object of texts: {shown(metadata)}")
    return header, 8 + length


def json_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError: it is no `what`."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no {what}; {json_fault(error)}; a JSON object would be right") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: no {what}; seen: {shown(content)}; a JSON object would be right")
    return content


def _no_safetensors(path: Path, seen: str) -> CheckpointError:
    return CheckpointError(f"{path}: no safetensors file; {seen}; a complete one would be right")


def _stored(path: Path, name: str, item: Any, start: int) -> Stored:
    """One entry of a header as it should be: a known type, a shape, and as many bytes as these two need."""
    fields: list[Any] = [item.get(key) if isinstance(item, dict) else None for key in ("dtype", "shape", "data_offsets")]
    dtype, shape, offsets = fields
    right = isinstance(dtype, str) and dtype in DTYPE_BITS and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2
    if not right or not name.isprintable():
        wanted = '{"dtype": a known type, "shape": [sizes], "data_offsets": [begin, end]}'
        raise _no_safetensors(path, f"its header has {shown(name)}: {shown(item)}, which is not {wanted}")
    begin, end = offsets
    if (needed := prod(shape) * DTYPE_BITS[dtype]) != 8 * (end - begin):
        raise _damaged(path, f"{name} has {end - begin} bytes; {dtype} {shape} is {needed / 8:g}")
    return Stored(path, dtype, shape, start + begin, start + end, name)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_data(path: Path, tensors: list[Stored], start: int) -> None:
    """Raise CheckpointError unless the tensors follow each other without gaps to the very end of the file, as the format has it."""
    at, size = start, path.stat().st_size
    for item in sorted(tensors, key=lambda item: (item.begin, item.end)):
        if item.begin != at:
            raise _damaged(path, f"{item.name} begins at byte {item.begin}; what is before it ends at {at}")
        at = item.end
    if at != size:
        raise _damaged(path, f"{size} bytes; its header speaks of {at}")


def _damaged(path: Path, seen: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged or cut off; seen: {seen}; a complete safetensors file would be right")


def read_into(wanted: Iterable[tuple[Stored, torch.Tensor]]) -> None:
    """Fill each tensor with what is stored for it, in its own type; on the CPU straight from the file, a few pieces at a time.

    Raises CheckpointError if a file ends before.
    """
    import torch

    types = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    reads = []
    for item, tensor in wanted:
        if types.get(item.dtype) == tensor.dtype and tensor.device.type == "cpu" and tensor.is_contiguous():
            reads += _reads(item, tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
        else:
            tensor.copy_(_stored_tensor(item))
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(_read, reads))


class _Read(NamedTuple):
    """Bytes of a file, and where in memory they go."""

    file: Path
    begin: int
    target: memoryview


def _reads(item: Stored, target: memoryview) -> list[_Read]:
    return [_Read(item.file, item.begin + at, target[at : at + READ_BYTES]) for at in range(0, len(target), READ_BYTES)]


def _read(read: _Read) -> None:
    with read.file.open("rb", buffering=0) as file:
        file.seek(read.begin)
        done = 0
        while done < len(read.target):
            count = file.readinto(read.target[done:])
            if not count:
                raise CheckpointError(f"{read.file}: cut off; seen: {read.begin + done} bytes; more would be right")
            done += count


def _stored_tensor(item: Stored) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(item.file, framework="pt") as file:
        return file.get_tensor(item.name)


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


def weight_files(path: Path) -> list[Path]:
    """The files of weights that `path` stands for: itself, the shards of an index, or those of a folder (safetensors before pickles).

    Raises CheckpointError if there are none, or if a shard that an index names is missing.
    """
    if path.is_dir():
        indexes = [path / name for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json")]
        if index := next((file for file in indexes if file.is_file()), None):
            return _shards(index)
        found = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin")) or sorted(path.glob("*.pt"))
        if not found:
            raise CheckpointError(f"{path}: no weights; seen: {listing(path)}; a folder with model.safetensors would be right")
        return found
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; weights (.safetensors, .pt, an index of shards, a folder) would be right")
    if not path.is_file():
        raise CheckpointError(f"{path}: neither file nor folder, but a device or the like; a file or folder of weights would be right")
    return _shards(path) if path.name.endswith(".index.json") else [path]


def _shards(index: Path) -> list[Path]:
    places = json_object(index, "index of shards").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index}: no index of shards; seen: {shown(places)}; a `weight_map` of names and files would be right")
    names = sorted(set(places.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise CheckpointError(f"{index}: shards are missing; seen: {len(names) - len(missing)} of {len(names)}; wanted: {missing[:4]}")
    return [index.parent / name for name in names]


def is_safetensors(path: Path) -> bool:
    """Whether the content of `path` begins as a safetensors file does, whatever its name is."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < 1 << 32)


def tensor_shapes(files: list[Path]) -> dict[str, tuple[str, list[int]]]:
    """Name -> type and shape of every tensor, without reading their values. Raises CheckpointError."""
    found: dict[str, tuple[str, list[int]]] = {}
    for path in files:
        if is_safetensors(path):
            found |= {name: (item.dtype, item.shape) for name, item in stored_tensors([path]).items()}
        else:
            found |= {name: (str(it.dtype), list(it.shape)) for name, it in load_state_dict_file(path, device="meta").items()}
    return found


def load_tensors(files: list[Path]) -> dict[str, torch.Tensor]:
    """Every tensor of the files, on the CPU. Raises CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in files:
        try:
            if is_safetensors(path):
                stored_tensors([path])  # says more clearly what is wrong
                found |= load_file(path)
            else:
                found |= load_state_dict_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: no safetensors file; {error}; a complete one would be right") from None
    return found


def load_plain(path: Path, what: str, right: str, *, device: str = "cpu") -> Any:
    """What `torch.save` wrote, tensors and plain values only: no code of a pickle is run. `device` "meta" reads shapes, no values.

    Raises CheckpointError: the file is no `what`; `right` would be right.
    """
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # of what is then an error
            return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; {right} would be right") from None
    except Exception as error:  # noqa: BLE001  a torn pickle makes its reader stumble in any way
        raise CheckpointError(f"{path}: no {what}; {_torch_fault(error)}; {right} would be right") from None


def _torch_fault(error: Exception) -> str:
    """What is wrong, in our words: torch's advise to let the file run its code."""
    text = str(error)
    if found := re.search(r"(?:\bGLOBAL |with )(TorchScript|(?<=GLOBAL )\S+)", text):
        return f"it holds more than tensors and plain values: {found[1]}; nothing of it was run"
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or no file of torch.save"
    seen = (text.splitlines() or [""])[0].partition(". ")[0]
    return f"damaged or cut off: {seen or type(error).__name__}"


def load_state_dict_file(path: Path, *, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of a file that `torch.save` wrote. Raises CheckpointError if it is none or holds more than tensors."""
    import torch

    content = load_plain(path, "state dict", "a state dict (a file of torch.save with names and tensors)", device=device)
    named = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    if not named or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: no state dict; seen: {type(content).__name__}; a dict of names and tensors would be right")
    return content
