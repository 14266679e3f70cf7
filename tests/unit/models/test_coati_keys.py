"""Old state dicts, as ColossalAI-Chat v0.2.8 wrote them, become checkpoints of today and the other way round, whole or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bench.cell import cell_from_json
from bench.checkpoint import load_checkpoint, save_checkpoint
from bench.cli import _exit_code
from bench.errors import BenchError, CheckpointError, UserError
from bench.models.build import add_lora, build_policy, build_scorer
from bench.models.convert import convert, report_text
from bench.models.fit import fitting_models
from bench.models.inspection import inspect_checkpoint, inspection_text
from bench.models.tokenizer import train_tokenizer
from bench.trial import make_trial
from bench.weights_file import tensor_shapes

MODELS = pytest.mark.parametrize("model", ["bloom-tiny", "llama-tiny", "gpt2-tiny", "opt-tiny"])
COATI = "model."


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


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def actor_state(model: str, prefix: str = COATI) -> dict[str, torch.Tensor]:
    return prefixed(prefix, build(model, base_seed=7).state_dict())


def equal(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def loaded(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


# -- every prefix ----------------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.model.", "model.model."])
def test_a_language_model_is_found_under_any_prefix(model: str, prefix: str, tmp_path: Path) -> None:
    old = build(model, base_seed=7)
    torch.save(actor_state(model, prefix), tmp_path / "old.pt")
    done = convert(tmp_path / "old.pt", tmp_path / "new", to="folder", model=model)
    assert (done["kind"], done["prefix"], done["lora"]) == ("language-model", prefix, None)
    assert (done["matched"], done["missing"], done["unexpected"]) == (len(old.state_dict()), [], [])
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()), outputs(old))


@MODELS
@pytest.mark.parametrize("prefix", ["", "model.", "module."])
def test_a_reward_model_keeps_its_head_under_any_prefix(model: str, prefix: str, tmp_path: Path) -> None:
    """Also `model.value_head.weight`, which a published snippet made of every name and then lost without an error."""
    old = build(model, scorer=True, base_seed=7)
    torch.save(prefixed(prefix, {**old.state_dict(), "value_head.bias": torch.tensor([0.25])}), tmp_path / "old.pt")
    done = convert(tmp_path / "old.pt", tmp_path / "new", to="folder", model=model)
    assert (done["kind"], done["value_head_bias"]) == ("scorer", 0.25)
    fresh = build(model, scorer=True)
    load_checkpoint(fresh, tmp_path / "new", part="all")
    assert torch.equal(outputs(fresh), outputs(old))


@pytest.mark.parametrize("model", ["bloom-tiny", "gpt2-tiny", "opt-tiny"])
def test_a_bare_backbone_of_a_tied_model_is_a_language_model(model: str, tmp_path: Path) -> None:
    old = build(model, base_seed=7)
    torch.save(old.base_model.state_dict(), tmp_path / "old.pt")
    convert(tmp_path / "old.pt", tmp_path / "new", to="folder", model=model)
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()), outputs(old))


def test_a_bare_backbone_with_a_head_of_its_own_is_told_to_lack_it(tmp_path: Path) -> None:
    torch.save(build("llama-tiny").base_model.state_dict(), tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match=r"old\.pt: .*1 missing: lm_head\.weight"):
        convert(tmp_path / "old.pt", tmp_path / "new", to="folder", model="llama-tiny")


def test_a_critic_around_a_whole_language_model_loses_that_models_head(tmp_path: Path) -> None:
    """LLaMA's critic of v0.2.8."""
    old = build("llama-tiny", scorer=True, base_seed=7)
    whole = build("llama-tiny", base_seed=7)
    torch.save({**prefixed("model.", whole.state_dict()), "value_head.weight": old.value_head.weight.data}, tmp_path / "old.pt")
    done = convert(tmp_path / "old.pt", tmp_path / "new", to="folder", model="llama-tiny")
    assert done["left_out"] == ["lm_head.weight"]
    fresh = build("llama-tiny", scorer=True)
    load_checkpoint(fresh, tmp_path / "new", part="all")
    assert torch.equal(outputs(fresh), outputs(old))


def test_constants_that_older_versions_stored_are_left_out_and_told(tmp_path: Path) -> None:
    constants = {f"model.transformer.h.{layer}.attn.{name}": torch.ones(1) for layer in (0, 1) for name in ("bias", "masked_bias")}
    torch.save(actor_state("gpt2-tiny") | constants, tmp_path / "old.pt")
    assert convert(tmp_path / "old.pt", tmp_path / "new", to="folder", model="gpt2-tiny")["left_out"] == sorted(constants)


# -- both ways -------------------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_actor_comes_back_exactly(model: str, dtype: torch.dtype, tmp_path: Path) -> None:
    old = {name: tensor.to(dtype) for name, tensor in actor_state(model).items()}
    torch.save(old, tmp_path / "old.pt")
    convert(tmp_path / "old.pt", tmp_path / "folder", to="folder", model=model)
    convert(tmp_path / "folder", tmp_path / "back.pt", to="actor")
    assert equal(loaded(tmp_path / "back.pt"), old)


@MODELS
@pytest.mark.parametrize("form", ["reward-model", "critic"])
def test_a_scorer_comes_back_exactly_with_its_bias(model: str, form: Any, tmp_path: Path) -> None:
    old = {**build(model, scorer=True, base_seed=7).state_dict(), "value_head.bias": torch.tensor([0.3])}
    torch.save(old, tmp_path / "old.pt")
    convert(tmp_path / "old.pt", tmp_path / "folder", to="folder", model=model)
    convert(tmp_path / "folder", tmp_path / "back.pt", to=form)
    assert equal(loaded(tmp_path / "back.pt"), old)


@MODELS
def test_a_hugging_face_folder_becomes_an_actor_and_comes_back_exactly(model: str, tmp_path: Path) -> None:
    old = build(model, base_seed=7)
    old.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    convert(tmp_path / "hf", tmp_path / "actor.pt", to="actor")
    assert equal(loaded(tmp_path / "actor.pt"), prefixed("model.", old.state_dict()))
    convert(tmp_path / "actor.pt", tmp_path / "back", to="folder", model=str(tmp_path / "hf"))
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict(), old.state_dict())


def test_a_vocabulary_of_another_size_is_taken_over_and_told(tmp_path: Path) -> None:
    """v0.2.8 added a padding token to LLaMA's 32000."""
    old = build("llama-tiny")
    old.resize_token_embeddings(4097)
    torch.save(prefixed("model.", old.state_dict()), tmp_path / "old.pt")
    assert convert(tmp_path / "old.pt", tmp_path / "new", to="folder", model="llama-tiny")["vocabulary"] == 4097
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()), outputs(old))


# -- adapters --------------------------------------------------------------------------------------------------------

BLOOM_LAYERS = ["transformer.h.0.self_attention.dense", "transformer.h.1.mlp.dense_h_to_4h", "lm_head"]


def live_bloom(state: dict[str, torch.Tensor], rank: int) -> Any:
    """The model that the adapters of coati's LoraLinear (scaling 1 / rank) make of a tied BLOOM: its head is its own."""
    old = build("bloom-tiny", base_seed=7)
    live = AutoModelForCausalLM.from_config(type(old.config).from_dict({**old.config.to_dict(), "tie_word_embeddings": False})).eval()
    live.load_state_dict(old.state_dict())
    for layer in BLOOM_LAYERS:
        live.get_submodule(layer).weight.data += state[f"{layer}.lora_B"] @ state[f"{layer}.lora_A"] / rank
    return live


def adapted_bloom(tmp_path: Path, rank: int = 4) -> dict[str, torch.Tensor]:
    state = with_lora(build("bloom-tiny", base_seed=7).state_dict(), BLOOM_LAYERS, rank)
    torch.save(prefixed("model.", state), tmp_path / "old.pt")
    return state


def test_adapters_are_merged_with_one_over_rank_also_on_the_tied_head(tmp_path: Path) -> None:
    state = adapted_bloom(tmp_path)
    done = convert(tmp_path / "old.pt", tmp_path / "new", to="folder", model="bloom-tiny")
    assert done["lora"] == {"rank": 4, "modules": 3, "became": "merged"}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    assert torch.allclose(outputs(merged), outputs(live_bloom(state, 4)), atol=1e-5)
    assert torch.equal(merged.get_input_embeddings().weight, state["transformer.word_embeddings.weight"])


def test_upstreams_way_of_merging_a_tied_head_is_another_model(tmp_path: Path) -> None:
    """There the merged head was the input embedding as well; what such a file holds is not the model that was trained."""
    state = adapted_bloom(tmp_path)
    upstream = build("bloom-tiny", base_seed=7)
    for layer in BLOOM_LAYERS:
        upstream.get_submodule(layer).weight.data += state[f"{layer}.lora_B"] @ state[f"{layer}.lora_A"] / 4
    assert upstream.lm_head.weight is upstream.get_input_embeddings().weight
    assert (outputs(upstream) - outputs(live_bloom(state, 4))).abs().max() > 1e-2


def test_adapters_are_split_off_as_peft_reads_them(tmp_path: Path) -> None:
    state = adapted_bloom(tmp_path)
    convert(tmp_path / "old.pt", tmp_path / "new", to="folder", model="bloom-tiny", lora="split")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "base").eval()
    assert torch.equal(outputs(base), outputs(build("bloom-tiny", base_seed=7)))
    assert torch.allclose(
        outputs(PeftModel.from_pretrained(base, str(tmp_path / "new" / "adapter"))), outputs(live_bloom(state, 4)), atol=1e-5
    )


def test_adapters_are_refused_if_asked_to(tmp_path: Path) -> None:
    adapted_bloom(tmp_path)
    with pytest.raises(CheckpointError, match="LoRA layers on 3 modules"):
        convert(tmp_path / "old.pt", tmp_path / "new", to="folder", model="bloom-tiny", lora="refuse")


def test_adapters_of_today_become_those_of_coati_and_come_back(tmp_path: Path) -> None:
    """Alpha is 1 there, so B carries ours."""
    cell = cell_from_json({"stage": "sft", "model": "llama-tiny", "strategy": "naive", "steps": 1, "lora_rank": 4, "lora_alpha": 12})
    live = build_policy(make_trial(cell, 0, work="unused")).eval()
    facts = add_lora(live, cell, seed=1)
    for name, parameter in live.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    save_checkpoint(
        tmp_path / "ours", state=live.state_dict(), config=live.config, stage="sft", tokenizer=None, started_from={}, lora=facts
    )
    convert(tmp_path / "ours", tmp_path / "old.pt", to="actor", lora="split")
    stored = loaded(tmp_path / "old.pt")
    layer = "model.model.layers.0.mlp.up_proj"
    assert torch.allclose(stored[f"{layer}.weight"], live.model.layers[0].mlp.up_proj.base_layer.weight, atol=1e-6)
    assert stored[f"{layer}.lora_A"].shape == (4, 64)
    convert(tmp_path / "old.pt", tmp_path / "back", to="folder", model="llama-tiny")
    assert torch.allclose(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()), outputs(live), atol=1e-5)


def test_the_adapter_of_a_critics_head_is_merged(tmp_path: Path) -> None:
    old = build("bloom-tiny", scorer=True)
    state = with_lora(old.state_dict(), ["value_head", "model.h.0.self_attention.dense"], rank=2)
    torch.save(state, tmp_path / "old.pt")
    convert(tmp_path / "old.pt", tmp_path / "new", to="folder", model="bloom-tiny")
    fresh = build("bloom-tiny", scorer=True, base_seed=9)
    load_checkpoint(fresh, tmp_path / "new", part="all")
    wanted = old.value_head.weight + state["value_head.lora_B"] @ state["value_head.lora_A"] / 2
    assert torch.allclose(fresh.value_head.weight, wanted, atol=1e-6)


# -- refusals --------------------------------------------------------------------------------------------------------


def bad_inputs() -> dict[str, tuple[Any, dict[str, Any], str]]:
    """Name -> (state dict or raw bytes, arguments, what is told)."""
    bloom, llama = actor_state("bloom-tiny"), build("llama-tiny").state_dict()
    lacking = {name: tensor for name, tensor in bloom.items() if "ln_f.bias" not in name}
    without_head = {name: tensor for name, tensor in llama.items() if name != "lm_head.weight"}  # the one name that all have
    dense = ["transformer.h.0.self_attention.dense", "transformer.h.1.self_attention.dense"]
    two_ranks = with_lora(with_lora(build("bloom-tiny").state_dict(), dense[:1], 2), dense[1:], 4)
    half = {name: tensor for name, tensor in with_lora(build("bloom-tiny").state_dict(), dense[:1], 2).items() if "lora_B" not in name}
    scorer = build("bloom-tiny", scorer=True).state_dict()
    bloom_is = {"model": "bloom-tiny"}
    return {
        "another architecture": (without_head, {"model": "gpt2-tiny"}, "no tensor matches GPT2LMHeadModel"),
        "missing and unexpected": (
            lacking | {"model.transformer.extra": torch.zeros(2)}, bloom_is,
            r"1 missing: transformer\.ln_f\.bias; 1 unexpected: model\.transformer\.extra",
        ),
        "another shape": (bloom | {"model.transformer.ln_f.bias": torch.zeros(3)}, bloom_is, r"ln_f\.bias \[3\] for \[64\]"),
        "several ranks": (two_ranks, bloom_is, r"several ranks; seen: \[2, 4\]"),
        "half an adapter": (half, bloom_is, "without their other half"),
        "two heads": (scorer | {"model.value_head.weight": torch.zeros(1, 64)}, bloom_is, "two value heads"),
        "a head wanted": (bloom, {**bloom_is, "to": "critic"}, "a language model has no value head; `--to actor` would be right"),
        "a head too many": (scorer, {**bloom_is, "to": "actor"}, "`--to reward-model` would be right"),
        "not a pickle": (b"nothing", bloom_is, "no state dict"),
        "code in a pickle": ({"a": print}, bloom_is, "no state dict"),
        "unknown model": (bloom, {"model": "bloom-gigantic"}, "no preset and no folder with config.json"),
        "unknown form": (bloom, {"to": "pdf"}, "no such form"),
        "no model fits": (lacking, {}, "it is not clear which model"),
    }  # fmt: skip


BAD = bad_inputs()


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_converted_is_told_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    content, arguments, told = BAD[name]
    if isinstance(content, bytes):
        (tmp_path / "old.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "old.pt")
    with pytest.raises(UserError, match=told):
        convert(tmp_path / "old.pt", tmp_path / "new", **{"to": "folder", **arguments})
    assert [path.name for path in tmp_path.iterdir()] == ["old.pt"]


@pytest.mark.parametrize("to", ["folder", "actor"])
def test_a_write_that_fails_leaves_nothing(to: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(actor_state("bloom-tiny"), tmp_path / "old.pt")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr("torch.save", full)
    with pytest.raises(OSError, match="no space left"):
        convert(tmp_path / "old.pt", tmp_path / "new", to=to, model="bloom-tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["old.pt"]


def test_the_tokenizer_goes_along_and_one_that_is_none_is_refused(tmp_path: Path) -> None:
    train_tokenizer(["some text"] * 5, 300, tmp_path / "words")
    torch.save(actor_state("bloom-tiny"), tmp_path / "old.pt")
    assert (
        convert(tmp_path / "old.pt", tmp_path / "new", to="folder", model="bloom-tiny", tokenizer=tmp_path / "words")["tokenizer"] is True
    )
    assert (tmp_path / "new" / "tokenizer.json").is_file()
    done = convert(tmp_path / "old.pt", tmp_path / "without", to="folder", model="bloom-tiny")
    assert "no tokenizer lay beside the weights" in report_text(done, tmp_path / "without")
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        convert(tmp_path / "old.pt", tmp_path / "third", to="folder", model="bloom-tiny", tokenizer=tmp_path)
    assert not (tmp_path / "third").exists()


def test_something_that_is_there_already_is_never_overwritten(tmp_path: Path) -> None:
    torch.save(actor_state("bloom-tiny"), tmp_path / "old.pt")
    with pytest.raises(UserError, match="nothing is overwritten"):
        convert(tmp_path / "old.pt", tmp_path / "old.pt", to="actor", model="bloom-tiny")


# -- inspection ------------------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("form", ["pt", "safetensors", "folder", "index"])
def test_inspection_finds_the_model_in_any_kind_of_file(model: str, form: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    module = build(model, base_seed=7)
    path = {"pt": "old.pt", "safetensors": "w.safetensors", "folder": "hf", "index": "hf/model.safetensors.index.json"}[form]
    if form == "pt":
        torch.save(prefixed("model.", module.state_dict()), tmp_path / path)
    elif form == "safetensors":
        save_file({name: tensor.clone() for name, tensor in module.state_dict().items()}, tmp_path / path)
    else:
        module.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
        (tmp_path / "hf" / "config.json").unlink()
    seen = inspect_checkpoint(tmp_path / path)
    assert len(seen["fits"]) == 1
    assert seen["fits"][0].startswith(f"language-model {model}")
    assert set(seen["dtypes"]) <= {"F32", "torch.float32"}


def test_inspection_tells_scorers_vocabularies_and_prefixes(tmp_path: Path) -> None:
    module = build("llama-tiny", scorer=True)
    module.model.resize_token_embeddings(4097)
    torch.save(prefixed("module.", module.state_dict()), tmp_path / "old.pt")
    seen = inspect_checkpoint(tmp_path / "old.pt")
    assert seen["fits"] == ["scorer llama-tiny with vocabulary 4097, under the prefix 'module.'"]
    assert seen["value_head"]
    text = inspection_text(seen, tmp_path / "old.pt")
    assert re.search(r"module\.value_head\.weight +torch\.float32 \[1, 64\]", text)


def test_shapes_of_real_sizes_fit_their_presets_without_any_weights() -> None:
    from bench.models.fit import meta_model, named_config

    for preset in ("bloom-560m", "llama-7b", "gpt2-s", "opt-1.3b"):
        shapes = {f"model.{name}": ("F16", list(it.shape)) for name, it in meta_model(named_config(preset)).state_dict().items()}
        assert [fit.model for fit in fitting_models(shapes)] == [preset]


def test_a_missing_shard_is_told(tmp_path: Path) -> None:
    build("bloom-tiny").save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    min((tmp_path / "hf").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="shards are missing"):
        inspect_checkpoint(tmp_path / "hf")


def test_inspection_reads_shapes_only(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2, 3, dtype=torch.float16)}, tmp_path / "old.pt")
    assert tensor_shapes([tmp_path / "old.pt"]) == {"a": ("torch.float16", [2, 3])}


# -- the command line ------------------------------------------------------------------------------------------------


def test_the_verbs_print_what_was_found_and_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapted_bloom(tmp_path)
    assert _exit_code(["checkpoint", "inspect", str(tmp_path / "old.pt")]) == 0
    assert "fits: language-model bloom-tiny, under the prefix 'model.'" in capsys.readouterr().out
    assert _exit_code(["checkpoint", "convert", str(tmp_path / "old.pt"), str(tmp_path / "new")]) == 0
    told = capsys.readouterr().out
    assert "matched 30 tensors under the prefix 'model.'; missing 0; unexpected 0" in told
    assert "LoRA layers of rank 4 on 3 modules: merged" in told
    assert _exit_code(["checkpoint", "convert", str(tmp_path / "new"), str(tmp_path / "back.pt"), "--to", "actor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["matched"] == 30


@pytest.mark.parametrize(
    "arguments", [["absent.pt", "new"], ["empty", "new"], ["bad.json.index.json", "new"], ["bad.pt", "new", "--to", "actor"]]
)
def test_bad_input_ends_with_exit_code_2_and_one_line(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json.index.json").write_text("{}")
    (tmp_path / "bad.pt").write_bytes(b"PK\3\4 torn")
    paths = [str(tmp_path / arguments[0]), str(tmp_path / arguments[1]), *arguments[2:]]
    assert _exit_code(["checkpoint", "convert", *paths]) == 2
    told = capsys.readouterr().err
    assert told.startswith("coati-bench: ")
    assert "would be right" in told
    assert "Traceback" not in told
    assert issubclass(CheckpointError, BenchError)
    assert not (tmp_path / "new").exists()
