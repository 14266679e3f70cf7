"""A trial as a file: all that its ranks need to know, and where they leave what they saw. Torch-free."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from bench.cell import STRICT, Cell, cell_from_json, cell_to_json, fingerprint
from bench.record import Input, write_json
from bench.suite import Limits


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class Trial:
    """One repetition of a cell, with everything resolved to files."""

    cell: dict[str, Any]
    """Flat form of the cell."""
    trial: int
    data: list[Input] = field(default_factory=list)
    """The training data, and for PPO the ptx data; `name` is the data's name."""
    starts: list[Input] = field(default_factory=list)
    """What it begins from; `name` is the role: tokenizer, policy, reward. A checkpoint folder each."""
    image: Input | None = None
    """The image's file that its ranks run in, by digest; null where they run in this environment."""
    overlay: Input | None = None
    """A folder with a copy of the checkout that its ranks import in the place of an installed package, by the hash of its files."""
    save_to: str | None = None
    """Folder for the trained weights (merged, with tokenizer); null saves none."""
    work: str
    """Folder of this trial: parts, heartbeats, rank logs."""
    limits: Limits = field(default_factory=Limits)

    @property
    def parsed_cell(self) -> Cell:
        """The cell as a value."""
        return cell_from_json(self.cell)

    @property
    def seed(self) -> int:
        """Seed of data order, sampling and initial adapters."""
        return int(self.cell["base_seed"]) + self.trial

    @property
    def fingerprint(self) -> str:
        """Identity of what this trial computes."""
        starts = [*self.starts, *(item for item in (self.image, self.overlay) if item)]
        return fingerprint(self.parsed_cell, {item.name: item.sha256 for item in self.data}, {item.name: item.sha256 for item in starts})

    def start(self, role: str) -> Input | None:
        """The start with this role, if there is one."""
        return next((item for item in self.starts if item.name == role), None)

    def datum(self, name: str) -> Input:
        """The data set called `name`."""
        return next(item for item in self.data if item.name == name)

    def part_path(self, rank: int) -> Path:
        """Where a rank writes its part."""
        return Path(self.work) / f"part{rank}.json"

    def heartbeat_path(self, rank: int) -> Path:
        """Where a rank says, at least at every lap's edge, that it lives: JSON {phase, step}; the file's mtime is the beat."""
        return Path(self.work) / f"heartbeat{rank}.json"

    def log_path(self, rank: int) -> Path:
        """Where a rank's standard output and error go."""
        return Path(self.work) / f"rank{rank}.log"


_adapter = TypeAdapter(Trial)


def make_trial(cell: Cell, trial: int, **rest: Any) -> Trial:
    """A trial of `cell`."""
    return Trial(cell=cell_to_json(cell), trial=trial, **rest)


def save_trial(trial: Trial, path: Path) -> None:
    """Write the trial file, atomically."""
    write_json(_adapter.dump_python(trial, mode="json"), path)


def load_trial(path: Path) -> Trial:
    """Return the trial in `path`; pydantic's ValidationError if it is none."""
    return _adapter.validate_json(path.read_bytes())
