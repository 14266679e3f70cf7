from __future__ import annotations

import pytest
import torch

from bench.rollout.base import Sampling
from bench.rollout.sampling import draw, uniform_numbers

FREE = Sampling(temperature=1.0, top_k=0, eos=1, pad=0, natural=True)


def rule(**changes):
    return Sampling(**{"temperature": 1.0, "top_k": 0, "eos": 1, "pad": 0, "natural": True, **changes})


def test_a_token_is_drawn_as_often_as_its_probability_says():
    torch.manual_seed(0)
    logits = torch.randn(1, 12)
    evenly = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    tokens = draw(logits.expand(20_000, -1), evenly, FREE).token_B
    shares = torch.bincount(tokens, minlength=12) / 20_000
    torch.testing.assert_close(shares, torch.softmax(logits[0], -1), atol=1e-4, rtol=0)


def test_the_ends_of_the_unit_interval_draw_tokens_that_are_possible():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2)
    ends = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    assert draw(logits, ends, FREE).token_B.tolist() == [1, 2]


def test_the_logprob_is_that_at_the_temperature_without_top_k():
    torch.manual_seed(0)
    logits, uniform = torch.randn(5, 9), torch.rand(5, dtype=torch.float64)
    drawn = draw(logits, uniform, rule(temperature=0.5, top_k=2))
    expected = torch.log_softmax(logits / 0.5, -1).gather(-1, drawn.token_B.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(drawn.logp_B, expected)


def test_top_k_draws_among_the_k_likeliest_only():
    torch.manual_seed(0)
    logits = torch.randn(1, 30).expand(500, -1)
    evenly = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    assert set(draw(logits, evenly, rule(top_k=3)).token_B.tolist()) == set(torch.topk(logits[0], 3).indices.tolist())


def test_eos_is_never_drawn_unless_the_length_is_natural():
    logits = torch.full((100, 4), -5.0)
    logits[:, 1] = 10.0
    evenly = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    assert set(draw(logits, evenly, rule(natural=True)).token_B.tolist()) == {1}
    assert set(draw(logits, evenly, rule(natural=False)).token_B.tolist()) == {0, 2, 3}


def test_uniform_numbers_depend_on_seed_purpose_and_row_and_on_nothing_else():
    first = uniform_numbers(1, "iteration:0", range(4), 6)
    torch.manual_seed(99)
    torch.rand(17)
    assert torch.equal(first[2:], uniform_numbers(1, "iteration:0", [2, 3], 6))
    for other in (uniform_numbers(2, "iteration:0", range(4), 6), uniform_numbers(1, "iteration:1", range(4), 6)):
        assert not torch.equal(first, other)
    assert len(set(first.flatten().tolist())) == 24
    assert first.min() >= 0
    assert first.max() < 1


def test_uniform_numbers_are_uniform():
    numbers = uniform_numbers(7, "iteration:3", range(50), 40)
    assert float(numbers.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(numbers.var()) == pytest.approx(1 / 12, abs=0.01)
