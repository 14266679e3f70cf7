"""The largest moment of a cell in device memory, from its numbers alone. Torch-free.

States (`bench.needs`) are always there. On top of them comes the largest of some moments, none of which overlap:

* the loss of a micro-batch: what its layers keep for the backward pass, its logits with their gradient; and the gradients, if an
  earlier micro-step of the same step has left them there;
* the optimizer step: all gradients, their fp32 copies in modes with master weights, and what AdamW computes beside them, of all tensors
  at once or tensor by tensor;
* PPO: also scoring (logits without gradient) and the rollout (key-value cache, logits of one position, the draw).

Left out: buffers of communication that come and go, chunks and layers gathered one by one, the workspaces of matrix products (64 MiB
on an H100), and fragmentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.cell import Cell, PpoSettings
from bench.measure.activations import KEPT, cache_bytes, head_bytes, kept_bytes, layer_bytes
from bench.measure.flops import CACHE_BYTES, WEIGHT_BYTES, Sequences
from bench.measure.shape import Network, Shape
from bench.needs import frozen_bytes, frozen_share_bytes, model_states, networks, slice_of, weights_kind
from bench.strategies.base import Strategy, all_strategies
from bench.strategies.precision import MASTER_MODES
from bench.strategies.slices import Slice

DRAW_BYTES = 32
"""Of each logit while a token is drawn: two fp32 copies and three of 64 bits for the noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What one rank's device holds at one moment; bytes."""

    name: str
    state_bytes: int
    """Weights, optimizer states, and gradients as far as they are there."""
    work_bytes: float
    """Everything else."""

    @property
    def bytes(self) -> float:
        """Both."""
        return self.state_bytes + self.work_bytes


def peak_moment(cell: Cell, shape: Shape, *, length: float | None = None, heads: float | None = None) -> Moment | None:
    """The largest moment of any rank; None for an architecture whose activations are not known.

    Both are of a micro-batch of instructions or pairs (PPO: of the ptx loss), padding included. `length`: tokens of the longest
    sequence (default: as many as the cell allows); `heads`: positions that the language-model head computes (default: all).
    """
    if shape.model_type not in KEPT:
        return None
    return max(moments(cell, shape, length=length, heads=heads), key=lambda moment: moment.bytes)


def moments(cell: Cell, shape: Shape, *, length: float | None = None, heads: float | None = None) -> Iterator[Moment]:
    """Every moment that may be the largest, of each pipeline stage; arguments as of `peak_moment`."""
    settings = cell.settings
    rows = settings.micro_batch * (2 if cell.stage == "rm" else 1)
    work = Sequences(count=rows, length=min(length or settings.sequence_length, settings.sequence_length))
    positions = work.positions if heads is None else heads
    for stage in range(settings.pipeline_parallel):
        plan = _Plan.of(cell, shape, stage)
        if isinstance(settings, PpoSettings):
            yield from _ppo_moments(plan, settings, work, positions)
        else:
            yield from _training(plan, next(iter(plan.models)), work, positions)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A rank of a pipeline stage with what its moments are made of."""

    cell: Cell
    shape: Shape
    strategy: Strategy
    models: dict[str, Network]
    held: dict[str, Slice]

    @classmethod
    def of(cls, cell: Cell, shape: Shape, stage: int) -> _Plan:
        models = networks(cell, shape)
        held = {role: slice_of(model, cell, stage) for role, model in models.items()}
        return cls(cell=cell, shape=shape, strategy=all_strategies()[cell.strategy], models=models, held=held)

    def states(self, *, gradients_of: str | None = None, stepping: bool = False) -> int:
        """Bytes of weights and optimizer states of all models on the device, of the gradients of one, which may be stepping, and of what is
        always there.
        """
        found = 0
        in_host = getattr(self.cell.settings, "frozen_placement", "device") == "host"
        for role, model in self.models.items():
            if model.frozen and in_host:
                continue
            held = self.held[role]
            weights, gradients, optimizer = model_states(model, self.cell, held)
            frozen = frozen_share_bytes(model, self.cell, held)
            there = {"frozen": frozen, "parameters": weights - frozen, "optimizer": optimizer}
            there["gradients"] = gradients * self._times_gradients(trains=role == gradients_of, stepping=stepping)
            found += sum(size for what, size in there.items() if what not in self.strategy.offloaded)
            found += self.strategy.reserved_elements(0 if model.frozen else held.trainable) * WEIGHT_BYTES[self.cell.settings.precision]
        return found

    def _times_gradients(self, *, trains: bool, stepping: bool) -> int:
        """How often the gradients of a model, in its storage type, are there."""
        strategy = self.strategy
        if strategy.keeps_buckets:
            return 2 if trains and not stepping else 1
        if stepping and strategy.spends_gradients and self.cell.settings.precision in MASTER_MODES:
            return 0
        return 1 if trains or (strategy.keeps_accumulated and self.cell.accumulation > 1) else 0

    def kept(self, role: str, work: Sequences) -> float:
        """What the layers of a model here keep of a forward pass over `work`."""
        settings, held = self.cell.settings, self.held[role]
        return kept_bytes(
            self.models[role], work, settings.precision, checkpointing=settings.activation_checkpointing, layers=held.layers,
            ways=held.ways,
        ) + self.unpacked_bytes(role) + self.cast_bytes(role)  # fmt: skip

    def cast_bytes(self, role: str) -> float:
        """The layers' matrices in bf16 beside their fp32 under autocast, kept for the backward pass as what it multiplies by."""
        settings, held = self.cell.settings, self.held[role]
        if settings.precision != "bf16-autocast":
            return 0.0
        layers = 1 if settings.activation_checkpointing else held.layers
        return layers * sum(matrix.parameters for matrix in self.shape.matrices) * CACHE_BYTES[settings.precision] / held.ways

    def unpacked_bytes(self, role: str) -> float:
        """The largest weight in 8 or 4 bits, which is there in 16 (fp32: 32) bits while it is multiplied by."""
        model = self.models[role]
        if weights_kind(model, self.cell) == "stored":
            return 0.0
        return float(max(matrix.parameters for matrix in self.shape.matrices) * CACHE_BYTES[self.cell.settings.precision])

    def gathered_bytes(self, role: str) -> float:
        """Weights of a model that come on top of its states at the end of a forward pass: whole beside their shards, or fetched."""
        model, held, sharded = self.models[role], self.held[role], self.strategy.sharded
        if model.frozen:
            return 0.0
        elements = (held.trainable if "parameters" in sharded else 0) + (held.frozen if "frozen" in sharded else 0)
        size = held.trainable * WEIGHT_BYTES[self.cell.settings.precision] if "parameters" in sharded else 0
        size += frozen_bytes(model, self.cell, held) if "frozen" in sharded else 0
        whole = size * self.strategy.gathered_share(elements, self.cell.data_parallel_size) if elements else 0.0
        return max(whole, self._root_bytes(model)) + self._fetched_bytes(model)

    def _root_bytes(self, model: Network) -> float:
        """The embeddings, and a head of its own, where they are gathered as long as the model computes."""
        if not self.strategy.gathers_root:
            return 0.0
        weights = 1 if model.scalar_head or self.shape.tied else 2
        return float(weights * self.shape.head_parameters * CACHE_BYTES[self.cell.settings.precision])

    def _fetched_bytes(self, model: Network) -> float:
        """The head of a model that trains in host memory, which is on the device while logits are computed."""
        if "parameters" not in self.strategy.offloaded or model.lora_rank or model.scalar_head:
            return 0.0
        return float(self.shape.vocabulary * self.shape.hidden * WEIGHT_BYTES[self.cell.settings.precision])

    def left_bytes(self, *, role: str | None = None) -> float:
        """Weights of all models but one that earlier forward passes without gradients have left whole."""
        if not self.strategy.stays_gathered:
            return 0.0
        return sum(self.gathered_bytes(other) for other in self.models if other != role)

    def step_bytes(self, role: str) -> float:
        """What an optimizer step makes beside its states: fp32 copies of 16-bit gradients, and AdamW's square roots of second moments."""
        if "optimizer" in self.strategy.offloaded:
            return 0.0
        settings = self.cell.settings
        held, shares = self.held[role], self.cell.data_parallel_size if "optimizer" in self.strategy.sharded else 1
        elements = self.strategy.updated_at_once(-(-held.trainable // shares))
        copies = 4 if settings.precision in MASTER_MODES and self.strategy.copies_gradients else 0
        largest = min(held.trainable, self.models[role].largest_update // held.ways) / shares
        moment = 2 if settings.precision == "bf16-pure" else 4
        return elements * copies + moment * self._roots(elements, elements if self.strategy.flat_updates else largest)

    def _roots(self, elements: int, largest: float) -> float:
        """Square roots of second moments that are there at once: of all elements, of the largest tensor twice (a quotient beside its
        root), or none, by torch's AdamW.
        """
        optimizer = self.strategy.forced_settings(self.cell).get("optimizer", self.cell.settings.optimizer)
        return {"foreach": elements, "adamw": 2 * largest}.get(optimizer, 0)


def _training(plan: _Plan, role: str, work: Sequences, heads: float, beside: float = 0.0) -> Iterator[Moment]:
    """The moments of one model's training step; `beside`: bytes that lie there while its loss is computed."""
    model, held, precision = plan.models[role], plan.held[role], plan.cell.settings.precision
    one = layer_bytes(model, work, precision, ways=held.ways)
    loss = one if model.scalar_head or not held.last else max(one, head_bytes(plan.shape, heads, precision))
    left = plan.left_bytes(role=role)
    work_bytes = held.in_flight * plan.kept(role, work) + loss + beside + plan.gathered_bytes(role) + left
    earlier = role if plan.cell.accumulation > 1 else None
    yield Moment(name=f"loss of the {role}", state_bytes=plan.states(gradients_of=earlier), work_bytes=work_bytes)
    yield Moment(
        name=f"step of the {role}", state_bytes=plan.states(gradients_of=role, stepping=True), work_bytes=plan.step_bytes(role) + left
    )


def _ppo_moments(plan: _Plan, settings: PpoSettings, ptx: Sequences, ptx_positions: float) -> Iterator[Moment]:
    """`ptx` is a micro-batch of the ptx loss, whose backward pass comes first, while PPO's own layers and logits are still there."""
    whole, precision = settings.prompt_length + settings.response_length, settings.precision
    work, responses = Sequences(count=settings.micro_batch, length=whole), settings.micro_batch * settings.response_length
    if settings.ptx_coef:
        kept = plan.kept("policy", work)
        logits = CACHE_BYTES[precision] * responses * plan.shape.vocabulary
        yield from _training(plan, "policy", ptx, ptx_positions, kept + logits)
    else:
        yield from _training(plan, "policy", work, responses)
    yield from _training(plan, "critic", work, 0)
    gathered = {role: plan.gathered_bytes(role) + plan.left_bytes(role=role) for role in plan.models}
    scoring = head_bytes(plan.shape, responses, precision, gradient=False) + max(gathered.values())
    yield Moment(name="scoring", state_bytes=plan.states(), work_bytes=scoring)
    rows = settings.prompts_per_iteration * plan.cell.step_batch // settings.global_batch / plan.cell.data_parallel_size
    cache = cache_bytes(plan.shape, sequences=rows, length=whole, precision=precision) / plan.held["policy"].ways
    drawing = DRAW_BYTES * rows * plan.shape.vocabulary + gathered["policy"]
    yield Moment(name="rollout", state_bytes=plan.states(), work_bytes=cache + drawing)
