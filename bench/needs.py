"""What a cell needs, from its numbers alone: memory per rank for the states of training, disk for its weights. Torch-free.

The theory counts weights, gradients and optimizer states, in the bytes of the precision mode:

    mode            weight   gradient   optimizer (AdamW's two moments, and the fp32 master where there is one)
    fp32            4        4          8
    bf16-pure       2        2          4
    bf16-master     2        2          12
    bf16-autocast   4        4          8
    fp16-master     2        2          12

Frozen weights (a base under LoRA, PPO's reference policy and reward model) have neither gradients nor states. What a
strategy shards (`Strategy.sharded`) is divided by the data-parallel ranks, rounded up; tensor- and pipeline-parallel ranks hold
equal parts of what trains. What lies in host memory (`Strategy.offloaded`) counts all the same. Not counted: activations, logits,
communication buffers, the fp32 copy of 16-bit gradients that lives during `step()`, and the driver's context; a measured peak lies
above the theory by these. Source of the bytes: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.cell import Cell
from bench.measure.flops import OPTIMIZER_BYTES, WEIGHT_BYTES
from bench.measure.shape import Network, Shape, shape_of
from bench.models.presets import parameter_count
from bench.strategies.base import all_strategies

if TYPE_CHECKING:
    from bench.matrix import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Theory for one rank of a cell, all models of its stage together; bytes."""

    parameters: int
    """Of the base model."""
    trainable: int
    """Parameters that the optimizers update, of all models, over all ranks."""
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and optimizer states."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


def networks(cell: Cell, shape: Shape) -> dict[str, Network]:
    """The models of the cell's stage by role."""
    policy = Network(shape=shape, lora_rank=cell.lora_rank)
    scorer = Network(shape=shape, scalar_head=True, lora_rank=cell.lora_rank)
    if cell.stage == "sft":
        return {"policy": policy}
    if cell.stage == "rm":
        return {"reward": scorer}
    reference, reward = (Network(shape=shape, scalar_head=scalar, frozen=True) for scalar in (False, True))
    return {"policy": policy, "critic": scorer, "reference": reference, "reward": reward}


def needs(cell: Cell, shape: Shape | None = None) -> Needs | None:
    """Theory for `cell`, or None where the shape of its model is not given and unknown before it is loaded."""
    shape = shape or shape_of(cell.model)
    if shape is None:
        return None
    models, sharded = networks(cell, shape).values(), all_strategies()[cell.strategy].sharded
    weights, gradients, states = (sum(parts) for parts in zip(*(model_states(model, cell, sharded) for model in models), strict=True))
    trainable = sum(model.trainable for model in models)
    return Needs(
        parameters=shape.parameters, trainable=trainable, weight_bytes=weights, gradient_bytes=gradients, optimizer_bytes=states
    )  # fmt: skip


def model_states(model: Network, cell: Cell, sharded: frozenset[str]) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer states of one model on one rank."""
    precision, trainable = cell.settings.precision, model.trainable
    slices = 1 if model.frozen else cell.model_parallel_size
    ways = {
        what: slices * (cell.data_parallel_size if what in sharded else 1) for what in ("parameters", "gradients", "optimizer", "frozen")
    }
    own = {what: _share(trainable, ways[what]) for what in ("parameters", "gradients", "optimizer")}
    frozen = _share(model.parameters - trainable, ways["frozen"])
    weights = (frozen + own["parameters"]) * WEIGHT_BYTES[precision]
    return weights, own["gradients"] * WEIGHT_BYTES[precision], own["optimizer"] * OPTIMIZER_BYTES[precision]


def _share(elements: int, ranks: int) -> int:
    return -(-elements // ranks)


def weights_on_disk_bytes(plan: Plan) -> int:
    """Bytes of the checkpoints that a plan leaves on disk: warm starts and chained cells, merged, in the precision's storage type."""
    saved = [warm.cell for warm in plan.warm if warm.cell]
    saved += [plan.cells[cell_id] for block in plan.blocks for cell_id in block.saves]
    return sum(_checkpoint_bytes(cell) for cell in saved)


def _checkpoint_bytes(cell: Cell) -> int:
    shape = shape_of(cell.model)
    if shape is None:
        return (parameter_count(cell.model) or 0) * WEIGHT_BYTES[cell.settings.precision]
    return Network(shape=shape, scalar_head=cell.stage == "rm").parameters * WEIGHT_BYTES[cell.settings.precision]
