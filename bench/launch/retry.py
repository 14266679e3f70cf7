"""Set finished records aside, so that the next run repeats their trials. Nothing is deleted but notes that something is done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.errors import RecordError, UserError
from bench.launch.inputs import read_done, set_aside
from bench.layout import Layout
from bench.matrix import Plan, make_plan
from bench.record import OUTCOMES, load_record


class Dropped(NamedTuple):
    """How many of each were set aside."""

    records: int
    warm: int


class _Ended(NamedTuple):
    """A trial or a warm start that has ended: its file, how it ended, what it begins from."""

    path: Path
    outcome: str
    begins: tuple[str, ...] = ()
    """Keys of other ones: a warm start's own, or the record's path as text."""
    block: Path | None = None
    """The block that lists it; None for a warm start."""


def set_outcomes_aside(suite: Path, outcomes: set[str], results: Path) -> Dropped:
    """Move the records of `suite` with one of `outcomes`, and warm starts that failed so, into their logs; return how many.

    A trial that could not begin and what it was to begin from go together, whichever of them has such an outcome. The blocks that list
    the records are removed, so that Snakemake runs them again (finished trials are skipped there). Raises UserError for an unknown outcome,
    or if there is no folder `results`.
    """
    outcomes = {outcome.strip() for outcome in outcomes}
    if unknown := sorted(outcomes - set(OUTCOMES)):
        raise UserError(f"--outcome {','.join(unknown)}: no such outcome; choose among {', '.join(OUTCOMES)}")
    if not results.is_dir():
        raise UserError(f"--results {results}: there is no such folder; the one that `coati-bench run` was given would be right")
    made = make_plan(suite)
    layout = Layout(results / made.suite)
    ended = {**dict(_warm(made, layout)), **dict(_trials(made, layout))}
    chosen = _with_starts(ended, {key for key, one in ended.items() if one.outcome in outcomes})
    for key in chosen:
        path, block = ended[key].path, ended[key].block
        if block is None:
            set_aside(path, path.parent / "work")
        else:
            set_aside(path, layout.logs(path.parent.name, int(path.stem)))
            block.unlink(missing_ok=True)
    records = sum(ended[key].block is not None for key in chosen)
    return Dropped(records, len(chosen) - records)


def _warm(made: Plan, layout: Layout) -> Iterator[tuple[str, _Ended]]:
    """Warm starts that failed, by key."""
    for warm in made.warm:
        path = layout.warm(warm.key) / "done.json"
        done = read_done(path)
        if done and done["outcome"] != "ok":
            yield warm.key, _Ended(path, done["outcome"], tuple(warm.starts.values()))


def _trials(made: Plan, layout: Layout) -> Iterator[tuple[str, _Ended]]:
    """Trials that have a readable record, by its path."""
    for block in made.blocks:
        for cell_id in block.cells:
            path = layout.record(cell_id, block.trial)
            try:
                outcome = load_record(path).outcome if path.exists() else None
            except RecordError:
                continue
            if outcome:
                starts = block.starts.get(cell_id, {}).values()
                begins = tuple(str(layout.record(name[5:], block.trial)) if name.startswith("cell:") else name for name in starts)
                yield str(path), _Ended(path, outcome, begins, layout.block(block.block_id))


def _with_starts(ended: dict[str, _Ended], chosen: set[str]) -> set[str]:
    """`chosen`, and what failed for the same reason: errors of what begins from a failure, and the failure itself."""
    links = [
        (key, start)
        for key, one in ended.items()
        for start in one.begins
        if one.outcome == "error" and start in ended and ended[start].outcome != "ok"
    ]
    while more := {name for link in links for name in link if not chosen.isdisjoint(link)} - chosen:
        chosen = chosen | more
    return chosen
