"""PPO that does not agree with itself is told, and rounding is not."""

from __future__ import annotations

import math

import pytest
import torch

from bench.measure.consistency import TOLERANCES, Tolerance, inconsistency
from bench.rl.kl import k3
from bench.strategies.base import all_strategies

GOOD = {
    "reward": 0.3,
    "kl": 0.02,
    "first_ratio_error": 2e-6,
    "first_approximate_kl": 1e-13,
    "rollout_logprob_error": 3e-6,
    "rollout_kl": 1e-13,
}


def test_every_precision_mode_has_tolerances():
    modes = {mode for strategy in all_strategies().values() for mode in strategy.precisions}
    assert modes <= TOLERANCES.keys()


@pytest.mark.parametrize("precision", TOLERANCES)
def test_what_rounding_does_is_consistent(precision):
    assert inconsistency(GOOD, precision) is None


@pytest.mark.parametrize("name", ["reward", "kl"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_reward_and_kl_must_be_finite(name, value):
    assert inconsistency({**GOOD, name: value}, "fp32") == f"{name} is {value}; a finite number would be right"


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", Tolerance._fields)
@pytest.mark.parametrize("sign", [1, -1])
def test_each_value_is_held_to_the_tolerance_of_its_precision(precision, name, sign):
    most = getattr(TOLERANCES[precision], name)
    assert inconsistency({**GOOD, name: sign * most}, precision) is None
    found = inconsistency({**GOOD, name: sign * most * 1.1}, precision)
    assert found.startswith(f"{name} is ")
    assert f"at most {most:g} is rounding in {precision}" in found


@pytest.mark.parametrize("name", Tolerance._fields)
def test_no_number_is_no_agreement(name):
    assert inconsistency({**GOOD, name: math.nan}, "bf16-master").startswith(f"{name} is nan")


def test_what_was_not_recorded_is_not_judged():
    assert inconsistency({"reward": 1.0, "kl": 0.0}, "fp32") is None


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "bf16-master"), (torch.float16, "fp16-master"), (torch.float32, "fp32")])
@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_tolerances_lie_above_the_rounding_of_logits_and_below_a_shifted_position(dtype, precision, scale):
    """Logits up to 50 (scale 12) that two passes round on their own; and answers for the token before."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2048, 1024, generator=generator) * scale
    noise = torch.randn(logits.shape, generator=generator) * torch.finfo(dtype).eps * logits.abs() / 4
    probabilities = torch.log_softmax(logits, -1)
    tokens = torch.multinomial(probabilities.exp(), 1, generator=generator)

    def logp(values):
        return torch.log_softmax(values.float(), -1).gather(1, tokens)

    one, other = logp(logits.to(dtype)), logp((logits + noise).to(dtype))
    most = TOLERANCES[precision]
    assert torch.expm1(other - one).abs().max() < most.first_ratio_error
    assert (other - one).abs().max() < most.rollout_logprob_error
    assert k3(one, other).mean() < min(most.first_approximate_kl, most.rollout_kl)
    assert k3(one.roll(1, dims=0), one).mean() > most.rollout_kl
