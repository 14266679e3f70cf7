"""gemini_cpu: gemini whose chunks lie in host memory between their uses, and are updated there."""

from __future__ import annotations

from typing import Any, ClassVar

from bench.strategies.gemini import Gemini


class GeminiCpu(Gemini):
    """Gemini with static placement in host memory (`placement_policy="cpu"` of ColossalAI v0.2.8)."""

    name = "gemini_cpu"
    description = "ColossalAI Gemini: all chunks sharded and in host memory"
    offloaded = frozenset({"parameters", "gradients", "optimizer"})
    placement: ClassVar[dict[str, Any]] = {"placement_policy": "static", "offload_optim_frac": 1.0, "offload_param_frac": 1.0}
