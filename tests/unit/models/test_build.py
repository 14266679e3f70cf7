"""Models: seeded, the same on every rank and under every strategy; heads, adapters and positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from bench.cell import cell_from_json
from bench.checkpoint import checkpoint_sha256, save_checkpoint
from bench.errors import CheckpointError, UserError
from bench.models.build import (
    Scorer,
    accepts_position_ids,
    add_lora,
    backbone,
    build_policy,
    build_scorer,
    build_tokenizer,
    counts,
    initial_sha256,
    lora_targets,
    position_ids,
)
from bench.models.presets import PRESETS
from bench.models.tokenizer import train_tokenizer
from bench.record import Input
from bench.trial import Trial, make_trial

TINY = sorted(name for name in PRESETS if name.endswith("tiny"))


def trial(model: str = "bloom-tiny", *, number: int = 0, starts: dict[str, Path] | None = None, **changes: Any) -> Trial:
    cell = cell_from_json({"stage": "sft", "model": model, "strategy": "naive", "steps": 1, "device": "cpu", **changes})
    inputs = [Input(name=role, path=str(path), sha256=checkpoint_sha256(path)) for role, path in (starts or {}).items()]
    return make_trial(cell, number, work="unused", starts=inputs)


def inputs_BT() -> dict[str, torch.Tensor]:
    ids_BT = torch.arange(20).reshape(2, 10) + 5
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}


def save(module: Any, folder: Path, lora: dict[str, Any] | None = None) -> Path:
    save_checkpoint(folder, state=module.state_dict(), config=module.config, stage="sft", tokenizer=None, started_from={}, lora=lora or {})
    return folder


# ------------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("model", TINY)
def test_random_weights_are_those_of_the_base_seed_alone(model: str) -> None:
    first = initial_sha256(build_policy(trial(model)))
    torch.manual_seed(99)
    assert initial_sha256(build_policy(trial(model, number=3, lora_rank=8))) == first
    assert initial_sha256(build_policy(trial(model, base_seed=43))) != first


def test_building_leaves_the_random_numbers_of_others_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_policy(trial())
    build_scorer(trial(), fresh_head=True, source="policy")
    assert torch.equal(torch.rand(3), expected)


def test_models_are_fp32_on_the_cpu_and_ready_to_train() -> None:
    model = build_policy(trial())
    assert {(parameter.dtype, parameter.device.type) for parameter in model.parameters()} == {(torch.float32, "cpu")}
    assert model.training


def test_a_start_gives_its_weights(tmp_path: Path) -> None:
    other = build_policy(trial(base_seed=7))
    loaded = build_policy(trial(starts={"policy": save(other, tmp_path / "start")}))
    assert initial_sha256(loaded) == initial_sha256(other)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_a_start_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    start = save(build_policy(trial("llama-tiny")), tmp_path / "start")
    with pytest.raises(CheckpointError, match=r"0 of \d+ tensors match.*missing.*transformer\.h\.0"):
        build_policy(trial("bloom-tiny", starts={"policy": start}))


def test_a_folder_of_transformers_is_a_model(tmp_path: Path) -> None:
    other = build_policy(trial("qwen2-tiny", base_seed=7))
    other.save_pretrained(tmp_path)
    loaded = build_policy(trial(str(tmp_path), weights="pretrained"))
    assert initial_sha256(loaded) == initial_sha256(other)
    fresh = build_policy(trial(str(tmp_path)))
    assert initial_sha256(fresh) == initial_sha256(build_policy(trial("qwen2-tiny")))


def test_dropout_of_a_foreign_model_is_switched_off(tmp_path: Path) -> None:
    other = build_policy(trial("gpt2-tiny"))
    other.config.resid_pdrop = other.config.attn_pdrop = 0.1
    other.save_pretrained(tmp_path)
    loaded = build_policy(trial(str(tmp_path), weights="pretrained"))
    assert (loaded.config.resid_pdrop, loaded.config.attn_pdrop) == (0.0, 0.0)


def test_a_model_that_cannot_be_had_offline_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub._is_offline_mode", True)
    with pytest.raises(UserError, match=r"configuration cannot be loaded.*huggingface-cli download someone/unknown"):
        build_policy(trial("someone/unknown", weights="pretrained"))


def test_pretrained_weights_of_an_unpublished_shape_are_told() -> None:
    with pytest.raises(UserError, match=r"bloom-tiny.*no weights or tokenizer of this shape are published.*would be right"):
        build_policy(trial(weights="pretrained"))


def test_a_name_that_is_no_model_is_told() -> None:
    with pytest.raises(UserError, match="no preset, model folder or hub id"):
        build_policy(trial("nonsense"))


# -------------------------------------------------------------------------------------------------------------------- scorer


@pytest.mark.parametrize("model", TINY)
def test_a_scorer_gives_one_fp32_score_a_position(model: str) -> None:
    scorer = build_scorer(trial(model), fresh_head=True, source="policy").to(torch.bfloat16)
    scores_BT = scorer(**inputs_BT())
    assert scores_BT.shape == (2, 10)
    assert scores_BT.dtype == torch.float32
    assert not any("lm_head" in name for name, _ in scorer.named_parameters())


def test_a_scorer_without_start_has_the_policys_backbone() -> None:
    scorer, policy = build_scorer(trial(), fresh_head=True, source="reward"), build_policy(trial())
    assert all(torch.equal(tensor, policy.transformer.state_dict()[name]) for name, tensor in scorer.model.state_dict().items())


def test_the_first_head_is_small_seeded_and_not_the_embeddings_numbers() -> None:
    scorer = build_scorer(trial(), fresh_head=True, source="policy")
    head = scorer.value_head.weight[0]
    assert head.std().item() == pytest.approx(1 / 65, rel=0.3)
    assert torch.equal(head, build_scorer(trial(number=4), fresh_head=True, source="policy").value_head.weight[0])
    first = scorer.model.word_embeddings.weight.flatten()[:64]
    assert abs(torch.corrcoef(torch.stack([head, first]))[0, 1].item()) < 0.5


def test_a_scorer_takes_backbone_and_head_from_the_start_it_is_told(tmp_path: Path) -> None:
    trained = build_scorer(trial(base_seed=7), fresh_head=True, source="policy")
    starts = {"reward": save(trained, tmp_path / "reward"), "policy": save(build_policy(trial(base_seed=8)), tmp_path / "policy")}
    reward = build_scorer(trial(starts=starts), fresh_head=False, source="reward")
    assert initial_sha256(reward) == initial_sha256(trained)
    critic = build_scorer(trial(starts=starts), fresh_head=True, source="reward")
    assert torch.equal(critic.model.word_embeddings.weight, trained.model.word_embeddings.weight)
    assert not torch.equal(critic.value_head.weight, trained.value_head.weight)
    from_policy = build_scorer(trial(starts=starts), fresh_head=True, source="policy")
    assert torch.equal(from_policy.model.word_embeddings.weight, build_policy(trial(base_seed=8)).transformer.word_embeddings.weight)


def test_a_language_model_has_no_head_to_give(tmp_path: Path) -> None:
    starts = {"policy": save(build_policy(trial()), tmp_path / "policy")}
    with pytest.raises(CheckpointError, match=r"1 missing: value_head\.weight.*a fresh head would be right"):
        build_scorer(trial(starts=starts), fresh_head=False, source="policy")


# ---------------------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("scorer", [False, True])
def test_lora_adapts_every_linear_layer_of_the_layers_and_nothing_else(model: str, scorer: bool) -> None:
    made = trial(model, lora_rank=4)
    module = build_scorer(made, fresh_head=True, source="policy") if scorer else build_policy(made)
    before = module(**inputs_BT()) if scorer else module(**inputs_BT()).logits
    targets = lora_targets(module)
    shapes = [tuple(module.get_submodule(name).weight.shape) for name in targets]
    facts = add_lora(module, made.parsed_cell, seed=1)
    adapted = [name for name, layer in module.named_modules() if isinstance(layer, LoraLayer)]
    assert sorted(adapted) == sorted(targets)
    assert not any("lm_head" in name or "embed" in name or name.endswith(("wte", "wpe", "value_head")) for name in adapted)
    head = 64 if scorer else 0
    assert facts["trainable"] == counts(module)["trainable"] == 4 * sum(a + b for a, b in shapes) + head
    assert {name for name, parameter in module.named_parameters() if parameter.requires_grad} == {
        name for name, _ in module.named_parameters() if "lora_" in name or name == "value_head.weight"
    }
    after = module(**inputs_BT()) if scorer else module(**inputs_BT()).logits
    assert torch.allclose(after, before, atol=1e-6)


def test_lora_facts_have_the_live_scaling() -> None:
    made = trial(lora_rank=4, lora_alpha=6.0)
    module = build_policy(made)
    facts = add_lora(module, made.parsed_cell, seed=1)
    assert (facts["rank"], facts["alpha"], facts["scaling"]) == (4, 6.0, 1.5)
    assert facts["targets"] == ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]


def test_the_old_semantics_scale_by_one_over_rank() -> None:
    made = trial(lora_rank=4, semantics="coati-0.2.8")
    assert add_lora(build_policy(made), made.parsed_cell, seed=1)["scaling"] == 0.25


def test_first_adapters_depend_on_their_seed_alone() -> None:
    def adapters(seed: int) -> str:
        made = trial(lora_rank=4)
        module = build_policy(made)
        add_lora(module, made.parsed_cell, seed=seed)
        return initial_sha256(module)

    first = adapters(1)
    torch.manual_seed(123)
    assert adapters(1) == first
    assert adapters(2) != first


def test_rank_0_changes_nothing() -> None:
    made = trial()
    module = build_policy(made)
    before = initial_sha256(module)
    assert add_lora(module, made.parsed_cell, seed=1) == {}
    assert initial_sha256(module) == before
    assert counts(module)["trainable"] == counts(module)["parameters"]


def test_a_model_without_layers_to_adapt_is_told() -> None:
    made = trial(lora_rank=4)
    with pytest.raises(UserError, match="no linear layers in a stack of layers"):
        add_lora(torch.nn.Linear(2, 2), made.parsed_cell, seed=1)


# ----------------------------------------------------------------------------------------------------------------- positions


def test_positions_skip_the_padding_on_the_left() -> None:
    assert position_ids(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("model", TINY)
def test_left_padding_changes_no_logit_of_a_real_token(model: str) -> None:
    module = build_policy(trial(model)).eval()
    ids_BT = torch.arange(6).reshape(1, 6) + 5
    padded_BT = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids_BT], dim=1)
    mask_BT = (torch.arange(9) >= 3).long()[None]
    places = {"position_ids": position_ids(mask_BT)} if accepts_position_ids(module) else {}
    plain = module(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits
    padded = module(input_ids=padded_BT, attention_mask=mask_BT, **places).logits
    assert torch.allclose(padded[:, 3:], plain, atol=1e-5)


def test_wrappers_are_looked_through() -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    scorer = build_scorer(trial("llama-tiny"), fresh_head=True, source="policy")
    assert backbone(Wrapper(Wrapper(scorer))) is scorer.model
    assert accepts_position_ids(Wrapper(scorer))
    assert not accepts_position_ids(Wrapper(build_policy(trial("bloom-tiny"))))


def test_activation_checkpointing_is_switched_on_in_both_kinds_of_model() -> None:
    for module in (
        build_policy(trial(activation_checkpointing=True)),
        build_scorer(trial(activation_checkpointing=True), fresh_head=True, source="policy"),
    ):
        assert backbone(module).is_gradient_checkpointing
    assert not build_policy(trial()).is_gradient_checkpointing


# ----------------------------------------------------------------------------------------------------------------- tokenizer


def test_the_tokenizer_is_that_of_the_start(tmp_path: Path) -> None:
    train_tokenizer(["some text"] * 10, 300, tmp_path / "first")
    train_tokenizer(["other words"] * 10, 310, tmp_path / "second")
    starts = {"policy": save(build_policy(trial()), tmp_path / "policy")}
    assert len(build_tokenizer(trial(starts={**starts, "tokenizer": tmp_path / "first"}))) <= 300
    with pytest.raises(UserError, match="no weights or tokenizer of this shape are published"):
        build_tokenizer(trial(starts=starts))


def test_a_tokenizer_with_more_tokens_than_embeddings_is_told(tmp_path: Path) -> None:
    train_tokenizer([f"w{k:x}{k * 7919:x}" for k in range(4000)], 5000, tmp_path)
    with pytest.raises(UserError, match=r"\d+ tokens for 4096 embeddings; `tokenizer_vocabulary: 4096` or less would be right"):
        build_tokenizer(trial(starts={"tokenizer": tmp_path}))


def test_a_model_that_the_hub_serves_is_loaded_without_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: seen.append(k["trust_remote_code"]) or original(*a, **k))
    build_policy(trial("llama3-tiny")).save_pretrained(tmp_path)
    build_policy(trial(str(tmp_path), weights="pretrained"))
    assert seen == [False]


def test_a_scorer_is_a_scorer() -> None:
    assert isinstance(build_scorer(trial(), fresh_head=True, source="policy"), Scorer)
