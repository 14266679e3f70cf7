from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from bench.rl.losses import masked_mean, pair_losses, policy_terms, token_entropies, token_logprobs, value_terms


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_and_their_gradient_are_those_of_log_softmax(chunk, temperature):
    logits, targets = torch.randn(2, 5, 11, requires_grad=True), torch.randint(0, 11, (2, 5))
    weight = torch.randn(2, 5)
    expected = torch.log_softmax(logits / temperature, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), logits)
    found = token_logprobs(logits, targets, temperature=temperature, chunk=chunk)
    (gradient,) = torch.autograd.grad((found * weight).sum(), logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, wanted)


def test_a_negative_target_has_no_value_and_no_gradient():
    logits, targets = torch.randn(1, 3, 7, requires_grad=True), torch.tensor([[2, -100, -1]])
    found = token_logprobs(logits, targets)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert found[0, 1:].tolist() == [0.0, 0.0]
    assert gradient[0, 1:].abs().max() == 0
    assert gradient[0, 0].abs().max() > 0


def test_token_logprobs_of_16_bit_logits_are_summed_in_fp32():
    logits = (torch.randn(1, 4, 5000) * 3).bfloat16()
    targets = torch.randint(0, 5000, (1, 4))
    expected = torch.log_softmax(logits.double(), dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    found = token_logprobs(logits, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_entropies_are_those_of_torchs_categorical(chunk):
    logits = torch.randn(3, 4, 9)
    expected = torch.distributions.Categorical(logits=logits / 0.5).entropy()
    torch.testing.assert_close(token_entropies(logits, temperature=0.5, chunk=chunk), expected)


def test_both_pair_losses_are_the_same_function():
    margin = torch.cat([torch.linspace(-30, 30, 61), torch.randn(50)]).double()
    naive = torch.log1p(torch.exp(-margin))
    torch.testing.assert_close(pair_losses(margin, "log_sig"), naive, atol=1e-6, rtol=0)
    torch.testing.assert_close(pair_losses(margin, "log_exp"), naive, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["log_sig", "log_exp"])
def test_pair_losses_stay_finite_where_the_upstream_forms_do_not(kind):
    margin = torch.tensor([-200.0, 200.0], requires_grad=True)
    losses = pair_losses(margin, kind)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([200.0, 0.0])
    assert margin.grad.tolist() == pytest.approx([-1.0, 0.0])
    assert math.isinf(float(-torch.log(torch.sigmoid(margin.detach()[0]))))


def test_policy_terms_by_hand():
    logp = torch.log(torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.1]]))
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 2.0]])
    terms, clipped = policy_terms(logp, torch.zeros(1, 5), advantages, 0.2)
    assert terms[0].tolist() == pytest.approx([-1.2, -0.5, 1.5, 0.8, -2.2])
    assert clipped[0].tolist() == [True, False, False, True, False]


def test_a_clipped_token_has_no_gradient():
    logp = torch.log(torch.tensor([[1.5, 1.1]])).requires_grad_()
    terms, _ = policy_terms(logp, torch.zeros(1, 2), torch.ones(1, 2), 0.2)
    terms.sum().backward()
    assert logp.grad[0].tolist() == pytest.approx([0.0, -1.1])


def test_value_terms_by_hand_with_and_without_clip():
    values, old, returns = torch.tensor([[1.0, 0.1, -1.0]]), torch.zeros(1, 3), torch.tensor([[2.0, 2.0, -1.0]])
    assert value_terms(values, old, returns, None)[0].tolist() == pytest.approx([1.0, 3.61, 0.0])
    assert value_terms(values, old, returns, 0.2)[0].tolist() == pytest.approx([3.24, 3.61, 0.64])


def test_masked_mean_ignores_what_is_masked():
    values, mask = torch.randn(4, 6), torch.tensor([[1, 1, 0, 0, 1, 0]] * 4)
    changed = torch.where(mask > 0, values, 1e6)
    torch.testing.assert_close(masked_mean(changed, mask), values[:, [0, 1, 4]].mean(dim=1))


def test_weighted_logprobs_equal_torchs_cross_entropy():
    logits, targets = torch.randn(2, 6, 13), torch.randint(0, 13, (2, 6))
    targets[0, :4] = -100
    expected = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(-token_logprobs(logits, targets).sum() / (targets >= 0).sum(), expected)
