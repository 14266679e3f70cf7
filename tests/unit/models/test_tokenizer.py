"""The tokenizer of random weights: trained on the suite's texts, the same every time."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.errors import UserError
from bench.models.tokenizer import load_tokenizer, train_tokenizer

TEXTS = [
    f"Write a {kind} about the {thing}, number {k}: é, 文字, \U0001f600."
    for k in range(60)
    for kind, thing in (("poem", "sea"), ("letter", "moon"))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 340, path)
    return path


def test_padding_is_not_the_end_of_a_sequence(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_vocabulary_is_as_large_as_asked_and_no_larger(folder: Path) -> None:
    assert len(load_tokenizer(folder)) == 340


def test_every_text_survives_even_with_unseen_characters(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for text in (TEXTS[0], " leading space", "unseen: ß ʘ \U0001f9ea\n\ttabs", ""):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_special_tokens_are_recognised_in_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer("a</s>", add_special_tokens=False)["input_ids"][-1] == tokenizer.eos_token_id


def test_the_same_texts_give_the_same_files_in_another_process(folder: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from bench.models.tokenizer import train_tokenizer\n"
        f"train_tokenizer({TEXTS!r}, 340, Path({str(tmp_path)!r}))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    assert _hashes(folder) == _hashes(tmp_path)


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_a_tokenizer_without_padding_gets_one_that_is_not_its_end(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = tmp_path / "copy" / name
        path.write_text("\n".join(line for line in path.read_text().splitlines() if '"pad_token"' not in line))
    path = tmp_path / "copy" / "special_tokens_map.json"
    path.write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    tokenizer = load_tokenizer(tmp_path / "copy")
    assert tokenizer.pad_token == "<s>"


def test_a_folder_without_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer can be loaded.*tokenizer\.json would be right"):
        load_tokenizer(tmp_path)
