"""What a metric is, how one is registered, and a record as the metrics see it. The metrics themselves: `bench.report.metrics`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from bench.cell import SETTINGS, Cell
from bench.record import Part, Record
from bench.report.inventory import Row
from bench.report.parity import NOTHING_TRAINED, trained_nothing
from bench.report.windows import Window, cut_window, job_laps

GIB = 2**30
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


class Trial:
    """One record as the metrics see it."""

    def __init__(self, row: Row) -> None:
        self.record: Record = row.record
        self.cell: Cell = row.cell

    @cached_property
    def values(self) -> dict[str, Value]:
        """Every metric of this stage."""
        return {name: self._value(item) for name, item in METRICS.items() if self.cell.stage in item.stages}

    def _value(self, item: Metric) -> Value:
        try:
            return Value(item.compute(self))
        except NoValue as reason:
            return Value(None, str(reason))

    @cached_property
    def window(self) -> Window | None:
        """The laps that count, or None."""
        return cut_window(job_laps(self.record), self.cell.stage)

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
        if self.record.launcher != "torchrun":
            return f"ranks were started by {self.record.launcher}, which makes no timing claims"
        return None

    def timed(self) -> Window:
        """The window of a job whose ranks are all there; NoValue otherwise."""
        missing = sorted(set(range(self.cell.world_size)) - {part.rank for part in self.record.parts})
        if missing:
            raise NoValue(f"ranks without a part: {', '.join(map(str, missing))}")
        if self.window is None:
            raise NoValue("no lap was finished")
        if any(lap.seconds <= 0 for lap in self.window.laps):
            raise NoValue("withheld: a lap took no time, so the clock is wrong")
        return self.window

    def rate(self, unit: str) -> float:
        """Units per second of the window; NoValue if the laps do not count them."""
        window = self.timed()
        total = window.total(unit)
        if total is None:
            raise NoValue(f"the laps do not count {unit}")
        if total == 0:
            raise NoValue(f"the window has no {unit}")
        padded = window.total("padded_tokens")
        if unit in ("loss_tokens", "tokens") and padded is not None and total > padded:
            raise NoValue(f"withheld: {total} {unit} are more than {padded} tokens with padding")
        return total / window.elapsed

    def largest(self, what: str, read: Callable[[Part], int | None]) -> float:
        """Largest value over ranks, in GiB."""
        values = [read(part) for part in self.record.parts]
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            notes = sorted({note for part in self.record.parts for note in part.memory.notes})
            raise NoValue("; ".join(notes) or f"no rank read {what}")
        return self.possible(max(known)) / GIB

    def possible(self, value: int) -> int:
        """`value` bytes, unless the card has less; NoValue then."""
        card = self.record.lead.facts.get("device_total_bytes") if self.record.lead else None
        if isinstance(card, int) and value > card:
            raise NoValue(f"withheld: {value / GIB:.1f} GiB are more than the card's {card / GIB:.1f} GiB")
        return value

    def series(self, name: str) -> list[float]:
        """A series of the job; NoValue if there is none."""
        values = self.lead.series.get(name)
        if name == "loss" and trained_nothing(self.record):
            raise NoValue(NOTHING_TRAINED)
        if not values:
            raise NoValue(f"no series {name!r}")
        return values
