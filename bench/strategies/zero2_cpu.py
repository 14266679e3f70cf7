"""zero2_cpu: zero2 with optimizer states and masters in host memory, where they are updated too."""

from __future__ import annotations

from bench.strategies.precision import MASTER_MODES
from bench.strategies.zero import Zero


class Zero2Cpu(Zero):
    """LowLevelZero, stage 2, with cpu_offload."""

    name = "zero2_cpu"
    description = "ColossalAI LowLevelZero stage 2: gradients and optimizer states in shards, the states in host memory"
    precisions = MASTER_MODES
    stage = 2
    sharded = frozenset({"gradients", "optimizer"})
    offloaded = frozenset({"optimizer"})
