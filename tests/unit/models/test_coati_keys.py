"""Old state dicts, as ColossalAI-Chat v0.2.8 wrote them, become checkpoints of today, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.cell import cell_from_json
from bench.checkpoint import load_checkpoint
from bench.errors import CheckpointError
from bench.models.build import build_policy, build_scorer
from bench.models.coati_keys import convert_coati
from bench.trial import make_trial

MODELS = pytest.mark.parametrize("model", ["bloom-tiny", "llama-tiny", "gpt2-tiny", "opt-tiny"])


def build(model: str, *, scorer: bool = False, base_seed: int = 42) -> Any:
    cell = cell_from_json({"stage": "rm", "model": model, "strategy": "naive", "steps": 1, "base_seed": base_seed})
    trial = make_trial(cell, 0, work="unused")
    return (build_scorer(trial, fresh_head=True, source="policy") if scorer else build_policy(trial)).eval()


def outputs(module: Any) -> torch.Tensor:
    ids_BT = torch.arange(12).reshape(2, 6) + 5
    with torch.no_grad():
        output = module(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
    return output if isinstance(output, torch.Tensor) else output.logits


def with_lora(state: dict[str, torch.Tensor], layers: list[str], rank: int) -> dict[str, torch.Tensor]:
    """`state` with the adapters of coati's LoraLinear on some layers."""
    generator = torch.Generator().manual_seed(1)
    adapted = dict(state)
    for layer in layers:
        out, width = state[f"{layer}.weight"].shape
        adapted[f"{layer}.lora_A"] = torch.randn(rank, width, generator=generator) * 0.1
        adapted[f"{layer}.lora_B"] = torch.randn(out, rank, generator=generator) * 0.1
    return adapted


@MODELS
@pytest.mark.parametrize("prefix", ["", "model."])
def test_an_actor_and_transformers_own_names_become_a_language_model(model: str, prefix: str, tmp_path: Path) -> None:
    old = build(model, base_seed=7)
    torch.save({f"{prefix}{name}": tensor for name, tensor in old.state_dict().items()}, tmp_path / "old.pt")
    done = convert_coati(tmp_path / "old.pt", tmp_path / "new", config=old.config, stage="sft")
    assert (done["kind"], done["matched"], done["lora"]) == ("language-model", len(old.state_dict()), 0)
    assert torch.allclose(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()), outputs(old), atol=1e-6)


@MODELS
def test_a_reward_model_keeps_its_head_and_tells_its_bias(model: str, tmp_path: Path) -> None:
    old = build(model, scorer=True, base_seed=7)
    torch.save({**old.state_dict(), "value_head.bias": torch.tensor([0.25])}, tmp_path / "old.pt")
    done = convert_coati(tmp_path / "old.pt", tmp_path / "new", config=old.config, stage="rm")
    assert (done["kind"], done["left_out"]) == ("scorer", {"value_head.bias": 0.25})
    fresh = build(model, scorer=True)
    load_checkpoint(fresh, tmp_path / "new", part="all")
    assert torch.allclose(outputs(fresh), outputs(old), atol=1e-6)


def test_adapters_are_merged_with_one_over_rank_also_on_the_tied_head(tmp_path: Path) -> None:
    old = build("bloom-tiny", base_seed=7)
    layers = ["transformer.h.0.self_attention.dense", "transformer.h.1.mlp.dense_h_to_4h", "lm_head"]
    state = with_lora(old.state_dict(), layers, rank=4)
    torch.save({f"model.{name}": tensor for name, tensor in state.items()}, tmp_path / "old.pt")
    assert convert_coati(tmp_path / "old.pt", tmp_path / "new", config=old.config, stage="sft")["lora"] == 4
    live = AutoModelForCausalLM.from_config(type(old.config).from_dict({**old.config.to_dict(), "tie_word_embeddings": False})).eval()
    live.load_state_dict(old.state_dict())
    for layer in layers:
        live.get_submodule(layer).weight.data += state[f"{layer}.lora_B"] @ state[f"{layer}.lora_A"] / 4
    assert torch.allclose(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()), outputs(live), atol=1e-5)


def test_the_adapter_of_a_critics_head_is_merged(tmp_path: Path) -> None:
    old = build("bloom-tiny", scorer=True)
    state = with_lora(old.state_dict(), ["value_head", "model.h.0.self_attention.dense"], rank=2)
    torch.save(state, tmp_path / "old.pt")
    convert_coati(tmp_path / "old.pt", tmp_path / "new", config=old.config, stage="rm")
    fresh = build("bloom-tiny", scorer=True, base_seed=9)
    load_checkpoint(fresh, tmp_path / "new", part="all")
    wanted = old.value_head.weight + state["value_head.lora_B"] @ state["value_head.lora_A"] / 2
    assert torch.allclose(fresh.value_head.weight, wanted, atol=1e-6)


def test_weights_of_another_architecture_match_nothing_and_are_refused(tmp_path: Path) -> None:
    state = build("llama-tiny").state_dict()
    del state["lm_head.weight"]  # the one name that both have
    torch.save(state, tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match="no tensor matches GPT2LMHeadModel"):
        convert_coati(tmp_path / "old.pt", tmp_path / "new", config=build("gpt2-tiny").config, stage="sft")
    assert not (tmp_path / "new").exists()


def test_missing_and_unexpected_names_are_told_and_nothing_is_written(tmp_path: Path) -> None:
    old = build("bloom-tiny")
    state = {f"model.{name}": tensor for name, tensor in old.state_dict().items() if "ln_f.bias" not in name}
    torch.save({**state, "model.transformer.extra": torch.zeros(2)}, tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match=r"1 missing: transformer\.ln_f\.bias; 1 unexpected: transformer\.extra"):
        convert_coati(tmp_path / "old.pt", tmp_path / "new", config=old.config, stage="sft")
    assert not (tmp_path / "new").exists()


def test_adapters_of_several_ranks_are_refused(tmp_path: Path) -> None:
    old = build("bloom-tiny")
    state = with_lora(with_lora(old.state_dict(), ["transformer.h.0.self_attention.dense"], 2), ["transformer.h.1.self_attention.dense"], 4)
    torch.save(state, tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match=r"several ranks; seen: \[2, 4\]"):
        convert_coati(tmp_path / "old.pt", tmp_path / "new", config=old.config, stage="sft")
