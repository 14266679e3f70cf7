from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.rl.advantages import (
    explained_variance,
    generalised_advantages,
    last_position,
    moments,
    power_sums,
    token_rewards,
    whiten,
)


def by_definition(rewards, values, length, gamma, lam):
    """Backwards recursion of one sequence, as in the paper's algorithm."""
    advantages, running = [0.0] * len(rewards), 0.0
    for t in reversed(range(length)):
        following = values[t + 1] if t + 1 < length else 0.0
        running = rewards[t] + gamma * following - values[t] + gamma * lam * running
        advantages[t] = running
    return advantages


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 7), st.integers(0, 2**31)), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    st.sampled_from([0.0, 0.9, 1.0]),
)
def test_advantages_are_those_of_the_backwards_recursion(rows, gamma, lam):
    lengths = [length for length, _ in rows]
    generator = torch.Generator().manual_seed(rows[0][1])
    rewards, values = (torch.randn(len(rows), 7, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = (torch.arange(7) < torch.tensor(lengths).unsqueeze(1)).long()
    found, returns = generalised_advantages(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(lengths):
        expected = by_definition(rewards[row].tolist(), values[row].tolist(), length, gamma, lam)
        assert found[row].tolist() == pytest.approx(expected, abs=1e-9)
        assert returns[row, :length].tolist() == pytest.approx(
            [a + v for a, v in zip(expected, values[row].tolist(), strict=False)][:length]
        )
        assert returns[row, length:].abs().sum() == 0


def test_advantages_by_hand():
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, 1.0, 1.5]])
    found, returns = generalised_advantages(rewards, values, torch.ones(1, 3), gamma=0.9, lam=0.5)
    assert found[0].tolist() == pytest.approx([1.4 + 0.45 * (2.35 + 0.45 * 1.5), 2.35 + 0.45 * 1.5, 1.5])
    assert returns[0].tolist() == pytest.approx([v + a for v, a in zip([0.5, 1.0, 1.5], found[0].tolist(), strict=True)])


def test_without_kl_and_with_gamma_and_lambda_1_the_advantage_is_reward_less_value():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    scores, values = torch.tensor([2.0, -3.0]), torch.randn(2, 4)
    rewards = token_rewards(scores, torch.randn(2, 4), mask, kl_coef=0.0, reward_clip=None)
    found, returns = generalised_advantages(rewards, values, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(found, (scores.unsqueeze(1) - values) * mask)
    torch.testing.assert_close(returns, scores.unsqueeze(1) * mask)


def test_the_score_is_clipped_and_stands_at_the_last_response_token():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    kl = torch.tensor([[0.1, 0.2, 9.0]] * 3)
    rewards = token_rewards(torch.tensor([7.0, -7.0, 1.0]), kl, mask, kl_coef=2.0, reward_clip=5.0)
    expected = [[-0.2, 4.6, 0.0], [-0.2, -0.4, -23.0], [0.8, 0.0, 0.0]]
    for row, wanted in zip(rewards.tolist(), expected, strict=True):
        assert row == pytest.approx(wanted)


def test_last_position_of_padded_rows():
    assert last_position(torch.tensor([[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 0]])).tolist() == [0, 2, 1, 0]


def test_power_sums_of_two_ranks_add_up_to_those_of_the_job():
    values, mask = torch.randn(6, 5) * 3 + 2, (torch.rand(6, 5) > 0.3).long()
    together = power_sums(values[:2], mask[:2]) + power_sums(values[2:], mask[2:])
    found, chosen = moments(together), values[mask > 0].double()
    assert float(found.mean) == pytest.approx(float(chosen.mean()))
    assert float(found.variance) == pytest.approx(float(chosen.var(unbiased=False)))


def test_whitened_values_have_mean_0_and_variance_1_where_they_count():
    values, mask = torch.randn(8, 5) * 4 - 7, (torch.rand(8, 5) > 0.3).long()
    white = whiten(values, mask, moments(power_sums(values, mask)))
    chosen = white[mask > 0]
    assert float(chosen.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(chosen.var(unbiased=False)) == pytest.approx(1.0, abs=1e-4)
    assert white[mask == 0].abs().sum() == 0


def test_explained_variance_is_1_for_a_perfect_critic_and_0_for_a_constant_one():
    returns, mask = torch.randn(4, 4), torch.ones(4, 4)
    of = moments(power_sums(returns, mask))
    nothing_left = moments(power_sums(torch.zeros(4, 4), mask))
    assert float(explained_variance(nothing_left, of)) == 1.0
    assert float(explained_variance(of, of)) == pytest.approx(0.0)
    assert float(explained_variance(nothing_left, nothing_left)) == 0.0
