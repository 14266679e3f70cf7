"""The formulas against what torch counts on real models of transformers.

FlopCounterMode counts mm, addmm, bmm and baddbmm (BLOOM's attention), forward and backward, recomputation included. It does not
count torch's CPU kernel of scaled_dot_product_attention, so the models run eager attention here, which computes the whole square
(c = 1). What it counts beyond the formula: rotary angles, one product of width 1 a forward pass.
"""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from bench.measure.flops import (
    Sequences,
    backward_flops,
    causal_share,
    decode_flops,
    forward_flops,
    prefill_flops,
    recomputed_flops,
    step_flops,
    total,
)
from bench.measure.shape import Network, shape_of
from bench.models.build import Scorer, accepts_position_ids, add_lora, checkpoint_activations, counts, position_ids
from bench.models.presets import PRESETS
from bench.rollout.base import Sampling, Surroundings
from bench.rollout.engines import CachedRollout
from bench.rollout.head import HeadWindow
from bench.rollout.sampling import noise_keys
from bench.stages.base import Place, build_stage
from bench.strategies.base import all_strategies
from tests.trials import tiny_cell, tiny_trial

MODELS = ("bloom-tiny", "gpt2-tiny", "opt-tiny", "llama-tiny", "llama3-tiny", "qwen2-tiny")
EXACT = 1e-4
"""Measured: 0 without rotary embeddings, 4e-5 with them."""


def make(name: str, *, attention: str = "eager"):
    preset = PRESETS[name]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(preset.model_type, **preset.config), attn_implementation=attention).train()


def counted(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def prepared(name: str, *, scalar_head: bool, rank: int):
    model = make(name)
    module = Scorer(model.base_model) if scalar_head else model
    if rank:
        add_lora(module, SimpleNamespace(lora_rank=rank, lora_alpha=8.0), 1)
    return module, Network(shape=shape_of(name), scalar_head=scalar_head, lora_rank=rank)


def train_once(module) -> None:
    ids = torch.randint(5, 300, (2, 24))
    output = module(input_ids=ids, attention_mask=torch.ones_like(ids), **({} if isinstance(module, Scorer) else {"use_cache": False}))
    (output if isinstance(module, Scorer) else output.logits).sum().backward()


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("scalar_head", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward_are_what_torch_counts(name, scalar_head, rank):
    module, network = prepared(name, scalar_head=scalar_head, rank=rank)
    work = Sequences(count=2, length=24)
    formula = forward_flops(network, work, 1.0) + backward_flops(network, work, 1.0)
    assert counted(lambda: train_once(module)) == pytest.approx(formula, rel=EXACT)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("name", ["bloom-tiny", "llama3-tiny"])
def test_recomputation_is_what_torch_counts(name, rank):
    module, network = prepared(name, scalar_head=False, rank=rank)
    checkpoint_activations(module)
    work = Sequences(count=2, length=24)
    formula = forward_flops(network, work, 1.0) + backward_flops(network, work, 1.0) + recomputed_flops(network, work, 1.0)
    assert counted(lambda: train_once(module)) == pytest.approx(formula, rel=EXACT)


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache_is_what_torch_counts(name):
    module = make(name).eval()
    window = HeadWindow(module)
    around = Surroundings(positions=position_ids if accepts_position_ids(module) else None, last_only=window.last)
    engine = CachedRollout(module, Sampling(temperature=1.0, top_k=0, eos=2, pad=3, natural=False), around)
    prompts = torch.randint(5, 300, (2, 16))
    network = Network(shape=shape_of(name))
    formula = prefill_flops(network, sequences=2, prompt=16, causal=1.0) + decode_flops(network, sequences=2, prompt=16, response=9)
    keys = noise_keys(1, "test", range(2), 9)
    assert counted(lambda: engine.generate(prompts, torch.ones_like(prompts), keys)) == pytest.approx(formula, rel=EXACT)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("scalar_head", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_adapters_are_what_the_model_has(name, scalar_head, rank):
    module, network = prepared(name, scalar_head=scalar_head, rank=rank)
    assert counts(module) == {"parameters": network.parameters, "trainable": network.trainable}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["gpt2-tiny", "opt-tiny", "llama3-tiny", "mistral-tiny", "qwen2-tiny"])
def test_transformers_asks_for_causality_only_without_padding(name, padded):
    module = make(name, attention="sdpa")
    ids = torch.randint(5, 300, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0 if padded else 1
    with mock.patch(
        "torch.nn.functional.scaled_dot_product_attention", side_effect=torch.nn.functional.scaled_dot_product_attention
    ) as kernel:
        module(input_ids=ids, attention_mask=mask, use_cache=False)
    asked = {call.kwargs["is_causal"] for call in kernel.call_args_list}
    assert asked == {causal_share(shape_of(name), padded=padded) == 0.5}


@pytest.mark.parametrize(("stage", "rank"), [("sft", 0), ("sft", 4), ("rm", 0), ("ppo", 0), ("ppo", 4)])
def test_a_real_step_of_a_stage_is_what_torch_counts(stage, rank, tmp_path):
    """The whole step of the product, padding, adapters, frozen models and head windows included, from the counts it reports."""
    size = {"prompts_per_iteration": 4, "global_batch": 2, "prompt_length": 24, "response_length": 8, "iterations": 1, "ppo_epochs": 2}
    settings = size if stage == "ppo" else {"steps": 1, "global_batch": 4, "sequence_length": 64}
    cell = tiny_cell(stage, lora_rank=rank, micro_batch=2, rows=80, held_out_rows=4, activation_checkpointing=False, **settings)
    strategy, device = all_strategies()["naive"], torch.device("cpu")
    strategy.start(cell, device)
    running = build_stage(tiny_trial(cell, tmp_path / "trial"), strategy, Place(device=device, rank=0, world_size=1))
    reports = []
    flops = counted(lambda: reports.append(running.advance(0)))
    phases = step_flops(cell, shape_of(cell.model), reports[0].counts)
    # Micro-batches of different width: the formula takes their mean, a lower bound of the attention part, here a small one.
    assert total(phases.values()).hardware == pytest.approx(flops, rel=0.01)
    if stage == "ppo":
        assert set(phases) <= set(reports[0].phases)
