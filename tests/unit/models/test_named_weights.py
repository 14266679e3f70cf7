"""A reward model that a suite names is looked at when the suite is planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench.errors import SuiteError
from bench.matrix import expand, known_names
from bench.models.named_weights import reward_weights_problem
from bench.models.presets import PRESETS
from bench.suite import check_suite


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What is read of a reward model of bloom-tiny."""
    save_file({"value_head.weight": torch.zeros(1, 64)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**PRESETS["bloom-tiny"].config, "model_type": "bloom"}), encoding="utf-8")
    return tmp_path


def test_a_reward_model_of_the_same_model_fits(folder: Path) -> None:
    assert reward_weights_problem(folder, "bloom-tiny") is None


def test_what_is_not_known_of_a_hub_model_is_not_held_against_it(folder: Path) -> None:
    assert reward_weights_problem(folder, "org/model") is None


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("llama-tiny", "(model_type bloom, not llama)"),
        ("bloom-560m", "(vocab_size 4096, not 250880; hidden_size 64, not 1024; n_layer 2, not 24; n_head 4, not 16)"),
    ],
)
def test_another_model_is_told_with_what_differs(folder: Path, model: str, why: str) -> None:
    assert f"a checkpoint of another model than {model} {why}" in str(reward_weights_problem(folder, model))


def test_a_language_model_is_no_reward_model(folder: Path) -> None:
    save_file({"transformer.ln_f.weight": torch.zeros(64)}, folder / "model.safetensors")
    assert "without a value head" in str(reward_weights_problem(folder, "bloom-tiny"))


def test_a_damaged_file_is_told(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"nothing of the kind")
    assert "model.safetensors" in str(reward_weights_problem(folder, "bloom-tiny"))


def test_every_such_mistake_of_a_suite_is_told_at_its_place(folder: Path) -> None:
    content = {
        "suite": "small",
        "axes": {"stage": ["ppo"], "model": ["llama-tiny"], "strategy": ["naive"]},
        "settings": {"device": "cpu"},
        "stages": {"sft": {"steps": 3}, "ppo": {"reward_model": str(folder)}},
        "include": [
            {"stage": "ppo", "model": "bloom-tiny", "strategy": "ddp", "settings": {"reward_model": "/nowhere"}},
            {"stage": "ppo", "model": "bloom-tiny", "strategy": "naive", "settings": {"lap_steps": 2}},
        ],
    }
    with pytest.raises(SuiteError) as caught:
        expand(check_suite(content, "suite.yaml", known_names(), Path()), "suite.yaml")
    assert [(mistake.path, mistake.problem.split(";")[0]) for mistake in caught.value.mistakes] == [
        ("include[0].settings.reward_model", "no checkpoint is there"),
        ("stages.ppo.reward_model", "a checkpoint of another model than llama-tiny (model_type bloom, not llama)"),
    ]
