"""zero2: ColossalAI's LowLevelZero, stage 2. Parameters whole on every rank; gradients and optimizer states in shards."""

from __future__ import annotations

from bench.strategies.zero import Zero


class Zero2(Zero):
    """LowLevelZero, stage 2."""

    name = "zero2"
    description = "ColossalAI LowLevelZero stage 2: gradients and optimizer states in shards"
    stage = 2
    sharded = frozenset({"gradients", "optimizer"})
