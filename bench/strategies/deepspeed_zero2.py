"""deepspeed_zero2: DeepSpeed's ZeRO, stage 2. Parameters whole on every rank; gradients and optimizer states in shards."""

from __future__ import annotations

from bench.strategies.deepspeed_zero import DeepSpeedZero


class DeepSpeedZero2(DeepSpeedZero):
    """DeepSpeed ZeRO-2."""

    name = "deepspeed_zero2"
    stage = 2
    description = "DeepSpeed ZeRO stage 2: gradients and optimizer states in shards"
    sharded = frozenset({"gradients", "optimizer"})
    spends_gradients = True
