"""zero1: ColossalAI's LowLevelZero, stage 1. Parameters and gradients whole on every rank; optimizer states in shards."""

from __future__ import annotations

from bench.strategies.zero import Zero


class Zero1(Zero):
    """LowLevelZero, stage 1."""

    name = "zero1"
    description = "ColossalAI LowLevelZero stage 1: optimizer states in shards"
    stage = 1
    sharded = frozenset({"optimizer"})
