from __future__ import annotations

import pytest
import torch

from bench.rl.kl import coati_sequence_kl, k1, k3


def test_both_estimates_are_unbiased_under_samples_of_the_policy():
    torch.manual_seed(0)
    p, q = torch.log_softmax(torch.randn(6), -1), torch.log_softmax(torch.randn(6), -1)
    exact = float((p.exp() * (p - q)).sum())
    weights = p.exp()
    assert float((weights * k1(p, q)).sum()) == pytest.approx(exact, rel=1e-5)
    assert float((weights * k3(p, q)).sum()) == pytest.approx(exact, rel=1e-5)


def test_k3_is_never_negative_and_0_for_equal_models():
    torch.manual_seed(0)
    p, q = torch.randn(100), torch.randn(100)
    assert k3(p, q).min() >= 0
    assert k3(p, p).abs().max() == 0
    assert k1(p, q).min() < 0


def test_the_old_estimate_has_the_other_sign_in_its_exponent_and_is_a_mean_over_the_response():
    logp, reference, mask = torch.tensor([[-1.0, -1.0, -5.0]]), torch.tensor([[-2.0, -1.0, -1.0]]), torch.tensor([[1, 1, 0]])
    e = 2.718281828459045
    assert coati_sequence_kl(logp, reference, mask).tolist() == pytest.approx([(e - 2.0) / 2])
    assert float(k3(logp, reference)[0, 0]) == pytest.approx(1 / e)
