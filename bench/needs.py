"""What a cell needs, from its numbers alone: memory per rank for the states of training, disk for its weights. Torch-free.

The theory counts weights, gradients and optimizer states, in the bytes of the precision mode:

    mode            weight   gradient   optimizer (AdamW's two moments, and the fp32 master where there is one)
    fp32            4        4          8
    bf16-pure       2        2          4
    bf16-master     2        2          12
    bf16-autocast   4        4          8
    fp16-master     2        2          12

Frozen weights (a base under LoRA, PPO's reference policy and reward model) have neither gradients nor states; linear layers in 8
or 4 bits take what `bench.strategies.quantised` says. What a rank holds of a model that is split by tensor or pipeline parallelism the
strategy says (`Strategy.slices`); of that, what it shards (`Strategy.sharded`) is divided by the data-parallel ranks, rounded up.
Where ranks hold unequal parts, the fullest counts. What lies in host memory (`Strategy.offloaded`) counts all the same. Not counted:
activations, logits, communication buffers, the fp32 copy of 16-bit gradients that lives during `step()`, and the driver's context;
a measured peak lies above the theory by these. Source of the bytes: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from bench.cell import Cell
from bench.measure.flops import OPTIMIZER_BYTES, WEIGHT_BYTES
from bench.measure.shape import Network, Shape, shape_of
from bench.models.presets import parameter_count
from bench.strategies.base import all_strategies
from bench.strategies.quantised import small_bytes
from bench.strategies.slices import Slice

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


def needs(cell: Cell, shape: Shape | None = None, *, stage: int | None = None) -> Needs | None:
    """Theory for `cell`: of the rank that holds most, or of those in one pipeline `stage`.

    None where the shape of its model is not given and unknown before it is loaded.
    """
    shape = shape or shape_of(cell.model)
    if shape is None:
        return None
    stages = range(cell.settings.pipeline_parallel) if stage is None else [stage]
    return max((_of_stage(cell, shape, number) for number in stages), key=lambda found: found.state_bytes)


def _of_stage(cell: Cell, shape: Shape, stage: int) -> Needs:
    models = networks(cell, shape).values()
    found = [model_states(model, cell, slice_of(model, cell, stage)) for model in models]
    return Needs(
        parameters=shape.parameters, trainable=sum(model.trainable for model in models),
        weight_bytes=sum(one.weight_bytes for one in found), gradient_bytes=sum(one.gradient_bytes for one in found),
        optimizer_bytes=sum(one.optimizer_bytes for one in found),
    )  # fmt: skip


def slice_of(model: Network, cell: Cell, stage: int) -> Slice:
    """What ranks of a pipeline stage hold of `model` before data-parallel ranks share it; what is not split lies on all."""
    slices = all_strategies()[cell.strategy].slices(model, cell)
    return slices[min(stage, len(slices) - 1)]


def held_by_rank(model: Network, cell: Cell, rank: int) -> Held:
    """What `rank` holds of `model` with its data-parallel peers, for evidence to be held against."""
    held = slice_of(model, cell, rank % cell.model_parallel_size // cell.settings.tensor_parallel)
    return Held(trainable=held.trainable, frozen_bytes=frozen_bytes(model, cell, held))


class Held(NamedTuple):
    """Of one model, before data-parallel ranks share it."""

    trainable: int
    """Parameters."""
    frozen_bytes: int


class States(NamedTuple):
    """Of one model on one rank."""

    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


def model_states(model: Network, cell: Cell, held: Slice) -> States:
    """Bytes of weights, gradients and optimizer states of one model on a rank that holds `held` of it with its data-parallel peers."""
    precision, sharded = cell.settings.precision, all_strategies()[cell.strategy].sharded
    own = {what: _share(held.trainable, cell, what in sharded) for what in ("parameters", "gradients", "optimizer")}
    size = WEIGHT_BYTES[precision]
    weights = frozen_share_bytes(model, cell, held) + own["parameters"] * size
    return States(weights, own["gradients"] * size, own["optimizer"] * OPTIMIZER_BYTES[precision])


def frozen_share_bytes(model: Network, cell: Cell, held: Slice) -> int:
    """Bytes of the weights that never train, on a rank that holds `held` with its data-parallel peers."""
    return _share(frozen_bytes(model, cell, held), cell, "frozen" in all_strategies()[cell.strategy].sharded)


def frozen_bytes(model: Network, cell: Cell, held: Slice) -> int:
    """Bytes of the weights in `held` that never train, before data-parallel ranks share them."""
    size, kind = WEIGHT_BYTES[cell.settings.precision], weights_kind(model, cell)
    if kind == "stored":
        return held.frozen * size
    matrices = model.shape.matrices
    small = held.layers * sum(small_bytes(kind, matrix.fan_in, matrix.fan_out) for matrix in matrices)
    return small + (held.frozen - held.layers * sum(matrix.parameters for matrix in matrices)) * size


def weights_kind(model: Network, cell: Cell) -> str:
    """How the linear layers of `model` that never train are kept: `stored`, `int8` or `nf4`."""
    if model.frozen:
        return str(getattr(cell.settings, "frozen_weights", "stored"))
    return cell.settings.base_weights if model.lora_rank else "stored"


def _share(amount: int, cell: Cell, shared: bool) -> int:
    return -(-amount // (cell.data_parallel_size if shared else 1))


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
