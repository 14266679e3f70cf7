"""Memory theory against numbers worked out by hand, and against the tensors of a real engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bench.cell import cell_from_json
from bench.measure.shape import shape_of
from bench.models.build import Scorer, add_lora, build_policy
from bench.needs import Needs, needs, networks, weights_on_disk_bytes
from bench.strategies import base
from bench.strategies.base import all_strategies
from tests.trials import tiny_cell, tiny_trial

BLOOM = 559_214_592
ADAPTERS = 3_145_728


def cell(stage: str = "sft", **changes):
    return cell_from_json({"stage": stage, "model": "bloom-560m", "strategy": "naive", **changes})


@pytest.fixture
def sharding(monkeypatch):
    """Set what the strategy `ddp` shards, so that the theory is tested apart from what strategies say of themselves."""
    return lambda *what: monkeypatch.setattr(type(all_strategies()["ddp"]), "sharded", frozenset(what))


@pytest.mark.parametrize(
    ("precision", "weights", "gradients", "states"),
    [("fp32", 4, 4, 8), ("bf16-pure", 2, 2, 4), ("bf16-master", 2, 2, 12), ("bf16-autocast", 4, 4, 8), ("fp16-master", 2, 2, 12)],
)
def test_full_fine_tuning_costs_bytes_per_parameter_by_precision(precision, weights, gradients, states):
    found = needs(cell(precision=precision))
    assert found == Needs(
        parameters=BLOOM, trainable=BLOOM, weight_bytes=weights * BLOOM, gradient_bytes=gradients * BLOOM, optimizer_bytes=states * BLOOM
    )
    assert found.state_bytes == (weights + gradients + states) * BLOOM


def test_llama_7b_needs_a_hundred_gibibytes_and_lora_thirteen():
    full, lora = needs(cell(model="llama-7b")), needs(cell(model="llama-7b", lora_rank=8))
    assert full.state_bytes == 16 * 6_738_415_616
    assert lora.state_bytes == 2 * 6_738_415_616 + 16 * 19_988_480


def test_lora_keeps_states_for_its_adapters_only():
    found = needs(cell(lora_rank=8))
    assert found.trainable == ADAPTERS
    assert (found.weight_bytes, found.gradient_bytes, found.optimizer_bytes) == (2 * (BLOOM + ADAPTERS), 2 * ADAPTERS, 12 * ADAPTERS)


def test_a_reward_model_trains_its_head_beside_its_adapters():
    assert needs(cell("rm", lora_rank=8)).trainable == ADAPTERS + 1024
    assert needs(cell("rm")).trainable == BLOOM + 1024


def test_an_untied_head_is_not_part_of_a_reward_model():
    assert needs(cell("rm", model="llama-7b")).trainable == 6_738_415_616 - 32_000 * 4096 + 4096


def test_ppo_trains_two_models_and_holds_two_frozen_ones():
    found = needs(cell("ppo"))
    scorer = BLOOM + 1024
    assert found.trainable == BLOOM + scorer
    assert found.weight_bytes == 2 * (2 * BLOOM + 2 * scorer)
    assert found.optimizer_bytes == 12 * (BLOOM + scorer)


def test_zero2_shards_gradients_and_optimizer(sharding):
    sharding("gradients", "optimizer")
    found = needs(cell(strategy="ddp", processes_per_node=3))
    third = -(-BLOOM // 3)
    assert (found.weight_bytes, found.gradient_bytes, found.optimizer_bytes) == (2 * BLOOM, 2 * third, 12 * third)


def test_gemini_shards_what_trains_and_never_what_is_frozen(sharding):
    sharding("parameters", "gradients", "optimizer")
    full, lora = (needs(cell(strategy="ddp", processes_per_node=4, lora_rank=rank)) for rank in (0, 8))
    assert full.weight_bytes == 2 * (BLOOM // 4)
    assert lora.weight_bytes == 2 * (BLOOM + ADAPTERS // 4)
    ppo = needs(cell("ppo", strategy="ddp", processes_per_node=4))
    frozen = 2 * BLOOM + 1024
    assert ppo.weight_bytes == 2 * (frozen + BLOOM // 4 + (BLOOM + 1024) // 4)


def test_strategies_say_what_they_shard_in_known_words():
    known = {"parameters", "gradients", "optimizer", "frozen"}
    assert all(strategy.sharded <= known for strategy in base.all_strategies().values())


def test_a_model_of_unknown_shape_has_no_theory():
    assert needs(cell(model="org/model")) is None


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16-pure", "bf16-master", "bf16-autocast"])
def test_theory_is_what_the_tensors_of_a_real_engine_take(precision, rank, tmp_path):
    tiny = tiny_cell("sft", precision=precision, lora_rank=rank, steps=1)
    strategy, device = all_strategies()["naive"], torch.device("cpu")
    policy = build_policy(tiny_trial(tiny, tmp_path / "trial"))
    add_lora(policy, tiny, 1)
    engine = strategy.prepare(policy, tiny, device, learning_rate=1e-4)
    ids = torch.randint(5, 300, (2, 8))
    loss = engine.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float().mean()
    engine.backward(loss, last=True)
    gradients = sum(parameter.grad.nbytes for parameter in policy.parameters() if parameter.grad is not None)
    engine.step()
    theory = needs(tiny)
    assert sum(parameter.nbytes for parameter in policy.parameters()) == theory.weight_bytes
    assert gradients == theory.gradient_bytes
    moments = sum(state[key].nbytes for state in engine._optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    masters = sum(master.nbytes for master in engine._masters or [])
    assert moments + masters == theory.optimizer_bytes


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_roles_of_a_stage_have_the_heads_that_it_builds(stage):
    found = networks(cell(stage, lora_rank=8), shape_of("bloom-560m"))
    trained = {"sft": {"policy"}, "rm": {"reward"}, "ppo": {"policy", "critic"}}[stage]
    assert {role for role, network in found.items() if network.trainable} == trained
    assert {role for role, network in found.items() if network.scalar_head} == set(found) & {"critic", "reward"}


def test_weights_on_disk_are_merged_and_in_the_storage_type():
    sft, rm = cell(lora_rank=8), cell("rm", precision="fp32")
    plan = SimpleNamespace(
        warm=[SimpleNamespace(cell=sft), SimpleNamespace(cell=None)], cells={"rm": rm}, blocks=[SimpleNamespace(saves=["rm"])]
    )
    assert weights_on_disk_bytes(plan) == 2 * BLOOM + 4 * (BLOOM + 1024)


def test_a_scorer_of_torch_has_the_parameters_of_the_theory():
    from transformers import AutoConfig, AutoModelForCausalLM

    from bench.models.presets import PRESETS

    for name in ("llama3-tiny", "qwen2-tiny", "gpt2-tiny"):
        preset = PRESETS[name]
        scorer = Scorer(AutoModelForCausalLM.from_config(AutoConfig.for_model(preset.model_type, **preset.config)).base_model)
        network = networks(cell("rm", model=name), shape_of(name))["reward"]
        assert sum(parameter.numel() for parameter in scorer.parameters()) == network.parameters


def test_tensor_parallel_ranks_hold_halves_of_matrices_and_all_of_what_stays_whole():
    """BLOOM-560m: of each layer four norm vectors and two biases of the hidden width, 1024, and the norms of embeddings and last layer."""
    whole = needs(cell("ppo"))
    split = needs(cell("ppo", strategy="hybrid", processes_per_node=4, tensor_parallel=2))
    policy, replicated = BLOOM, 24 * 6 * 1024 + 4 * 1024
    both = 2 * ((policy - replicated) // 2 + replicated) + 1024  # policy and critic, whose scalar head is whole
    assert (split.gradient_bytes, split.optimizer_bytes) == (2 * both, 12 * both)
    assert split.trainable == whole.trainable
    assert split.weight_bytes == 2 * both + 2 * (2 * BLOOM + 1024)  # reference and reward model stay whole


def test_the_fullest_stage_of_a_pipeline_counts():
    """BLOOM-560m in four stages of six layers: the first has the embedding and its norm, the last a copy of it and the last norm."""
    stages = [needs(cell(strategy="hybrid", processes_per_node=4, pipeline_parallel=4), stage=number) for number in range(4)]
    layers, embedding, norm = 6 * (12 * 1024**2 + 13 * 1024), 250_880 * 1024, 2 * 1024
    assert [one.optimizer_bytes for one in stages] == [
        12 * size for size in (layers + embedding + norm, layers, layers, layers + embedding + norm)
    ]
    assert needs(cell(strategy="hybrid", processes_per_node=4, pipeline_parallel=4)).state_bytes == 16 * (layers + embedding + norm)


ROWS = 24 * 9 * 1024
"""Of all matrices of BLOOM-560m, four in each of 24 layers."""
WEIGHTS = 24 * 12 * 1024**2


@pytest.mark.parametrize(
    ("kind", "bytes_of_matrices"),
    [("int8", WEIGHTS + 4 * ROWS), ("nf4", WEIGHTS // 2 + WEIGHTS // 64 + 4 * WEIGHTS // (64 * 256) + 96 * 4 * 273)],
)
def test_a_base_in_few_bits_takes_those_bits_and_its_scales(kind, bytes_of_matrices):
    """8 bits have a fp32 scale a row; 4 bits an 8-bit one for 64 weights, a fp32 one for 256 of those, and three tables a matrix."""
    found = needs(cell(lora_rank=8, base_weights=kind))
    assert found.weight_bytes == bytes_of_matrices + 2 * (BLOOM - WEIGHTS) + 2 * ADAPTERS
    assert found.optimizer_bytes == 12 * ADAPTERS
    ppo = needs(cell("ppo", frozen_weights="int8"))
    small = WEIGHTS + 4 * ROWS + 2 * (BLOOM - WEIGHTS)
    assert ppo.weight_bytes == 2 * (2 * BLOOM + 1024) + 2 * small + 2 * 1024
