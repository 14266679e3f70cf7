"""The learning rate over the steps of a stage. Torch-free."""

from __future__ import annotations

import math


def learning_rate_at(step: int, total: int, *, peak: float, schedule: str, warmup_share: float) -> float:
    """Learning rate of step `step` (from 0) of `total`.

    It rises linearly from 0 in the ceil(warmup_share x total) warm-up steps, and then is constant or falls to 0 along half a
    cosine. No step is spent at rate 0: the first warm-up step has peak / (warm-up steps + 1).

    >>> [round(learning_rate_at(step, 6, peak=3.0, schedule="cosine", warmup_share=0.3), 3) for step in range(6)]
    [1.0, 2.0, 3.0, 2.561, 1.5, 0.439]
    >>> [learning_rate_at(step, 3, peak=2.0, schedule="constant", warmup_share=0.1) for step in range(3)]
    [1.0, 2.0, 2.0]
    """
    warmup = math.ceil(warmup_share * total)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    assert schedule == "cosine", schedule
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
