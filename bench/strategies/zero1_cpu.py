"""zero1_cpu: zero1 with optimizer states and masters in host memory, where they are updated too."""

from __future__ import annotations

from bench.strategies.precision import MASTER_MODES
from bench.strategies.zero import Zero


class Zero1Cpu(Zero):
    """LowLevelZero, stage 1, with cpu_offload."""

    name = "zero1_cpu"
    description = "ColossalAI LowLevelZero stage 1: optimizer states in shards, in host memory"
    precisions = MASTER_MODES
    stage = 1
    sharded = frozenset({"optimizer"})
    offloaded = frozenset({"optimizer"})
