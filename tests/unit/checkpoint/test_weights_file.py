"""Files of weights that are not what they should be: every one is told by its name and what is wrong, whatever its JSON says."""

from __future__ import annotations

import json
import os
import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.checkpoint import read_facts
from bench.cli import _exit_code
from bench.errors import CheckpointError
from bench.models.inspection import inspect_checkpoint
from bench.weights_file import stored_tensors

DEEP = b"[" * 100_000
WHOLE = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: Any, data: bytes = bytes(24)) -> Path:
    """A safetensors file with this header: JSON, or its bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "b": {"dtype": "U8", "shape": [], "data_offsets": [24, 25]}, "a": WHOLE}
    header["none"] = {"dtype": "F32", "shape": [0, 4], "data_offsets": [24, 24]}
    found = stored_tensors([write(tmp_path / "w.safetensors", header, bytes(25))])
    assert {name: item.shape for name, item in found.items()} == {"b": [], "a": [2, 3], "none": [0, 4]}


@pytest.mark.parametrize("verb", [["inspect"], ["convert"]])
@pytest.mark.parametrize(
    ("header", "told"),
    [
        ([], "its header is JSON, but no object: []"),
        (None, "its header is JSON, but no object: None"),
        ({"a": 1}, "its header has 'a': 1, which is not"),
        ({"a": {}}, "its header has 'a': {}, which is not"),
        ({"__metadata__": 3}, "its header's __metadata__ is no object of texts: 3"),
        ({"__metadata__": {"a": 1}}, "its header's __metadata__ is no object of texts"),
        (DEEP, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of too many digits"),
        ({"a": {**WHOLE, "shape": None}}, "its header has 'a'"),
        ({"a": {**WHOLE, "shape": [-1]}}, "its header has 'a'"),
        ({"a": {**WHOLE, "shape": [2.0, 3]}}, "its header has 'a'"),
        ({"a": {**WHOLE, "dtype": "X"}}, "its header has 'a'"),
        ({"a": {**WHOLE, "dtype": []}}, "its header has 'a'"),
        ({"a": {**WHOLE, "data_offsets": [0]}}, "its header has 'a'"),
        ({"a\n": WHOLE}, "its header has 'a\\n'"),
        ({"\ud800": WHOLE}, "its header has '\\ud800'"),
    ],
)
def test_a_header_that_is_none_is_told(header: Any, told: str, verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "w.safetensors", header)
    assert _exit_code(["checkpoint", *verb, str(path), *([str(tmp_path / "new")] if verb == ["convert"] else [])]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"coati-bench: {path}: no safetensors file; {told}")
    assert said.count("\n") == 1
    assert said.endswith("would be right\n")


@pytest.mark.parametrize(
    ("header", "size", "told"),
    [
        ({"a": WHOLE}, 4, "bytes; its header speaks of"),
        ({"a": WHOLE}, 25, "bytes; its header speaks of"),
        ({"a": {**WHOLE, "data_offsets": [4, 0]}}, 24, "a has -4 bytes; F32 [2, 3] is 24"),
        ({"a": {**WHOLE, "shape": [2, 4]}}, 24, "a has 24 bytes; F32 [2, 4] is 32"),
        ({"a": WHOLE, "b": WHOLE}, 24, "b begins at byte"),
        ({"a": {**WHOLE, "data_offsets": [8, 32]}}, 32, "a begins at byte"),
    ],
)
def test_data_that_do_not_fit_the_header_are_told(header: Any, size: int, told: str, tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError) as error:
        inspect_checkpoint(path)
    assert str(error.value).startswith(f"{path}: damaged or cut off; seen: ")
    assert told in str(error.value)


@pytest.mark.parametrize("noted", ["{", "3", "[" * 100_000])
def test_facts_in_the_header_that_are_none_are_told(noted: str, tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors", {"__metadata__": {"coati-bench": noted}, "a": WHOLE})
    with pytest.raises(CheckpointError, match="its metadata `coati-bench` are no facts; seen: "):
        inspect_checkpoint(path)


@pytest.mark.parametrize("content", [b"[]", b"null", b"{}", b'{"weight_map": {"a": 1}}', b'{"weight_map": {"a": []}}', DEEP])
def test_an_index_of_shards_that_is_none_is_told(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    for given in (path, tmp_path):
        with pytest.raises(CheckpointError, match=r"index\.json: no index of shards; .* would be right"):
            inspect_checkpoint(given)


def test_what_is_neither_file_nor_folder_is_told_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="neither file nor folder"):
        inspect_checkpoint(tmp_path / "pipe")


@pytest.mark.parametrize("shape", [[], [6], [0, 1 << 60]])
def test_an_embedding_of_no_shape_fits_no_model(shape: list[int], tmp_path: Path) -> None:
    layer = {"transformer.h.1.ln.weight": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}}
    count = 0 if 0 in shape else sum(shape) or 1
    odd = {"transformer.word_embeddings.weight": {"dtype": "U8", "shape": shape, "data_offsets": [64, 64 + count]}}
    found = inspect_checkpoint(write(tmp_path / "w.safetensors", layer | odd, bytes(64 + count)))
    assert found["fits"] == []


class _Object:
    pass


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("code", "it holds more than tensors and plain values: print; nothing of it was run"),
        ("script", "it holds more than tensors and plain values: TorchScript; nothing of it was run"),
        ("text", "it is damaged, or no file of torch.save"),
        ("pickle", "it is damaged, or no file of torch.save"),
        ("empty", "damaged or cut off: EOFError"),
        ("cut", "damaged or cut off: PytorchStreamReader failed reading zip archive"),
    ],
)
def test_a_pickle_that_cannot_be_loaded_is_told_in_one_line_without_advice_to_run_it(
    name: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.pt"
    if name == "script":
        with warnings.catch_warnings(action="ignore"):
            torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    else:
        torch.save({"a": print if name == "code" else torch.zeros(100)}, path)
    whole = path.read_bytes()
    plain = pickle.dumps({"a": _Object()}, protocol=4)
    path.write_bytes({"text": b"nothing", "pickle": plain, "empty": b"", "cut": whole[:500]}.get(name, whole))
    assert _exit_code(["checkpoint", "inspect", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"coati-bench: {path}: no state dict; {told}")
    assert (said.count("\n"), "weights_only" in said) == (1, False)


def test_a_pickle_whose_names_are_no_texts_is_told(tmp_path: Path) -> None:
    torch.save({1: torch.zeros(2)}, tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match="no state dict; seen: dict; a dict of names and tensors would be right"):
        inspect_checkpoint(tmp_path / "old.pt")


# -- folders -----------------------------------------------------------------------------------------------------------

BLOOM = {"model_type": "bloom", "vocab_size": 100, "hidden_size": 8, "n_layer": 1, "n_head": 2}

LLAMA = {"model_type": "llama", "vocab_size": 100, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("verb", ["inspect", "convert", "convert --model"])
@pytest.mark.parametrize(
    ("config", "told"),
    [
        (b"[]", "config.json of this folder is no JSON object"),
        (DEEP, "config.json of this folder is no JSON object"),
        ({**BLOOM, "hidden_size": "x"}, "config.json of this folder has a wrong size; seen: hidden_size 'x'; a whole number"),
        ({**BLOOM, "hidden_size": -1}, "config.json of this folder has a wrong size; seen: hidden_size -1; a whole number"),
        ({**BLOOM, "n_layer": 10**9}, "config.json of this folder has a wrong size; seen: n_layer 1000000000; a whole number"),
        ({**BLOOM, "n_head": 3}, "config.json of this folder has a wrong size; seen: 3 heads for a width of 8; a divisor"),
        ({**BLOOM, "model_type": []}, "config.json of this folder has no architecture; seen: model_type []; its name"),
        ({**BLOOM, "torch_dtype": 5}, "no architecture that transformers knows; "),
        ({**LLAMA, "pad_token_id": 500}, "no architecture that transformers knows; "),
        ({"model_type": "mine"}, "no architecture that transformers knows; "),
    ],
)
def test_a_folder_whose_configuration_is_none_is_told(
    config: Any, told: str, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, weights = tmp_path / "model", tmp_path / "weights"
    for path in (folder, weights):
        path.mkdir()
        write(path / "model.safetensors", {"a": WHOLE})
    (folder / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    given = {
        "inspect": ["inspect", str(folder)],
        "convert": ["convert", str(folder), str(tmp_path / "new")],
        "convert --model": ["convert", str(weights), str(tmp_path / "new"), "--model", str(folder)],
    }
    assert _exit_code(["checkpoint", *given[verb]]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"coati-bench: {folder}")
    assert told in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("content", ["[]", "{", "null"])
def test_facts_beside_the_weights_that_are_none_are_told(content: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: no facts of a checkpoint; .*; a JSON object would be right"):
        read_facts(tmp_path)
