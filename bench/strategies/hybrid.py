"""hybrid: ColossalAI's HybridParallelPlugin. Layers in slices (`tensor_parallel`), in runs (`pipeline_parallel`), the rest data parallel.

With both degrees 1 it is DDP behind Shardformer. What is read only (PPO's reference and reward model) stays whole on every rank.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from bench.cell import Cell
from bench.models.presets import config_numbers
from bench.strategies.base import Engine
from bench.strategies.colossal import INITIAL_LOSS_SCALE, PLUGIN_PRECISION, ColossalStrategy
from bench.strategies.hybrid_slices import hybrid_slices
from bench.strategies.precision import optimizer_problem
from bench.strategies.slices import Slice

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bench.measure.shape import Network


class Hybrid(ColossalStrategy):
    """HybridParallelPlugin without ZeRO."""

    name = "hybrid"
    precisions = frozenset({"fp32", "bf16-master", "fp16-master"})
    description = "ColossalAI HybridParallel: tensor, pipeline and data parallel"
    model_parallel = True
    keeps_buckets = True

    def unsupported(self, cell: Cell) -> str | None:
        """See `Strategy.unsupported`. Words in backquotes are what ColossalAI 0.5.0 says where it is tried all the same."""
        return (
            super().unsupported(cell)
            or optimizer_problem(cell)
            or _architecture_problem(cell)
            or _tensor_problem(cell)
            or _pipeline_problem(cell)
        )

    def slices(self, network: Network, cell: Cell) -> tuple[Slice, ...]:
        """See `Strategy.slices`."""
        return hybrid_slices(network, cell)

    def prepare(self, module: nn.Module, cell: Cell, device: torch.device, *, learning_rate: float) -> Engine:  # noqa: ARG002
        """See `Strategy.prepare`. ColossalAI itself places the model on this rank's device."""
        from bench.strategies.hybrid_engine import HybridEngine, HybridPipelineEngine

        kind = HybridEngine if cell.settings.pipeline_parallel == 1 else HybridPipelineEngine
        return kind(module, cell, _plugin(module, cell), learning_rate=learning_rate)


def _architecture_problem(cell: Cell) -> str | None:
    family, in_a_pipeline = config_numbers(cell.model).get("model_type"), cell.settings.pipeline_parallel > 1
    if family == "opt":
        return "ColossalAI has no policy for OPT with transformers' default attention: `KeyError: 'sdpa'`"
    if family == "gpt2" and cell.stage == "rm" and in_a_pipeline:
        return "ColossalAI's pipeline for GPT-2 makes no causal mask: with a padding mask every position sees those behind it"
    if family == "gpt2" and cell.stage == "sft" and in_a_pipeline:
        return "ColossalAI's pipeline for GPT-2's language-model head needs labels and computes a loss of its own: `UnboundLocalError`"
    return None


def _tensor_problem(cell: Cell) -> str | None:
    ranks, numbers = cell.settings.tensor_parallel, config_numbers(cell.model)
    if ranks > 1 and cell.lora_rank:
        return "tensor parallelism takes no LoRA: Shardformer replaces the layers that carry adapters, and the adapters are gone"
    for name in ("n_head", "num_attention_heads", "num_key_value_heads"):
        if numbers.get(name, ranks) % ranks:
            return f"tensor_parallel {ranks} cuts through the heads of {cell.model}: {name} is {numbers[name]}; `heads must be divisible`"
    if numbers.get("vocab_size", ranks) % ranks:
        return f"tensor_parallel {ranks} does not divide the vocabulary of {cell.model}: {numbers['vocab_size']} tokens"
    return None


def _pipeline_problem(cell: Cell) -> str | None:
    stages = cell.settings.pipeline_parallel
    if stages == 1:
        return None
    if cell.stage == "ppo":
        return "PPO's rollouts need a KV cache, which ColossalAI's pipelines have not; tensor_parallel has; see hpcaitech/ColossalAI#5040"
    if cell.accumulation < stages:
        return (
            f"{cell.accumulation} micro-steps do not fill {stages} stages: `Number of microbatch should be larger than number of stages`; "
            f"a global_batch of {stages} x micro_batch x data-parallel ranks or more would be right"
        )
    return None


def _plugin(module: nn.Module, cell: Cell) -> Any:
    """A fresh HybridParallelPlugin; a plugin serves one model."""
    from colossalai.booster.plugin import HybridParallelPlugin

    from bench.strategies.hybrid_policy import policy_of

    settings = cell.settings
    return HybridParallelPlugin(
        tp_size=settings.tensor_parallel,
        pp_size=settings.pipeline_parallel,
        precision=PLUGIN_PRECISION[settings.precision],
        max_norm=settings.clip_norm or math.inf,
        initial_scale=INITIAL_LOSS_SCALE,
        microbatch_size=settings.micro_batch,
        parallel_output=False,
        custom_policy=policy_of(module),
        make_vocab_size_divisible_by=1,  # padded, it could not be saved, and logits of a tied head would have a column more for each row
    )
