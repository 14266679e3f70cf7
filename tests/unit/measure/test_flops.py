"""FLOPs, bytes and shares against numbers worked out by hand."""

from __future__ import annotations

import json

import pytest

from bench.cell import cell_from_json
from bench.measure.flops import (
    Flops,
    Sequences,
    backward_flops,
    causal_share,
    decode_bytes,
    decode_flops,
    forward_flops,
    hfu,
    mbu,
    mfu,
    prefill_flops,
    rollout_bytes,
    step_flops,
    total,
)
from bench.measure.shape import Network, shape_of

BLOOM_N = 24 * 12 * 1024**2 + 250_880 * 1024
LAYERS = 24 * 12 * 1024**2
LLAMA_N = 32 * (4 * 4096**2 + 3 * 4096 * 11_008) + 32_000 * 4096


def cell(stage: str, **changes):
    return cell_from_json({"stage": stage, "model": "bloom-560m", "strategy": "naive", **changes})


def per_token(network: Network, length: int, causal: float) -> float:
    one = Sequences(count=1, length=length)
    return (forward_flops(network, one, causal) + backward_flops(network, one, causal)) / length


def test_bloom_560m_fine_tuning_is_6n_plus_3a():
    assert BLOOM_N == 558_891_008
    assert per_token(Network(shape=shape_of("bloom-560m")), 512, 1.0) == 6 * 558_891_008 + 3 * 50_331_648 == 3_504_340_992


def test_llama_7b_fine_tuning_with_causality_exploited():
    assert LLAMA_N == 6_607_077_376
    assert per_token(Network(shape=shape_of("llama-7b")), 2048, 0.5) == 6 * 6_607_077_376 + 3 * 536_870_912 == 41_253_076_992


def test_lora_does_not_pay_for_gradients_of_frozen_weights():
    lora = per_token(Network(shape=shape_of("bloom-560m"), lora_rank=8), 512, 1.0)
    entry = 3 * 1024**2 + 8 * 1024  # first layer's query, key, value, and the A of their adapter: nothing trains below them
    assert lora == 4 * BLOOM_N + 6 * 3_145_728 + 3 * 50_331_648 - 2 * entry == 2_399_125_504
    textbook = 4 * BLOOM_N + 6 * 3_145_728 + 3 * 50_331_648
    assert lora / textbook == pytest.approx(1, abs=0.003)


def test_a_reward_model_has_a_head_of_one_column():
    shape = shape_of("bloom-560m")
    assert per_token(Network(shape=shape, scalar_head=True), 512, 1.0) == 6 * (24 * 12 * 1024**2 + 1024) + 3 * 50_331_648


def test_a_tied_head_is_computed_once_and_counted_once():
    tied, untied = shape_of("qwen2-tiny"), shape_of("llama3-tiny")
    assert (tied.tied, untied.tied) == (True, False)
    one = Sequences(count=1, length=7)
    assert forward_flops(Network(shape=tied), one, 1.0) == forward_flops(Network(shape=untied), one, 1.0)


def test_grouped_queries_save_projections_and_cache_but_no_attention_products():
    full, grouped = Network(shape=shape_of("llama-tiny")), Network(shape=shape_of("llama3-tiny"))
    one = Sequences(count=1, length=10)
    assert forward_flops(full, one, 1.0) - forward_flops(grouped, one, 1.0) == 2 * 10 * 2 * 2 * 64 * (64 - 32)
    longer = Sequences(count=1, length=20)
    squares = [forward_flops(n, longer, 1.0) - 2 * forward_flops(n, one, 1.0) for n in (full, grouped)]
    assert squares[0] == squares[1] == 4 * 2 * 64 * (20**2 - 2 * 10**2)


def test_llama_7b_generation_with_a_cache():
    policy = Network(shape=shape_of("llama-7b"))
    flops = prefill_flops(policy, sequences=1, prompt=64, causal=0.5) + decode_flops(policy, sequences=1, prompt=64, response=64)
    layers, head = LLAMA_N - 131_072_000, 131_072_000
    attention = 4 * 32 * 4096 * (0.5 * 64**2 + 64 * 63 + 63 * 64 / 2)
    assert flops == 2 * layers * 127 + 2 * head * 64 + attention == 1_665_927_217_152


def test_a_response_of_one_token_needs_no_decoding():
    assert decode_flops(Network(shape=shape_of("bloom-tiny")), sequences=4, prompt=8, response=1) == 0


def test_decoding_reads_all_weights_and_the_cache_so_far_at_each_step():
    policy = Network(shape=shape_of("bloom-560m"))
    read = decode_bytes(policy, "bf16-master", batch=4, prompt=64, response=64)
    assert read == 63 * 2 * BLOOM_N + 4 * (2 * 24 * 1024 * 2) * (63 * 64 + 63 * 64 / 2) == 72_798_437_376


COUNTS = {"tokens": 1000, "padded_tokens": 1000, "loss_tokens": 600, "sequences": 4}


def test_model_flops_count_real_tokens_and_hardware_flops_count_padding():
    phases = step_flops(cell("sft"), shape_of("bloom-560m"), {**COUNTS, "padded_tokens": 2000})
    work = total(phases.values())
    attention, head = 3 * 4 * 24 * 1024, 6 * 250_880 * 1024 * 600
    assert work == Flops(6 * LAYERS * 1000 + head + attention * 4 * 250**2, 6 * LAYERS * 2000 + head + attention * 4 * 500**2)


def test_the_head_counts_only_where_there_is_loss():
    work = [total(step_flops(cell("sft"), shape_of("bloom-560m"), {**COUNTS, "loss_tokens": n}).values()).model for n in (0, 1)]
    assert work[1] - work[0] == 6 * 250_880 * 1024


def test_recomputation_is_work_of_the_hardware_only():
    counts = {"tokens": 1024, "padded_tokens": 1024, "loss_tokens": 100, "sequences": 2}
    plain = total(step_flops(cell("sft"), shape_of("bloom-560m"), counts).values())
    again = total(step_flops(cell("sft", activation_checkpointing=True), shape_of("bloom-560m"), counts).values())
    assert again.model == plain.model == plain.hardware
    layers_without_the_last_product = 24 * 8 * 1024**2
    assert again.hardware - plain.hardware == 2 * layers_without_the_last_product * 1024 + 4 * 24 * 1024 * 2 * 512**2


def test_a_count_that_is_missing_is_an_error_not_a_zero():
    with pytest.raises(KeyError, match="padded_tokens"):
        step_flops(cell("sft"), shape_of("bloom-560m"), {"tokens": 1, "loss_tokens": 1, "sequences": 1})
    ppo = cell("ppo", ptx="synthetic-instruct", ptx_coef=0.5)
    with pytest.raises(KeyError, match="ptx_sequences"):
        step_flops(ppo, shape_of("bloom-560m"), {"prompt_tokens": 64, "response_tokens": 64, "sequences": 1})


def test_causality_is_exploited_only_by_causal_kernels_without_padding():
    assert [causal_share(shape_of("llama-7b"), padded=padded) for padded in (False, True)] == [0.5, 1.0]
    assert [causal_share(shape_of("bloom-560m"), padded=padded) for padded in (False, True)] == [1.0, 1.0]


PPO = {"prompts_per_iteration": 8, "global_batch": 8, "prompt_length": 64, "response_length": 64}
FULL = {"prompt_tokens": 8 * 64, "response_tokens": 8 * 64, "sequences": 8}


def test_an_iteration_of_ppo_is_rollout_scoring_and_epochs_of_learning():
    phases = step_flops(cell("ppo", ppo_epochs=2, **PPO), shape_of("bloom-560m"), FULL)
    layers, head, square = LAYERS, 250_880 * 1024, 4 * 24 * 1024 * 128**2
    scalar, language = 2 * (layers + 1024) * 128 + square, 2 * layers * 128 + 2 * head * 64 + square
    assert phases["reward"].model == phases["value"].model == 8 * scalar
    assert phases["reference"].model == phases["policy_logprob"].model == 8 * language
    assert phases["policy_learn"].model == 2 * 8 * 3 * language
    assert phases["critic_learn"].model == 2 * 8 * 3 * scalar
    assert phases["rollout_prefill"].model == 8 * (2 * layers * 64 + 2 * head + 4 * 24 * 1024 * 64**2)
    assert next(iter(phases)) == "rollout_prefill"
    assert all(work.model == work.hardware for work in phases.values())


def test_ppo_adapters_are_computed_in_policy_and_critic_but_not_in_the_frozen_models():
    plain, lora = (step_flops(cell("ppo", lora_rank=rank, **PPO), shape_of("bloom-560m"), FULL) for rank in (0, 8))
    assert lora["reference"] == plain["reference"]
    assert lora["reward"] == plain["reward"]
    assert lora["policy_logprob"].model - plain["policy_logprob"].model == 2 * 3_145_728 * 128 * 8
    assert lora["policy_learn"].model < 0.75 * plain["policy_learn"].model


def test_left_padded_prompts_cost_hardware_but_are_no_model_flops():
    short = step_flops(cell("ppo", **PPO), shape_of("bloom-560m"), {**FULL, "prompt_tokens": 8 * 32})
    full = step_flops(cell("ppo", **PPO), shape_of("bloom-560m"), FULL)
    assert short["reward"].hardware == full["reward"].hardware
    assert short["reward"].model < 0.8 * full["reward"].model


def test_the_ptx_loss_is_part_of_learning_the_policy():
    ptx = {"ptx_tokens": 900, "ptx_padded_tokens": 1200, "ptx_loss_tokens": 500, "ptx_sequences": 8}
    without = step_flops(cell("ppo", **PPO), shape_of("bloom-560m"), FULL)
    added = step_flops(cell("ppo", ptx="synthetic-instruct", ptx_coef=0.5, **PPO), shape_of("bloom-560m"), {**FULL, **ptx})
    sft = total(step_flops(cell("sft"), shape_of("bloom-560m"), {key[4:]: value for key, value in ptx.items()}).values())
    assert added["policy_learn"] == without["policy_learn"] + sft


def test_bytes_of_a_rollout_add_up_over_ranks_and_iterations():
    two = cell("ppo", strategy="ddp", processes_per_node=2, **PPO)
    one = decode_bytes(Network(shape=shape_of("bloom-560m")), "bf16-master", batch=4, prompt=64, response=64)
    assert rollout_bytes(two, shape_of("bloom-560m"), FULL) == 2 * one
    three = {key: 3 * value for key, value in FULL.items()}
    assert rollout_bytes(two, shape_of("bloom-560m"), three) == pytest.approx(6 * one)


def test_utilisation_is_a_share_of_all_devices():
    assert mfu(312e12, 2.0, devices=1, peak=312e12) == 0.5
    assert hfu(312e12, 2.0, devices=2, peak=312e12) == 0.25
    assert mbu(3.35e12, 1.0, devices=1, bandwidth=3.35e12) == 1.0
    for seconds, devices, peak in ((0.0, 1, 1.0), (1.0, 0, 1.0), (1.0, 1, 0.0)):
        with pytest.raises(ValueError, match="above 0"):
            mfu(1.0, seconds, devices=devices, peak=peak)


def test_the_shape_of_a_folder_is_read_from_its_configuration(tmp_path):
    config = {
        "model_type": "llama", "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = shape_of(str(tmp_path))
    assert (shape.attention_width, shape.kv_width) == (64, 32)
    assert shape.layer_parameters == 3 * (32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 48)


def test_a_shape_that_is_not_at_hand_is_none(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert shape_of(str(tmp_path)) is None
    assert shape_of("org/model") is None


def test_ranks_that_hold_one_model_together_read_each_weight_once():
    content = {"stage": "ppo", "model": "bloom-560m", "strategy": "hybrid", "processes_per_node": 4, "global_batch": 32, "micro_batch": 8}
    apart, together = (cell_from_json({**content, "tensor_parallel": split}) for split in (1, 4))
    shape, counts = shape_of("bloom-560m"), {"sequences": 32, "prompt_tokens": 2048, "response_tokens": 2048}
    weights = 2 * (shape.layer_parameters + shape.head_parameters)
    assert rollout_bytes(apart, shape, counts) - rollout_bytes(together, shape, counts) == pytest.approx(3 * 63 * weights)
