"""Presets are data; their counts are those of the papers and of the models that are really built."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.models.presets import PRESETS, model_problem, parameter_count, vocabulary_size

# Billions, to three decimals, of the architectures that ColossalAI v0.2.8's benchmarks build.
GPT2 = {
    "s": 0.124, "m": 0.355, "l": 0.774, "xl": 1.558, "2b": 2.119, "4b": 4.197, "6b": 6.251, "8b": 8.265, "10b": 10.279, "12b": 12.293,
    "15b": 15.918, "18b": 18.334, "20b": 20.555, "24b": 24.582, "28b": 28.610, "32b": 32.637, "36b": 36.664, "40b": 40.691, "175b": 174.604,
}  # fmt: skip
OPT = {
    "125m": 0.125, "350m": 0.356, "700m": 0.775, "1.3b": 1.316, "2.7b": 2.652, "3.5b": 3.786, "5.5b": 5.865, "6.7b": 6.658, "10b": 10.336,
    "13b": 12.853,
}  # fmt: skip
TINY = sorted(name for name in PRESETS if name.endswith("tiny"))


@pytest.mark.parametrize(
    ("name", "billions"),
    [*((f"gpt2-{size}", count) for size, count in GPT2.items()), *((f"opt-{size}", count) for size, count in OPT.items())],
)
def test_the_old_benchmarks_sizes_are_met(name: str, billions: float) -> None:
    assert round(parameter_count(name) / 1e9, 3) == billions


def test_known_counts_are_exact() -> None:
    assert parameter_count("bloom-560m") == 559_214_592
    assert parameter_count("llama-7b") == 6_738_415_616
    assert parameter_count("llama-13b") == 13_015_864_320


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_analytic_count_is_that_of_the_built_model(name: str) -> None:
    preset = PRESETS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(preset.model_type, **preset.config))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(name)


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_are_tiny_and_have_no_dropout(name: str) -> None:
    config = AutoConfig.for_model(PRESETS[name].model_type, **PRESETS[name].config)
    assert parameter_count(name) < 700_000
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 2, 4)
    probabilities = {
        key: value for key, value in config.to_dict().items() if re.search(r"dropout|pdrop|layerdrop", key) and isinstance(value, float)
    }
    assert set(probabilities.values()) == {0.0}


def test_bloom_560m_is_pinned() -> None:
    preset = PRESETS["bloom-560m"]
    assert (preset.hub_id, preset.revision) == ("bigscience/bloom-560m", "ac2ae5fab2ce3f9f40dc79b5ca9f637430d24971")


def test_a_preset_without_published_weights_names_no_hub_id() -> None:
    assert PRESETS["opt-350m"].hub_id is None
    assert all(PRESETS[name].hub_id is None for name in TINY)


def test_the_count_of_a_folder_is_read_from_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom", "vocab_size": 100, "hidden_size": 8, "n_layer": 1}))
    assert parameter_count(str(tmp_path)) == 100 * 8 + 12 * 64 + 13 * 8 + 4 * 8
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "hidden_size": 8}))
    assert parameter_count(str(tmp_path)) is None


def test_the_count_of_a_hub_id_is_unknown() -> None:
    assert parameter_count("org/model") is None


def test_presets_folders_and_hub_ids_are_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("bloom-tiny", str(tmp_path), "bigscience/bloom-560m"):
        assert model_problem(name) is None


def test_an_unknown_name_is_told_with_the_presets() -> None:
    problem = model_problem("blom-tiny")
    assert problem is not None
    assert "did you mean 'bloom-tiny'? presets: bloom-tiny, " in problem
    assert "did you mean" not in str(model_problem("something else"))


def test_a_folder_without_configuration_is_told(tmp_path: Path) -> None:
    assert "config.json" in str(model_problem(str(tmp_path)))


def test_a_model_folder_whose_configuration_is_no_json_is_refused_and_has_no_known_sizes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{'vocab_size': 7}", encoding="utf-8")
    assert "no JSON object" in str(model_problem(str(tmp_path)))
    assert (vocabulary_size(str(tmp_path)), parameter_count(str(tmp_path))) == (None, None)
    (tmp_path / "config.json").write_text('{"vocab_size": 7}', encoding="utf-8")
    assert (model_problem(str(tmp_path)), vocabulary_size(str(tmp_path))) == (None, 7)


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": "x"}, {"hidden_size": -1}, {"hidden_size": 7}, {"n_layer": True}, {"vocab_size": None}, {"model_type": []}],
)
def test_a_model_folder_with_odd_sizes_is_refused_and_has_no_known_sizes(change: dict[str, object], tmp_path: Path) -> None:
    right = {"model_type": "bloom", "vocab_size": 100, "hidden_size": 8, "n_layer": 1, "n_head": 2, "n_inner": None}
    (tmp_path / "config.json").write_text(json.dumps(right), encoding="utf-8")
    assert model_problem(str(tmp_path)) is None
    (tmp_path / "config.json").write_text(json.dumps(right | change), encoding="utf-8")
    assert "config.json of this folder has " in str(model_problem(str(tmp_path)))
    assert (vocabulary_size(str(tmp_path)), parameter_count(str(tmp_path))) == (None, None)


def test_a_home_folder_that_there_is_not_is_told() -> None:
    assert model_problem("~nouser/x") == "~nouser/x: there is no such home folder; seen: ~nouser; a path without ~ would be right"
    assert parameter_count("~nouser/x") is None


def test_presets_import_no_torch() -> None:
    code = "import sys, bench.models.presets; print('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
