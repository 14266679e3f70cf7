"""Going on where a stopped trial last saved: what one rank keeps at a lap's edge, and how it takes that up again.

Data order, learning rates and sampling follow from the seed and the number of the step, so the data position is that number. What must be
kept is the engines' training state, the generators of random numbers, and what the rank had found so far.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.saves import Saves, due
from bench.stages.base import Place, Stage
from bench.trial import Trial


class Resume:
    """Saves of one trial on one rank; does nothing unless the cell's `save_every` asks for it."""

    def __init__(self, trial: Trial, stage: Stage, place: Place) -> None:
        self._stage, self._place = stage, place
        self._every = trial.parsed_cell.settings.save_every
        self._saves = Saves.of(trial, place.rank, place.world_size)

    def begin(self) -> tuple[int, dict[str, Any]]:
        """Take up the newest save: the steps that were done, and what this rank had found; (0, {}) without one. Collective.

        Raises CheckpointError if it cannot be taken up.
        """
        step = 0 if self._every is None else self._agree_on(self._saves.newest() if self._place.rank == 0 else 0)
        if step == 0:
            return 0, {}
        state = self._saves.load(step)
        for name, engine in self._stage.engines.items():
            engine.load_training_state(state["engines"][name])
            self._place.beat()
        set_random_state(state["random"], self._place.device)
        return step, state["found"]

    def is_due(self, first: int, done: int) -> bool:
        """Whether to save now that `done` steps are done, the lap having begun at step `first`."""
        return due(done, first, self._every, self._stage.total)

    def save(self, done: int, found: dict[str, Any]) -> None:
        """Save this rank's state after `done` steps, and `found`, a tree of plain values. Collective."""
        engines = {name: engine.training_state() for name, engine in self._stage.engines.items()}
        self._saves.write(done, {"engines": engines, "random": random_state(self._place.device), "found": found})
        dist.barrier()
        if self._place.rank == 0:
            self._saves.publish(done)

    def _agree_on(self, step: int) -> int:
        """Rank 0's `step`, on every rank."""
        told = torch.tensor([step], device=self._place.device)
        dist.broadcast(told, src=0)
        return int(told)


def random_state(device: torch.device) -> dict[str, Any]:
    """The generators of Python, numpy and torch on this rank, as plain values and tensors."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 (frameworks draw from the global one)
    state = {"python": random.getstate(), "numpy": (kind, np.asarray(keys).tolist(), *rest), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `random_state` gave."""
    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
