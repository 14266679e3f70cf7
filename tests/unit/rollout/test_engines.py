from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.data.collate import pad_left
from bench.models.build import accepts_position_ids, position_ids
from bench.rl.losses import token_logprobs
from bench.rollout.base import Sampling, Surroundings
from bench.rollout.engines import CachedRollout, UncachedRollout, cache_of
from bench.rollout.head import HeadWindow
from bench.rollout.sampling import noise_keys

SHAPES = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
    },
}
EOS, PAD, LENGTH = 1, 0, 19
PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15], [20, 21]]


@cache
def model(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=60, eos_token_id=EOS, pad_token_id=PAD, bos_token_id=2, **SHAPES[kind])
    built = AutoModelForCausalLM.from_config(config).eval()
    for parameter in built.parameters():
        parameter.data.mul_(4.0 if parameter.dim() > 1 else 1.0)  # far from uniform logits
    return built


def roll_out(kind="bloom", engine=CachedRollout, rows=range(4), width=6, natural=False, window=False, temperature=1.0, eos=EOS):
    policy = model(kind)
    sampling = Sampling(temperature=temperature, top_k=0, eos=eos, pad=PAD, natural=natural)
    around = Surroundings(positions=position_ids if accepts_position_ids(policy) else None, new_cache=cache_of(policy))
    if window:
        around = replace(around, last_only=HeadWindow(policy).last)
    prompts = pad_left([PROMPTS[row] for row in rows], PAD, width)
    return engine(policy, sampling, around).generate(*prompts, noise_keys(3, "test", rows, LENGTH))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("natural", [False, True])
def test_sampling_with_a_cache_equals_sampling_without(kind, natural):
    cached, plain = (roll_out(kind, engine, natural=natural) for engine in (CachedRollout, UncachedRollout))
    assert torch.equal(cached.ids_BS, plain.ids_BS)
    assert torch.equal(cached.mask_BS, plain.mask_BS)
    torch.testing.assert_close(cached.logp_BR, plain.logp_BR, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", SHAPES)
def test_samples_do_not_depend_on_how_prompts_are_split_into_batches(kind):
    together = roll_out(kind)
    apart = [roll_out(kind, rows=rows) for rows in ([0], [1, 2], [3])]
    assert torch.equal(together.ids_BS, torch.cat([part.ids_BS for part in apart]))
    torch.testing.assert_close(together.logp_BR, torch.cat([part.logp_BR for part in apart]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", SHAPES)
def test_padding_in_front_of_a_prompt_changes_nothing(kind):
    narrow, wide = roll_out(kind, width=6), roll_out(kind, width=11)
    assert torch.equal(narrow.ids_BS[:, 6:], wide.ids_BS[:, 11:])
    torch.testing.assert_close(narrow.logp_BR, wide.logp_BR, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", SHAPES)
def test_logprobs_of_the_rollout_are_those_that_a_learner_computes(kind):
    policy, rollout = model(kind), roll_out(kind, temperature=0.7)
    places = {"position_ids": position_ids(rollout.mask_BS)} if accepts_position_ids(policy) else {}
    logits = policy(input_ids=rollout.ids_BS, attention_mask=rollout.mask_BS, **places).logits[:, -LENGTH - 1 : -1]
    learned = token_logprobs(logits, rollout.ids_BS[:, -LENGTH:], temperature=0.7)
    torch.testing.assert_close(rollout.logp_BR, learned.detach(), atol=1e-4, rtol=1e-4)


def test_fixed_responses_have_exactly_the_asked_length_and_no_eos():
    rollout = roll_out()
    assert rollout.response_mask_BR.tolist() == [[1] * LENGTH] * 4
    assert (rollout.ids_BS[:, 6:] != EOS).all()


def test_natural_responses_end_with_eos_and_are_padded_behind_it():
    free = roll_out(natural=True)
    end = int(free.ids_BS[0, 6 + 3])  # a token that is drawn early
    rollout = roll_out(natural=True, eos=end)
    lengths = rollout.response_mask_BR.sum(dim=1).tolist()
    assert lengths[0] <= 4
    for row, length in enumerate(lengths):
        ids, mask, logp = rollout.ids_BS[row, 6:], rollout.response_mask_BR[row], rollout.logp_BR[row]
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
        assert end not in ids[: length - 1].tolist()
        assert length == LENGTH or ids[length - 1] == end
        assert set(ids[length:].tolist()) <= {PAD}
        assert logp[length:].abs().sum() == 0


def test_natural_generation_goes_on_until_all_ranks_are_done():
    policy, asked = model("bloom"), []
    sampling = Sampling(temperature=1.0, top_k=0, eos=EOS, pad=PAD, natural=True)
    prompts, keys = pad_left(PROMPTS, PAD, 6), noise_keys(3, "test", range(4), 40)

    def elsewhere(done_B):
        asked.append(bool(done_B.all()))
        return len(asked) == 3

    rollout = CachedRollout(policy, sampling, Surroundings(all_done=elsewhere, new_cache=cache_of(policy))).generate(*prompts, keys)
    assert len(asked) == 3
    assert rollout.logp_BR.shape[1] == 24


def test_the_head_computes_only_the_last_position_and_the_samples_stay_the_same():
    free, windowed = roll_out(), roll_out(window=True)
    assert torch.equal(free.ids_BS, windowed.ids_BS)


@pytest.mark.parametrize("window", [slice(-4, -1), torch.tensor([0, 5, 9])])
def test_windowed_logits_are_the_same_as_all_logits_cut(window):
    policy = model("bloom")
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])
    everything = policy(input_ids=ids).logits
    expected = everything[:, window] if isinstance(window, slice) else everything.flatten(0, 1)[window].unsqueeze(0)
    seen = HeadWindow(policy)
    torch.testing.assert_close(seen.logits(policy, window, input_ids=ids), expected)
    torch.testing.assert_close(seen.logits(policy_without_head_hook(policy), window, input_ids=ids), expected)
    torch.testing.assert_close(policy(input_ids=ids).logits, everything)


def policy_without_head_hook(policy):
    """As a strategy that replaces the head would leave it: all logits, whatever the window."""

    class Replaced(torch.nn.Module):
        def forward(self, input_ids):
            output = policy.base_model(input_ids=input_ids)
            output.logits = torch.nn.functional.linear(output.last_hidden_state, policy.lm_head.weight)
            return output

    return Replaced()


def test_prefill_and_decoding_are_told_to_the_clock_and_every_token_beats():
    from contextlib import contextmanager

    phases, beats = [], []

    @contextmanager
    def phase(name):
        phases.append(name)
        yield

    sampling = Sampling(temperature=1.0, top_k=0, eos=EOS, pad=PAD, natural=False)
    engine = CachedRollout(
        model("bloom"), sampling, Surroundings(phase=phase, beat=lambda: beats.append(1), new_cache=cache_of(model("bloom")))
    )
    engine.generate(*pad_left(PROMPTS, PAD, 6), noise_keys(3, "test", range(4), 5))
    assert phases == ["rollout_prefill", "rollout_decode"]
    assert len(beats) == 4
