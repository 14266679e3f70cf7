"""What people see while a suite runs: one line for each thing as its file appears. Torch-free.

Everything is read from the files that the run leaves, never from a log.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.errors import RecordError
from bench.launch.inputs import read_done
from bench.launch.progress import in_one_line, titles
from bench.layout import Layout
from bench.matrix import Plan
from bench.record import load_record

QUIET_SECONDS = 30.0
"""After so long without a line, say what is running."""


class Follower:
    """Says what is new in the folder of a suite, each time it looks."""

    def __init__(self, plan: Plan, layout: Layout, say: Callable[[str], None], quiet: float = QUIET_SECONDS) -> None:
        self._plan, self._layout, self._say, self._quiet = plan, layout, say, quiet
        self._names = titles(plan)
        self._trials = {layout.record(cell_id, block.trial): (cell_id, block.trial) for block in plan.blocks for cell_id in block.cells}
        self._seen = {path: _version(path) for path in self._paths()}
        self.recorded = {path for path in self._trials if path.exists()}
        self._began = self._said = time.monotonic()

    @property
    def planned(self) -> int:
        """Trials of the plan."""
        return len(self._trials)

    def recorded_text(self) -> str:
        """How many trials have a record, in words."""
        return f"{len(self.recorded)} of {self.planned} trials have a record" if self.recorded else "no trial has a record yet"

    def look(self) -> None:
        """Say what has appeared or changed since the last look, or after a long silence what is running."""
        for path in self._paths():
            version = _version(path)
            if version and version != self._seen[path]:
                self._seen[path] = version
                self._tell(self._line(path))
        if time.monotonic() - self._said > self._quiet:
            self._tell(self._running())

    def outcomes(self) -> Counter[str]:
        """How the trials that have a record ended."""
        found: Counter[str] = Counter()
        for path in self._trials:
            if path.exists():
                found[_outcome(path)] += 1
        return found

    def _paths(self) -> Iterator[Path]:
        yield from (self._layout.data(name) for name in self._plan.data)
        yield from (self._layout.warm(warm.key) / "done.json" for warm in self._plan.warm)
        yield from self._trials

    def _tell(self, text: str) -> None:
        self._said = time.monotonic()
        self._say(text)

    def _line(self, path: Path) -> str:
        if path in self._trials:
            self.recorded.add(path)
            return f"[{len(self.recorded)}/{self.planned}] {self._ended(path)}"
        if path.name == "done.json":
            done = read_done(path) or {"outcome": "unreadable"}
            return f"warm start {path.parent.name}: {done['outcome']}{in_one_line(done.get('reason'))}"
        return f"data {path.stem}: ready"

    def _ended(self, path: Path) -> str:
        cell_id, trial = self._trials[path]
        title = self._names[cell_id] + (f" trial {trial}" if self._plan.trials > 1 else "")
        try:
            record = load_record(path)
        except RecordError as error:
            return f"{title}: {error}"
        seconds = record.observed.get("seconds")
        return f"{title}: {record.outcome}{f', {seconds:.1f} s' if seconds is not None else ''}{in_one_line(record.reason)}"

    def _running(self) -> str:
        minutes = (time.monotonic() - self._began) / 60
        beats = [beat for path in self._trials if path not in self.recorded if (beat := self._beat(*self._trials[path]))]
        newest = max(beats, default=None)
        return f"... {len(self.recorded)} of {self.planned} after {minutes:.1f} min" + (f"; running: {newest[1]}" if newest else "")

    def _beat(self, cell_id: str, trial: int) -> tuple[float, str] | None:
        """When a trial that has no record yet gave its last sign, and where it was."""
        path = self._layout.logs(cell_id, trial) / "heartbeat0.json"
        try:
            place = json.loads(path.read_text(encoding="utf-8"))
            return path.stat().st_mtime, f"{self._names[cell_id]}, {place['phase']}, step {place['step']}"
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _outcome(path: Path) -> str:
    try:
        return load_record(path).outcome
    except RecordError:
        return "unreadable"


def _version(path: Path) -> int:
    """Another number for another file at `path`: all are written aside and moved here, so its inode (Snakemake touches times)."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0
