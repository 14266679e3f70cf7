"""Whether a PPO iteration agrees with itself: gate 5 of docs on measurement. Torch-free arithmetic on the values of one iteration.

Before anything is learned, the learner is the policy that sampled. So the probability ratio of the first mini-batch is 1, its KL is 0,
and the log-probabilities of the rollout (decoded token by token, with a KV cache) are those of the learner's forward pass. A rollout
engine that answers for other weights, another temperature or a shifted position breaks that, while losses still look fine and every
time is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple


class Tolerance(NamedTuple):
    """Largest deviations that rounding explains."""

    first_ratio_error: float
    """Largest |ratio - 1| over the tokens of the first mini-batch."""
    first_approximate_kl: float
    """Its mean KL (k3) per token."""
    rollout_logprob_error: float
    """Largest difference of rollout and learner over all response tokens."""
    rollout_kl: float
    """The mean KL (k3) per token between both."""


_FP32 = Tolerance(1e-3, 1e-6, 1e-2, 1e-5)
_FP16 = Tolerance(0.15, 1e-3, 1.0, 2e-2)
_BF16 = Tolerance(1.0, 1e-2, 8.0, 0.25)

TOLERANCES = {"fp32": _FP32, "fp16-master": _FP16, "bf16-pure": _BF16, "bf16-master": _BF16, "bf16-autocast": _BF16}
"""By precision mode. A log-probability is a logit less a log-sum of logits, each rounded to the type that the head computes in.

Two passes of the learner over the same rows run the same kernels, so the first mini-batch deviates by a last bit at most: at logits
up to 64 that is 4e-6 in fp32, 1/32 in fp16, 1/4 in bf16, a ratio of e^0.5 = 1.6 at the worst token of thousands and a KL of 0.01 on
average. Rollout and learner run other kernels (one position with a cache against all), so every logit may differ, and BLOOM's lie near
400, where bf16 has steps of 2. Seen on tiny models on a CPU: 2e-6 (KL 1e-13) in fp32 and 2e-3 (KL 2e-7) in bf16; an engine that
is wrong by a position or by a temperature of 0.7 gives a KL above 10.
"""

FINITE = ("reward", "kl")


def inconsistency(values: Mapping[str, float], precision: str) -> str | None:
    """What is wrong with the values of one PPO iteration, or None; values that are not there are not judged.

    >>> inconsistency({"reward": 0.5, "kl": 0.1, "first_ratio_error": 0.4}, "fp32")
    'first_ratio_error is 0.4; at most 0.001 is rounding in fp32: before the first update the ratio of new and old probability is 1'
    """
    for name in FINITE:
        if name in values and not math.isfinite(values[name]):
            return f"{name} is {values[name]}; a finite number would be right"
    for name, most in TOLERANCES[precision]._asdict().items():
        value = values.get(name, 0.0)
        if not abs(value) <= most:  # also where it is no number
            return f"{name} is {value:.3g}; at most {most:g} is rounding in {precision}: {_MEANING[name]}"
    return None


_MEANING = {
    "first_ratio_error": "before the first update the ratio of new and old probability is 1",
    "first_approximate_kl": "before the first update the policy is the one that sampled, so their KL is 0",
    "rollout_logprob_error": "the rollout's log-probabilities are those of the learner for the same weights and tokens",
    "rollout_kl": "the rollout samples from the policy that learns, so their KL is 0",
}
