from __future__ import annotations

import math

import pytest
import torch

from bench.rollout.base import Sampling
from bench.rollout.sampling import draw, gumbel, noise_keys

FREE = Sampling(temperature=1.0, top_k=0, eos=1, pad=0, natural=True)
KEYS = noise_keys(7, "test", range(200), 100).flatten()


def rule(**changes):
    return Sampling(**{"temperature": 1.0, "top_k": 0, "eos": 1, "pad": 0, "natural": True, **changes})


@pytest.mark.parametrize("top_k", [0, 5])
def test_a_token_is_drawn_as_often_as_its_probability_says(top_k):
    torch.manual_seed(0)
    logits = torch.randn(12)
    kept = logits.masked_fill(logits < torch.topk(logits, top_k or 12).values[-1], -torch.inf)
    tokens = draw(logits.expand(len(KEYS), -1), KEYS, rule(top_k=top_k)).token_B
    shares, expected = torch.bincount(tokens, minlength=12) / len(KEYS), torch.softmax(kept, -1)
    errors = (expected * (1 - expected) / len(KEYS)).sqrt()
    assert ((shares - expected).abs() <= 4 * errors).all()


def test_the_likeliest_token_of_a_vocabulary_as_large_as_bloom_s_is_drawn_as_often_as_its_probability_says():
    logits = torch.zeros(250_880)
    logits[123_456] = math.log(250_879)
    tokens = torch.cat([draw(logits.expand(10, -1), keys, FREE).token_B for keys in KEYS[:60].split(10)])
    assert int((tokens == 123_456).sum()) == pytest.approx(30, abs=16)
    assert len(set(tokens.tolist())) > 14


def test_tokens_that_are_impossible_are_not_drawn():
    logits = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf]).expand(len(KEYS), -1)
    assert set(draw(logits, KEYS, FREE).token_B.tolist()) == {1, 2}


def test_the_logprob_is_that_at_the_temperature_without_top_k():
    torch.manual_seed(0)
    logits = torch.randn(5, 9)
    drawn = draw(logits, KEYS[:5], rule(temperature=0.5, top_k=2))
    expected = torch.log_softmax(logits / 0.5, -1).gather(-1, drawn.token_B.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(drawn.logp_B, expected)


def test_top_k_draws_among_the_k_likeliest_only_and_a_k_above_the_vocabulary_among_all():
    torch.manual_seed(0)
    logits = torch.randn(1, 30).expand(500, -1)
    assert set(draw(logits, KEYS[:500], rule(top_k=3)).token_B.tolist()) == set(torch.topk(logits[0], 3).indices.tolist())
    assert torch.equal(draw(logits, KEYS[:500], rule(top_k=31)).token_B, draw(logits, KEYS[:500], FREE).token_B)


def test_eos_is_never_drawn_unless_the_length_is_natural():
    logits = torch.full((100, 4), -5.0)
    logits[:, 1] = 10.0
    assert set(draw(logits, KEYS[:100], rule(natural=True)).token_B.tolist()) == {1}
    assert set(draw(logits, KEYS[:100], rule(natural=False)).token_B.tolist()) == {0, 2, 3}


def test_rounding_to_16_bits_changes_hardly_a_token():
    torch.manual_seed(0)
    hidden, head = torch.randn(400, 64), torch.randn(4096, 64) / 4
    exact, rounded = (draw(hidden.to(kind) @ head.to(kind).T, KEYS[:400], FREE).token_B for kind in (torch.float32, torch.bfloat16))
    assert int((exact != rounded).sum()) <= 12


def test_noise_is_standard_gumbel_and_unrelated_between_keys():
    noise = gumbel(KEYS[:100], torch.arange(10_000).expand(100, -1)).double()
    assert float(noise.mean()) == pytest.approx(0.57722, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)
    standard = (noise - noise.mean()) / noise.std()
    related = (standard @ standard.T / 10_000).fill_diagonal_(0.0)
    assert float(related.abs().max()) < 0.06


def test_noise_of_a_token_does_not_depend_on_which_others_are_asked_for():
    everything = gumbel(KEYS[:3], torch.arange(1000).expand(3, -1))
    some = torch.tensor([[999, 0, 500]] * 3)
    assert torch.equal(gumbel(KEYS[:3], some), everything.gather(-1, some))


def test_keys_depend_on_seed_purpose_and_row_and_on_nothing_else():
    first = noise_keys(1, "iteration:0", range(4), 6)
    torch.manual_seed(99)
    torch.rand(17)
    assert torch.equal(first[2:], noise_keys(1, "iteration:0", [2, 3], 6))
    for other in (noise_keys(2, "iteration:0", range(4), 6), noise_keys(1, "iteration:1", range(4), 6)):
        assert not torch.equal(first, other)
    assert len(set(first.flatten().tolist())) == 24
    assert first.min() >= 0
