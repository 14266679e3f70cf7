"""Saves of a trial's training state, so that a trial that was stopped goes on where it last saved.

    <work>-saves/step<k>/rank<r>.pt   one rank's training state after step (PPO: iteration) k, and what it had found until then
    <work>-saves/step<k>/save.json    what it is a save of; written last, before the folder gets its final name

A folder named `step<k>` is complete: every rank has written and synced its file before rank 0 renames the draft. The folder lies beside
the trial's work folder, which every try empties. The supervisor drops it when there is nothing left to go on with.
A rank's file fits that rank of as many; only checkpoints (`bench.checkpoint`) are loaded at another number of ranks.
Torch-free at import.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from bench.record import Outcome, write_json
from bench.trial import Trial
from bench.weights_file import load_plain

SCHEMA = "coati-bench/save/1"
NOTE = "save.json"
_COMPLETE = re.compile(r"step([1-9]\d*)")

FINAL: frozenset[Outcome] = frozenset({"ok", "diverged", "invalid"})
"""Outcomes after which nobody goes on: it is finished, would diverge again, or must be measured anew."""


class Saves(NamedTuple):
    """The saves of one trial, as one rank sees them."""

    folder: Path
    fingerprint: str
    seed: int
    rank: int
    world_size: int

    @classmethod
    def of(cls, trial: Trial, rank: int, world_size: int) -> Saves:
        """Those of `trial`."""
        return cls(saves_folder(trial), trial.fingerprint, trial.seed, rank, world_size)

    def newest(self) -> int:
        """Steps done in the newest complete save of this very trial, 0 if there is none. Leaves no drafts and no other trial's saves.

        For rank 0 alone, before any rank saves.
        """
        steps = []
        for path in sorted(self.folder.glob("step*")):
            found = _COMPLETE.fullmatch(path.name)
            if found and self._is_mine(path, int(found[1])):
                steps.append(int(found[1]))
            else:
                print(f"{path}: not a complete save of this trial; removed", flush=True)
                shutil.rmtree(path)
        return max(steps, default=0)

    def _is_mine(self, folder: Path, step: int) -> bool:
        try:
            note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(note == self._note(step))

    def _note(self, step: int) -> dict[str, Any]:
        return {"schema": SCHEMA, "fingerprint": self.fingerprint, "seed": self.seed, "world_size": self.world_size, "step": step}

    def load(self, step: int) -> dict[str, Any]:
        """What this rank saved after `step` steps. Raises CheckpointError if it cannot be read."""
        path = self.folder / f"step{step}" / f"rank{self.rank}.pt"
        return dict(
            load_plain(path, "training state", f"the file as it was saved, or no {self.folder} at all, to begin at the first step,")
        )

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Write this rank's file of the draft of a save, onto the disk itself."""
        import torch

        draft = self._draft(step)
        draft.mkdir(parents=True, exist_ok=True)
        with (draft / f"rank{self.rank}.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def publish(self, step: int) -> None:
        """Give the draft its final name and remove older saves; for rank 0, when all ranks have written."""
        write_json(self._note(step), self._draft(step) / NOTE)
        self._draft(step).replace(self.folder / f"step{step}")
        for path in self.folder.glob("step*"):
            if path.name != f"step{step}":
                shutil.rmtree(path)

    def _draft(self, step: int) -> Path:
        return self.folder / f"step{step}.draft"


def saves_folder(trial: Trial) -> Path:
    """Where the saves of `trial` lie."""
    return Path(f"{trial.work}-saves")


def drop_saves(trial: Trial, outcome: Outcome) -> None:
    """Remove the saves of a trial that ended so, unless it may go on."""
    if outcome in FINAL:
        shutil.rmtree(saves_folder(trial), ignore_errors=True)


def due(done: int, lap_first: int, every: int | None, total: int) -> bool:
    """Whether to save after `done` steps, at the edge of the lap that began at step `lap_first`.

    >>> [due(done, done - 4, 6, 20) for done in (4, 8, 12, 16, 20)]
    [False, True, True, False, False]
    """
    return every is not None and done < total and done // every > lap_first // every
