"""Random weights come sooner the second time, and are the same, bit by bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from bench.cell import cell_from_json
from bench.layout import CACHE_VARIABLE
from bench.models import random_weights
from bench.models.build import initial_sha256, model_config
from bench.models.presets import PRESETS
from bench.models.random_weights import draw

TINY = sorted(name for name in PRESETS if name.endswith("tiny"))


@pytest.fixture(autouse=True)
def small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own; models of this size are worth a note, in many pieces."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(random_weights, "LEAST", 0)
    monkeypatch.setattr(random_weights, "PIECE", 1 << 10)
    return tmp_path


def maker(name: str) -> tuple[partial, object]:
    config = model_config(cell_from_json({"stage": "sft", "model": name, "strategy": "naive", "steps": 1, "device": "cpu"}))
    return partial(AutoModelForCausalLM.from_config, config, torch_dtype=torch.float32), config


def plain(make: partial, seed: int) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return initial_sha256(make())


@pytest.mark.parametrize("name", TINY)
def test_first_and_later_draws_equal_those_of_the_framework_alone(name: str, small_pieces: Path) -> None:
    make, config = maker(name)
    wanted = plain(make, 7)
    assert initial_sha256(draw(make, config, 7)) == wanted
    assert len(list(small_pieces.rglob("*.npz"))) == 1
    assert initial_sha256(draw(make, config, 7)) == wanted
    assert plain(make, 8) == initial_sha256(draw(make, config, 8)) != wanted


def test_values_that_are_overwritten_later_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    make, config = maker("bloom-tiny")
    drawn = []
    monkeypatch.setattr(random_weights, "_fill", lambda _, piece, *rest: drawn.append(piece.numel()))  # noqa: ARG005
    model = draw(make, config, 7)
    assert drawn == []
    make_again = draw(make, config, 7)
    matrices = sum(p.numel() for p in make_again.parameters() if p.dim() == 2)
    assert sum(drawn) == matrices == sum(p.numel() for p in model.parameters() if p.dim() == 2)


def test_a_note_of_another_model_is_not_used(small_pieces: Path) -> None:
    make, config = maker("bloom-tiny")
    other, _ = maker("gpt2-tiny")
    draw(make, config, 7)
    assert initial_sha256(draw(other, config, 7)) == plain(other, 7)
    next(small_pieces.rglob("*.npz")).write_bytes(b"cut off")
    assert initial_sha256(draw(make, config, 7)) == plain(make, 7)


def test_writes_between_two_fills_keep_their_order() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(300, 16, padding_idx=3)
            self.linear = nn.Linear(40, 50)
            self.linear.bias.data.zero_()
            self.odd = nn.Parameter(torch.empty(7).normal_().mul_(2.0))
            self.linear.weight.data.normal_(0.0, 0.02)
            self.copy = nn.Parameter(self.linear.weight.detach() + 1.0)
            self.linear.weight.data[0].fill_(5.0)

    config = maker("bloom-tiny")[1]
    wanted = plain(Mixed, 3)
    assert [initial_sha256(draw(Mixed, config, 3)) for _ in range(2)] == [wanted, wanted]


def test_a_model_that_draws_in_another_way_is_left_alone(small_pieces: Path) -> None:
    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.order = nn.Parameter(torch.empty(20).normal_()[torch.randperm(20)])
            self.other = nn.Parameter(torch.empty(20).exponential_())

    config = maker("bloom-tiny")[1]
    assert initial_sha256(draw(Permuted, config, 3)) == plain(Permuted, 3)
    assert not list(small_pieces.rglob("*.npz"))


def test_a_cache_that_cannot_be_written_is_no_error(small_pieces: Path) -> None:
    (small_pieces / "generator-states").write_text("in the way")
    make, config = maker("bloom-tiny")
    assert initial_sha256(draw(make, config, 7)) == plain(make, 7)
