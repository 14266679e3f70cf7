"""What planning knows of a stage, torch-free, and the protocol that the worker drives.

A stage is one file in this folder (the algorithm, top to bottom), its settings in `bench/cell.py`, and one entry in `SPECS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from bench.cell import Cell
    from bench.strategies.base import Engine, Strategy
    from bench.trial import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """A stage as planning and reports see it."""

    name: str
    title: str
    starts: dict[str, str] = field(default_factory=dict)
    """What it begins from: role -> the stage that makes it."""
    unit: str
    """What a lap counts: step or iteration."""
    held_out: dict[str, str]
    """Held-out metric -> `higher` or `lower` is better."""


SPECS: dict[str, StageSpec] = {
    "sft": StageSpec(name="sft", title="Supervised fine-tuning", unit="step", held_out={"loss": "lower"}),
    "rm": StageSpec(
        name="rm", title="Reward model", unit="step", starts={"policy": "sft"},
        held_out={"loss": "lower", "accuracy": "higher", "margin": "higher"},
    ),
    "ppo": StageSpec(
        name="ppo", title="PPO", unit="iteration", starts={"policy": "sft", "reward": "rm"},
        held_out={"reward": "higher", "kl": "lower", "response_tokens": "higher"},
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank is: device and position in the job (from the process group)."""

    device: torch.device
    rank: int
    world_size: int
    model_parallel_size: int = 1
    """Consecutive ranks that hold one model between them and see the same sequences."""
    group: Any = None
    """Process group of one rank from each of those groups, so that every sequence counts once in it; null is all ranks."""
    beat: Callable[[], None] = field(default=lambda: None)
    """Call it now and then in long phases: it renews the heartbeat."""

    @property
    def data_rank(self) -> int:
        """Which share of the sequences this rank sees, of `data_ranks`."""
        return self.rank // self.model_parallel_size

    @property
    def data_ranks(self) -> int:
        """Shares that sequences are cut into."""
        return self.world_size // self.model_parallel_size


@dataclass(slots=True, kw_only=True)
class StepReport:
    """What one call of `advance` did."""

    steps: list[dict[str, float | torch.Tensor]]
    """For each optimizer step, values of the whole job (reduced over ranks): loss, gradient_norm, learning_rate, ...
    Tensors may stay on the device; the worker reads them at the lap's edge."""
    iteration: dict[str, float | torch.Tensor] = field(default_factory=dict)
    """PPO: values of the iteration: reward, kl, entropy, response_tokens, ..."""
    counts: dict[str, int] = field(default_factory=dict)
    """Work of this rank, see `Lap.counts`."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds by phase of this rank (PPO)."""
    phase_peaks: dict[str, int] = field(default_factory=dict)
    """Allocator peak by phase, bytes (PPO on a GPU)."""


class Stage(Protocol):
    """The algorithm of a stage on one rank; made by the `build` function of its module."""

    total: int
    """Steps (PPO: iterations) to run."""
    facts: dict[str, Any]
    """For `Part.facts`: parameters, initial_weights_sha256, lora, switches, ..."""
    engines: dict[str, Engine]
    """What trains, by role: policy, critic, scorer. All that a step leaves behind is in them."""

    def advance(self, index: int) -> StepReport:
        """Run step (PPO: iteration) `index`, from 0. Collective."""

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics of the whole job. Collective, outside the laps."""

    def save(self, folder: str) -> None:
        """Write the trained weights, merged, with tokenizer, in the checkpoint format (rank 0 writes). Collective."""


def build_stage(trial: Trial, strategy: Strategy, place: Place) -> Stage:
    """The stage of `trial` on this rank: loads data and weights, lays the models out."""
    return importlib.import_module(f"bench.stages.{trial.parsed_cell.stage}").build(trial, strategy, place)


def step_count(cell: Cell, training_rows: int) -> int:
    """Steps (PPO: iterations) that `cell` runs on so many training rows."""
    settings = cell.settings
    if cell.stage == "ppo":
        return int(settings.iterations)
    if settings.steps is not None:
        return int(settings.steps)
    return int(settings.epochs) * (training_rows // cell.step_batch)
