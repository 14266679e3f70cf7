"""What a cell needs, from its numbers alone: memory per rank for the states of training, disk for its weights. Torch-free.

The theory counts weights, gradients and optimizer states only; activations, buffers and the driver's context come on top.
Bytes per value follow the precision modes (docs/metrics.md). Frozen weights (LoRA) have neither gradients nor states.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.cell import Cell
from bench.matrix import Plan
from bench.models.presets import parameter_count
from bench.strategies.base import all_strategies

WEIGHT_BYTES = {"fp32": 4, "bf16-pure": 2, "bf16-master": 2, "bf16-autocast": 4, "fp16-master": 2}
STATE_BYTES = {"fp32": 8, "bf16-pure": 4, "bf16-master": 12, "bf16-autocast": 8, "fp16-master": 12}
"""AdamW's two moments, and the fp32 master copy where there is one."""
MODELS_TRAINED = {"sft": 1, "rm": 1, "ppo": 2}
MODELS_FROZEN = {"sft": 0, "rm": 0, "ppo": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Theory for one rank of a cell."""

    parameters: int
    """Of the base model."""
    state_bytes: int
    """Weights, gradients and optimizer states of one rank, all models of the stage."""


def needs(cell: Cell) -> Needs | None:
    """Theory for `cell`, or None where the size of its model is unknown before it is loaded."""
    parameters = parameter_count(cell.model)
    if parameters is None:
        return None
    precision, shards = cell.settings.precision, all_strategies()[cell.strategy].sharded
    share = {what: cell.world_size if what in shards else 1 for what in ("parameters", "gradients", "optimizer")}
    weights = parameters * WEIGHT_BYTES[precision]
    trained = 0 if cell.lora_rank else 1
    gradients = trained * parameters * WEIGHT_BYTES[precision] // share["gradients"]
    states = trained * parameters * STATE_BYTES[precision] // share["optimizer"]
    one = weights // share["parameters"] + gradients + states
    return Needs(parameters=parameters, state_bytes=MODELS_TRAINED[cell.stage] * one + MODELS_FROZEN[cell.stage] * weights)


def weights_on_disk_bytes(plan: Plan) -> int:
    """Bytes of the checkpoints that a plan leaves on disk: warm starts and chained cells."""
    saved = [warm.cell for warm in plan.warm if warm.cell]
    saved += [plan.cells[cell_id] for block in plan.blocks for cell_id in block.saves]
    return sum((parameter_count(cell.model) or 0) * (4 if cell.settings.precision in ("fp32", "bf16-autocast") else 2) for cell in saved)
