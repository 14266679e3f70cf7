"""Where everything of one suite lies under results/<suite>/, and where this user's cache is. The only place that knows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from bench.errors import UserError

CACHE_VARIABLE = "COATI_BENCH_CACHE"


def expanded(path: str | Path) -> Path:
    """`path` with a `~` at its beginning spelled out. Raises UserError where nobody's home is meant."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no such home folder; seen: {Path(path).parts[0]}; a path without ~ would be right") from None


def cache_folder(cache: Path | None = None) -> Path:
    """Where what outlives a suite lies: `cache`, else the environment's COATI_BENCH_CACHE, else the user's cache folder."""
    given = cache or os.environ.get(CACHE_VARIABLE) or _users_cache()
    return expanded(given).absolute()


def _users_cache() -> Path:
    import platformdirs  # here, as most processes that import this module ask for no cache

    return platformdirs.user_cache_path("coati-bench")


class Layout(NamedTuple):
    """Paths of one suite's results."""

    root: Path

    @property
    def plan(self) -> Path:
        """The expanded suite."""
        return self.root / "plan.json"

    @property
    def report(self) -> Path:
        """Folder of report.html, report.md, results.parquet, results.csv."""
        return self.root / "report"

    @property
    def records(self) -> Path:
        """Folder of all records."""
        return self.root / "records"

    def cell(self, cell_id: str) -> Path:
        """A cell file."""
        return self.root / "cells" / f"{cell_id}.json"

    def block(self, block_id: str) -> Path:
        """The file that a block writes last; it lists the block's records."""
        return self.root / "blocks" / f"{block_id}.json"

    def data(self, name: str) -> Path:
        """The manifest of a fetched or generated data set: {name, path, sha256, rows, ...}."""
        return self.root / "data" / f"{file_name(name)}.json"

    def image(self, name: str) -> Path:
        """What `container build` wrote about an image; beside the suites, since they share it."""
        return self.root.parent / "containers" / f"{name}.json"

    def warm(self, key: str) -> Path:
        """Folder of a warm start: weights/ (checkpoint and tokenizer), record.json, work/, and done.json, written last."""
        return self.root / "warm" / key

    def record(self, cell_id: str, trial: int) -> Path:
        """A record."""
        return self.records / cell_id / f"{trial}.json"

    def telemetry(self, cell_id: str, trial: int) -> Path:
        """What was read of devices and host over a trial (`bench.measure.timeline`)."""
        return self.root / "telemetry" / cell_id / f"{trial}.json.gz"

    def logs(self, cell_id: str, trial: int) -> Path:
        """Work folder of a trial: trial.json, parts, heartbeats, rank<k>.log."""
        return self.root / "logs" / cell_id / str(trial)

    def chained(self, cell_id: str, trial: int) -> Path:
        """Weights that a cell left for its next stage (`warm_start: chain`)."""
        return self.root / "warm" / f"{cell_id}-trial{trial}"


def telemetry_path(record: Path) -> Path:
    """Where the telemetry of the trial with this record goes: its place in the suite, or beside a record that lies elsewhere."""
    records, cell_id = record.parent.parent, record.parent.name
    if records.name == "records" and record.stem.isdigit():
        return Layout(records.parent).telemetry(cell_id, int(record.stem))
    return record.with_name(f"{record.stem}.telemetry.json.gz")


def file_name(name: str) -> str:
    """A data name as one path component."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)
