"""The table of the nodes that trials ran on: what the network between them gave, how far their clocks lay apart, and who differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from bench.measure.allocations import Allocated, allocations
from bench.report.analysis import CellResult
from bench.report.detail_tables import Detail
from bench.report.registry import SHARED_DEVICES
from bench.report.tables import Column, Line, Table, TableCell
from bench.report.text import DASH, number

TITLE = "Nodes and their network"
MOST_HOSTS = 4
_MICROSECOND, _MILLISECOND, _GIGABYTE = 1e-6, 1e-3, 1e9
_MEASURED = "measured before every trial; the median over trials, and below it the worst"


def node_tables(results: Sequence[CellResult]) -> list[Detail]:
    """The table of the allocations of one stage's trials; none where no trial had more than one rank."""
    found = allocations(trial.record for result in results for trial in result.trials)
    if not found:
        return []
    lines = tuple(Line(tuple(make(it) for _, make in _COLUMNS), "") for it in found)
    return [Detail(TITLE, Table(tuple(column for column, _ in _COLUMNS), lines, ()), ())]


def _hosts(allocated: Allocated) -> TableCell:
    hosts = allocated.hosts
    if len(hosts) <= MOST_HOSTS:
        return TableCell(", ".join(hosts), sort=len(hosts), kind="wrap")
    short = f"{', '.join(hosts[: MOST_HOSTS - 1])} … {hosts[-1]}"
    return TableCell(short, f"{len(hosts)} nodes", len(hosts), "wrap", ", ".join(hosts))


def _timed(allocated: Allocated, values: Sequence[float], unit: float, worst: Callable[[Sequence[float]], float]) -> TableCell:
    middle = median(values) / unit
    note = f"worst {number(worst(values) / unit)}" if len(values) > 1 else ""
    hint = "nodes on one machine have no network between them" if allocated.simulated else ""
    hint = hint or (SHARED_DEVICES if allocated.side_by_side else "")
    return TableCell(number(middle), note, middle, "muted" if hint else "", hint)


def _clock(allocated: Allocated) -> TableCell:
    if not allocated.clocks:
        return TableCell(DASH, sort="", kind="muted", hint="one node has one clock")
    node, clock = max(allocated.clocks.items(), key=lambda item: abs(item[1].offset_seconds))
    offset, error = clock.offset_seconds / _MILLISECOND, clock.error_seconds / _MILLISECOND
    return TableCell(f"{offset:+.2f}", f"± {error:.2f}, node {node}", abs(offset))


def _differences(allocated: Allocated) -> TableCell:
    if not allocated.differences:
        return TableCell("none", sort=0)
    hint = "; ".join(f"node {node}: {', '.join(names)}" for node, names in allocated.differences.items())
    return TableCell(f"node {', '.join(allocated.differences)}", sort=len(allocated.differences), kind="bad", hint=hint)


_COLUMNS: tuple[tuple[Column, Callable[[Allocated], TableCell]], ...] = (
    (Column("job", help="The scheduler's number of the allocation."), lambda it: TableCell(it.job or DASH, sort=it.job or "")),
    (Column("nodes", help="Names of the nodes, node 0 first."), _hosts),
    (Column("ranks", help="Of all nodes.", numeric=True), lambda it: TableCell(str(it.ranks), it.backend, it.ranks)),
    (
        Column("trials", help="With more than one rank.", numeric=True),
        lambda it: TableCell(str(len(it.all_reduce_latency_seconds)), sort=len(it.all_reduce_latency_seconds)),
    ),
    (
        Column("all-reduce latency", "µs", f"Of 4 bytes, {_MEASURED}.", numeric=True),
        lambda it: _timed(it, it.all_reduce_latency_seconds, _MICROSECOND, max),
    ),
    (
        Column("all-reduce bandwidth", "GB/s", f"2 (n - 1) / n x bytes / seconds for n ranks, {_MEASURED}.", numeric=True),
        lambda it: _timed(it, it.all_reduce_bytes_per_second, _GIGABYTE, min),
    ),
    (
        Column("clock offset", "ms", "Of the node furthest off the first one's clock, and the largest error of that.", numeric=True),
        _clock,
    ),
    (Column("differs", help="Nodes whose versions, package, image or locks are not the first one's."), _differences),
)
