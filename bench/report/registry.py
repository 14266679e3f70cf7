"""What a metric is, how one is registered, and a record as the metrics see it. The metrics themselves: `bench.report.metrics`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from typing import Any, TypeVar, cast

from bench.cell import SETTINGS, Cell
from bench.record import SIDE_BY_SIDE, Lap, Part, Record
from bench.report.inventory import Row
from bench.report.parity import NOTHING_TRAINED, trained_nothing
from bench.report.windows import Window, cut_window, job_laps

GIB = 2**30
SHARED_DEVICES = "trials ran side by side on the same devices"
"""Why what was measured of such trials means nothing."""
SHARE = "share of "
"""Units that begin so are shares of something named."""
STAGES = tuple(SETTINGS)


class NoValue(Exception):  # noqa: N818 (an answer, not an error)
    """Why a metric has no value in a record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A column of results.parquet."""

    name: str
    title: str
    unit: str
    direction: str
    """`higher` or `lower` is better, or `none`."""
    stages: tuple[str, ...]
    source: str
    explanation: str
    clocked: bool
    """A time or memory, which means nothing where the run was emulated, simulated or forked."""
    compute: Callable[[Trial], float]

    @property
    def is_time(self) -> bool:
        """Whether it says something wrong where the clock or the counts are wrong."""
        return self.clocked and self.unit not in ("GiB", "J")

    @property
    def is_share(self) -> bool:
        """Whether tables show it in percent; the data have the share."""
        return self.unit.startswith(SHARE)

    @property
    def shown_unit(self) -> str:
        """The unit in tables."""
        return self.unit.replace(SHARE, "% of ") if self.is_share else self.unit


@dataclass(frozen=True, slots=True)
class Value:
    """A metric of one record: a number, or why there is none."""

    number: float | None
    reason: str | None = None


METRICS: dict[str, Metric] = {}


def metric(
    *, title: str, unit: str, direction: str, source: str, stages: tuple[str, ...] = STAGES, clocked: bool = False, name: str | None = None
) -> Callable[[Callable[[Trial], float]], Callable[[Trial], float]]:
    """Register a function of `Trial`; its docstring is the explanation. It raises NoValue where the record has no data."""

    def register(compute: Callable[[Trial], float]) -> Callable[[Trial], float]:
        key = name or compute.__name__
        text = " ".join((compute.__doc__ or "").split())
        METRICS[key] = Metric(
            name=key,
            title=title,
            unit=unit,
            direction=direction,
            stages=stages,
            source=source,
            explanation=text,
            clocked=clocked,
            compute=compute,
        )
        return compute

    return register


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a report is told that no record says."""

    price: float | None = None
    """Of one device for an hour, in whatever money."""
    ceilings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Matrix products of a device as `doctor --bench` measured them: device name -> type -> FLOP/s."""


NOTHING = Given()
Result = TypeVar("Result")


class Trial:
    """One record as the metrics see it."""

    def __init__(self, row: Row, given: Given = NOTHING) -> None:
        self.record: Record = row.record
        self.cell: Cell = row.cell
        self.given = given
        self.found: dict[str, Any] = {}
        """What `once` keeps."""

    @cached_property
    def values(self) -> dict[str, Value]:
        """Every metric of this stage."""
        return {name: self._value(item) for name, item in METRICS.items() if self.cell.stage in item.stages}

    def _value(self, item: Metric) -> Value:
        if item.is_time and self.impossible_times:
            return Value(None, f"withheld: {self.impossible_times[0]}")
        try:
            return Value(item.compute(self))
        except NoValue as reason:
            return Value(None, str(reason))

    @cached_property
    def window(self) -> Window | None:
        """The laps that count, or None."""
        return cut_window(job_laps(self.record), self.cell.stage)

    def sum_up(self) -> Record:
        """Work everything out, then keep only the sum of the laps, and return the record that is left: a hundred laps are half of it."""
        _ = self.values, self.window, self.impossible
        parts = [replace(part, laps=_one_lap(part.laps)) for part in self.record.parts]
        self.record = replace(self.record, parts=parts)
        self.found.clear()
        return self.record

    @property
    def lead(self) -> Part:
        """The part with the job's series."""
        if self.record.lead is None:
            raise NoValue("no rank left a part")
        return self.record.lead

    @cached_property
    def clock_problem(self) -> str | None:
        """Why times and memory of this record mean nothing, or None."""
        if self.record.emulated:
            return "ColossalAI was emulated on a CPU"
        if self.record.simulated_nodes:
            return "the nodes were simulated on one machine"
        if self.record.launcher == "fork":
            return f"ranks were started by {self.record.launcher}, which makes no timing claims"
        if SIDE_BY_SIDE in self.record.flags:
            return SHARED_DEVICES
        if self.record.resumed_step is not None:
            return "the trial was stopped and went on later"
        return None

    @cached_property
    def impossible_times(self) -> tuple[str, ...]:
        """What physics says against this trial's clock or counts; its times are withheld then."""
        return () if self.clock_problem else tuple(problem for find in TIME_GATES for problem in find(self))

    @cached_property
    def impossible(self) -> tuple[str, ...]:
        """Everything that cannot be true of this trial, which strikes it; nothing is asked of clocks that do not count."""
        memory = () if self.clock_problem else (problem for find in MEMORY_GATES for problem in find(self))
        return (*self.impossible_times, *memory)

    def timed(self) -> Window:
        """The window of a job whose ranks are all there; NoValue otherwise."""
        return _timed(self)

    def total(self, unit: str) -> int:
        """Units of the window; NoValue if the laps do not count them, or there are none."""
        found = self.timed().total(unit)
        if found is None:
            raise NoValue(f"the laps do not count {unit}")
        if found == 0:
            raise NoValue(f"the window has no {unit}")
        return found

    def rate(self, unit: str) -> float:
        """Units per second of the window; NoValue if the laps do not count them."""
        return self.total(unit) / self.timed().elapsed

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of the window by phase, mean over ranks, so that they add up to the window; NoValue where there are none."""
        ranks = self.timed().phases_by_rank
        names = dict.fromkeys(name for phases in ranks for name in phases)
        if not names:
            raise NoValue("the laps have no phases")
        return {name: sum(phases.get(name, 0.0) for phases in ranks) / len(ranks) for name in names}

    def in_phases(self, *names: str) -> float:
        """Seconds of the window in some phases, of the rank that was in them longest; NoValue if none of them took any."""
        seconds = max((sum(phases.get(name, 0.0) for name in names) for phases in self.timed().phases_by_rank), default=0.0)
        if seconds <= 0:
            raise NoValue(f"no time in {' or '.join(names)}")
        return seconds

    def largest(self, what: str, read: Callable[[Part], int | None]) -> int:
        """Largest value over ranks, in bytes; NoValue where a rank has none (0, in older records)."""
        values = [read(part) for part in self.record.parts]
        known = [value for value in values if value]
        if not known or len(known) < len(values):
            notes = sorted({note for part in self.record.parts for note in part.memory.notes})
            raise NoValue("; ".join(notes) or f"no rank read {what}")
        return max(known)

    def series(self, name: str) -> list[float]:
        """A series of the job; NoValue if there is none."""
        values = self.lead.series.get(name)
        if name == "loss" and _trained_nothing(self):
            raise NoValue(NOTHING_TRAINED)
        if not values:
            raise NoValue(f"no series {name!r}")
        return values


def _one_lap(laps: list[Lap]) -> list[Lap]:
    """The sum of some laps, so that what was counted at all stays known."""
    if not laps:
        return []
    counts: dict[str, int] = {}
    for lap in laps:
        for unit, count in lap.counts.items():
            counts[unit] = counts.get(unit, 0) + count
    seconds = sum(lap.seconds for lap in laps)
    return [Lap(first_step=laps[0].first_step, steps=sum(lap.steps for lap in laps), seconds=seconds, counts=dict(counts))]


@dataclass(frozen=True, slots=True)
class _Nothing:
    """A NoValue that was raised; the exception itself would keep what its traceback saw alive."""

    reason: str


def once(compute: Callable[[Trial], Result]) -> Callable[[Trial], Result]:
    """`compute`, which several metrics ask for, worked out once a trial, its NoValue too."""
    name = f"{compute.__module__}.{compute.__name__}"

    @wraps(compute)
    def found(trial: Trial) -> Result:
        if name not in trial.found:
            try:
                trial.found[name] = compute(trial)
            except NoValue as reason:
                trial.found[name] = _Nothing(str(reason))
        if isinstance(trial.found[name], _Nothing):
            raise NoValue(trial.found[name].reason)
        return cast("Result", trial.found[name])

    return found


@once
def _timed(trial: Trial) -> Window:
    missing = sorted(set(range(trial.cell.world_size)) - {part.rank for part in trial.record.parts})
    if missing:
        raise NoValue(f"ranks without a part: {', '.join(map(str, missing))}")
    if trial.window is None:
        raise NoValue("no lap was finished")
    if any(min(lap) <= 0 for lap in trial.window.seconds_by_lap):
        raise NoValue("withheld: a lap took no time, so the clock is wrong")
    return trial.window


@once
def _trained_nothing(trial: Trial) -> bool:
    return trained_nothing(trial.record)


Gate = Callable[[Trial], Iterable[str]]
TIME_GATES: list[Gate] = []
"""Checks of physics on times and counts: each yields what cannot be true."""
MEMORY_GATES: list[Gate] = []
"""Checks of physics on memory."""
