"""The weight format between the stages: what others can load, what is refused, and what its hash stands for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.cell import cell_from_json
from bench.checkpoint import (
    checkpoint_sha256,
    load_checkpoint,
    read_facts,
    save_checkpoint,
)
from bench.errors import CheckpointError
from bench.models.build import add_lora, build_policy, build_scorer
from bench.models.inspection import inspect_checkpoint
from bench.models.tokenizer import train_tokenizer
from bench.trial import make_trial
from bench.weights_file import tensor_digest

TIED, UNTIED = ["bloom-tiny", "gpt2-tiny", "opt-tiny", "qwen2-tiny"], ["llama-tiny", "llama3-tiny", "mistral-tiny"]
every_model = pytest.mark.parametrize("model", TIED + UNTIED)


def build(model: str, *, lora_rank: int = 0, scorer: bool = False, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A model with adapters that do something, and their facts."""
    cell = cell_from_json({"stage": "sft", "model": model, "strategy": "naive", "lora_rank": lora_rank, "steps": 1, **changes})
    trial = make_trial(cell, 0, work="unused")
    module = build_scorer(trial, fresh_head=True, source="policy") if scorer else build_policy(trial)
    facts = add_lora(module, cell, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return module.eval(), facts


def save(module: Any, folder: Path, facts: dict[str, Any] | None = None, **changes: Any) -> str:
    content = {
        "state": module.state_dict(),
        "config": module.config,
        "stage": "sft",
        "tokenizer": None,
        "started_from": {},
        "lora": facts or {},
    }
    return save_checkpoint(folder, **{**content, **changes})


def logits(module: Any) -> torch.Tensor:
    ids_BT = torch.arange(20).reshape(2, 10) + 5
    with torch.no_grad():
        output = module(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
    return output if isinstance(output, torch.Tensor) else output.logits


# ---------------------------------------------------------------------------------------------------------- merged and live


@every_model
def test_merged_weights_give_the_live_logits_in_transformers(model: str, tmp_path: Path) -> None:
    live, facts = build(model, lora_rank=8)
    save(live, tmp_path / "weights", facts)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "weights").eval()
    assert (logits(loaded) - logits(live)).abs().max() < 1e-5
    assert (logits(build(model)[0]) - logits(live)).abs().max() > 0.1


@every_model
def test_the_adapter_folder_gives_the_live_logits_in_peft(model: str, tmp_path: Path) -> None:
    live, facts = build(model, lora_rank=8)
    save(live, tmp_path / "weights", facts)
    base, _ = build(model)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "weights" / "adapter")).eval()
    assert (logits(loaded) - logits(live)).abs().max() < 1e-5


@pytest.mark.parametrize("model", TIED)
def test_merging_leaves_a_tied_embedding_alone(model: str, tmp_path: Path) -> None:
    """Upstream merged an adapter of the tied head into the input embedding, too."""
    live, facts = build(model, lora_rank=8)
    embedding = live.get_input_embeddings().weight.clone()
    save(live, tmp_path / "weights", facts)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "weights")
    assert torch.equal(loaded.get_input_embeddings().weight, embedding)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_an_adapter_on_a_tied_head_unties_it_and_gives_the_live_logits(tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    live, _ = build("bloom-tiny")
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head"]), live)
    live.lm_head.lora_B["default"].weight.data.normal_(0, 0.1)
    facts = {"rank": 4, "alpha": 8, "scaling": 2.0, "fan_in_fan_out": False, "targets": ["lm_head"]}
    save(live.eval(), tmp_path / "weights", facts)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "weights").eval()
    assert (logits(loaded) - logits(live)).abs().max() < 1e-5
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(loaded.get_input_embeddings().weight, live.get_input_embeddings().weight)
    assert live.config.tie_word_embeddings


def test_a_small_change_of_bf16_weights_is_not_rounded_away(tmp_path: Path) -> None:
    live, facts = build("llama-tiny", lora_rank=2)
    for name, parameter in live.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1e-4)
    half = live.to(torch.bfloat16)
    save(half, tmp_path / "weights", facts)
    stored = load_file(tmp_path / "weights" / "model.safetensors")
    layer = half.model.layers[0].mlp.up_proj
    change = (layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()) * facts["scaling"]
    assert torch.equal(stored["model.layers.0.mlp.up_proj.weight"], layer.base_layer.weight.float() + change)
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------------------------------- format


@pytest.mark.parametrize("model", TIED)
def test_a_tied_head_is_noted_and_not_stored(model: str, tmp_path: Path) -> None:
    module, _ = build(model)
    save(module, tmp_path / "weights")
    stored = load_file(tmp_path / "weights" / "model.safetensors")
    assert "lm_head.weight" not in stored
    tied = read_facts(tmp_path / "weights")["tied"]
    assert torch.equal(stored[tied["lm_head.weight"]], module.lm_head.weight)


@every_model
def test_a_scorer_is_stored_under_the_names_of_the_language_model(model: str, tmp_path: Path) -> None:
    scorer, facts = build(model, lora_rank=4, scorer=True)
    save(scorer, tmp_path / "weights", facts, stage="rm")
    stored = set(load_file(tmp_path / "weights" / "model.safetensors"))
    language_model = {name for name in build(model)[0].state_dict() if name != "lm_head.weight"}
    assert stored == language_model | {"value_head.weight"}
    fresh, _ = build(model, scorer=True)
    load_checkpoint(fresh, tmp_path / "weights", part="all")
    assert (logits(fresh) - logits(scorer)).abs().max() < 1e-5


def test_the_facts_stand_beside_and_inside_the_weights(tmp_path: Path) -> None:
    module, facts = build("bloom-tiny", lora_rank=4)
    sha256 = save(module, tmp_path / "weights", facts, started_from={"policy": "0" * 64})
    beside, inside = read_facts(tmp_path / "weights"), inspect_checkpoint(tmp_path / "weights")["facts"]
    assert beside["started_from"] == inside["started_from"] == {"policy": "0" * 64}
    assert beside["lora"] == inside["lora"] == facts
    assert (beside["stage"], beside["kind"], beside["sha256"]) == ("sft", "language-model", sha256)


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    train_tokenizer(["some text"] * 5, 300, tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    save(build("bloom-tiny")[0], tmp_path / "weights", tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "weights")("some text")["input_ids"] == tokenizer("some text")["input_ids"]


def test_an_older_checkpoint_is_replaced_and_nothing_is_left_behind(tmp_path: Path) -> None:
    save(build("bloom-tiny", lora_rank=4)[0], tmp_path / "weights", build("bloom-tiny", lora_rank=4)[1])
    first = checkpoint_sha256(tmp_path / "weights")
    second = save(build("llama-tiny")[0], tmp_path / "weights")
    assert second == checkpoint_sha256(tmp_path / "weights") != first
    assert not (tmp_path / "weights" / "adapter").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_a_failed_save_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = save(build("bloom-tiny")[0], tmp_path / "weights")
    monkeypatch.setattr("safetensors.torch.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space left"):
        save(build("llama-tiny")[0], tmp_path / "weights")
    assert checkpoint_sha256(tmp_path / "weights") == sha256
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


# --------------------------------------------------------------------------------------------------------------------- hash


def test_the_hash_stands_for_weights_architecture_and_tokenizer(tmp_path: Path) -> None:
    module, _ = build("bloom-tiny")
    first = save(module, tmp_path / "a")
    assert save(module, tmp_path / "b", started_from={"policy": "f" * 64}, stage="rm") == first
    module.transformer.ln_f.bias.data[3] += 1e-6
    assert save(module, tmp_path / "c") != first
    train_tokenizer(["text"] * 5, 300, tmp_path / "tokenizer")
    shutil.copy(tmp_path / "tokenizer" / "tokenizer.json", tmp_path / "a")
    assert checkpoint_sha256(tmp_path / "a") != first


def test_the_hash_does_not_see_how_tensors_are_split_over_files(tmp_path: Path) -> None:
    first = save(build("llama-tiny")[0], tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    names = sorted(tensors)
    (tmp_path / "a" / "model.safetensors").unlink()
    save_file({name: tensors[name] for name in names[::2]}, tmp_path / "a" / "model-1.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, tmp_path / "a" / "model-2.safetensors", metadata={"any": "thing"})
    assert checkpoint_sha256(tmp_path / "a") == first
    fresh, _ = build("llama-tiny", base_seed=9)
    load_checkpoint(fresh, tmp_path / "a", part="all")
    assert tensor_digest(fresh.named_parameters()) == tensor_digest(build("llama-tiny")[0].named_parameters())


def test_hashing_needs_no_torch_and_knows_tokenizers(tmp_path: Path) -> None:
    train_tokenizer(["text"] * 5, 300, tmp_path / "tokenizer")
    sha256 = save(build("bloom-tiny")[0], tmp_path / "weights")
    paths = (str(tmp_path / "weights"), str(tmp_path / "tokenizer"))
    code = (
        "import sys; from pathlib import Path; from bench.checkpoint import checkpoint_sha256\n"
        f"print(*(checkpoint_sha256(Path(path)) for path in {paths!r}), 'torch' in sys.modules)"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert seen == [sha256, checkpoint_sha256(tmp_path / "tokenizer"), "False"]


def test_a_folder_with_nothing_to_hash_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint or tokenizer; seen: notes\.txt; model\.safetensors or tokenizer\.json would be right"
    ):
        checkpoint_sha256(tmp_path)


@pytest.mark.parametrize("kept", [4, 100, -1000])
def test_a_cut_off_file_is_told(kept: int, tmp_path: Path) -> None:
    save(build("bloom-tiny")[0], tmp_path / "weights")
    path = tmp_path / "weights" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (no safetensors file|damaged or cut off)"):
        checkpoint_sha256(tmp_path / "weights")


# --------------------------------------------------------------------------------------------------------------- strict loads


def test_missing_unexpected_and_mismatched_names_are_all_told(tmp_path: Path) -> None:
    module, _ = build("bloom-tiny")
    save(module, tmp_path / "weights")
    path = tmp_path / "weights" / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.extra.weight"] = tensors.pop("transformer.ln_f.bias")
    tensors["transformer.ln_f.weight"] = torch.ones(3)
    save_file(tensors, path)
    before = tensor_digest(module.named_parameters())
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(module, tmp_path / "weights", part="all")
    text = str(error.value)
    assert "27 of 29 tensors match" in text
    assert "1 missing: transformer.ln_f.bias" in text
    assert "1 unexpected: transformer.extra.weight" in text
    assert "1 of another shape: transformer.ln_f.weight [3] for [64]" in text
    assert tensor_digest(module.named_parameters()) == before


def test_weights_of_another_model_match_nothing_and_are_refused(tmp_path: Path) -> None:
    save(build("llama-tiny")[0], tmp_path / "weights")
    with pytest.raises(CheckpointError, match="0 of 29 tensors match"):
        load_checkpoint(build("bloom-tiny")[0], tmp_path / "weights", part="all")


def test_a_backbone_is_read_from_either_kind_into_either_kind(tmp_path: Path) -> None:
    save(build("llama-tiny", base_seed=7)[0], tmp_path / "lm")
    save(build("llama-tiny", base_seed=7, scorer=True)[0], tmp_path / "rm")
    wanted = tensor_digest(build("llama-tiny", base_seed=7)[0].model.named_parameters())
    for folder in ("lm", "rm"):
        scorer, model = build("llama-tiny", scorer=True)[0], build("llama-tiny")[0]
        head, lm_head = scorer.value_head.weight.clone(), model.lm_head.weight.clone()
        load_checkpoint(scorer, tmp_path / folder, part="backbone")
        load_checkpoint(model, tmp_path / folder, part="backbone")
        assert tensor_digest(scorer.model.named_parameters()) == tensor_digest(model.model.named_parameters()) == wanted
        assert torch.equal(scorer.value_head.weight, head)
        assert torch.equal(model.lm_head.weight, lm_head)


def test_a_module_with_adapters_takes_the_base_weights(tmp_path: Path) -> None:
    other, _ = build("bloom-tiny", base_seed=7)
    save(other, tmp_path / "weights")
    adapted, _ = build("bloom-tiny", lora_rank=4)
    adapters = {name: tensor.clone() for name, tensor in adapted.state_dict().items() if "lora_" in name}
    load_checkpoint(adapted, tmp_path / "weights", part="all")
    state = adapted.state_dict()
    layer = "transformer.h.0.self_attention.dense"
    assert torch.equal(state[f"{layer}.base_layer.weight"], other.state_dict()[f"{layer}.weight"])
    assert all(torch.equal(state[name], tensor) for name, tensor in adapters.items())


def test_a_state_that_is_not_whole_is_not_saved(tmp_path: Path) -> None:
    module, _ = build("bloom-tiny")
    state = {name: tensor for name, tensor in module.state_dict().items() if "ln_f" not in name}
    with pytest.raises(CheckpointError, match=r"the state to save.*2 missing: transformer\.ln_f\.bias"):
        save(module, tmp_path / "weights", state=state)
    assert list(tmp_path.iterdir()) == []


def test_adapters_without_facts_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="LoRA layers, but no LoRA facts"):
        save(build("bloom-tiny", lora_rank=4)[0], tmp_path / "weights")


def test_a_folder_without_weights_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights; seen: an empty folder"):
        load_checkpoint(build("bloom-tiny")[0], tmp_path, part="all")


# ------------------------------------------------------------------------------------------------------------------- inspect


def test_inspection_tells_tensors_types_and_facts(tmp_path: Path) -> None:
    sha256 = save(build("bloom-tiny", scorer=True)[0].to(torch.bfloat16), tmp_path / "weights", stage="rm")
    seen = inspect_checkpoint(tmp_path / "weights")
    assert (seen["format"], seen["parameters"], seen["dtypes"]) == ("safetensors", 362_368 + 64, ["BF16"])
    assert seen["names"]["value_head.weight"] == {"dtype": "BF16", "shape": [1, 64]}
    assert seen["fits"][0].startswith("scorer ")
    assert seen["value_head"]
    assert seen["facts"]["stage"] == "rm"
    assert seen["sha256"] == sha256
    assert inspect_checkpoint(tmp_path / "weights" / "model.safetensors")["names"] == seen["names"]
    json.dumps(seen)


def test_a_pickled_state_dict_is_inspected_without_running_it(tmp_path: Path) -> None:
    torch.save({"model.h.0.lora_A": torch.zeros(2, 3), "value_head.weight": torch.zeros(1, 3)}, tmp_path / "old.pt")
    seen = inspect_checkpoint(tmp_path / "old.pt")
    assert (seen["format"], seen["parameters"], seen["lora"], seen["value_head"]) == ("pickle", 9, ["model.h.0.lora_A"], True)


class _Runs:
    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return (print, ("executed",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": _Runs()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="no state dict"):
        inspect_checkpoint(tmp_path / "evil.pt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"not a pickle", None])
def test_a_file_that_is_no_state_dict_is_told(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"no state dict|no such file"):
        inspect_checkpoint(path)


def test_a_pickle_with_more_than_tensors_is_told(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match="a dict of names and tensors would be right"):
        inspect_checkpoint(tmp_path / "old.pt")
