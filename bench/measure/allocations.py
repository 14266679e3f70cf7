"""What the trials of one allocation found of its nodes: their network, their clocks, and whether they run the same code. Torch-free.

Every trial of several ranks measures that before it begins (`bench.measure.preflight`); an allocation's figures are what its trials found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from bench.measure.preflight import preflight_of
from bench.record import SIDE_BY_SIDE, Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """How far a node's clock was ahead of the first node's, where it was furthest off, and the largest error of that."""

    offset_seconds: float
    error_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocated:
    """Nodes that a scheduler gave at once, as trials with the same number of ranks found them."""

    job: str | None
    """The scheduler's number of the job; None outside of one."""
    hosts: tuple[str, ...]
    """Names by the number of the node."""
    ranks: int
    backend: str
    simulated: bool
    """Whether they are parts of one machine, so that nothing here is a network."""
    side_by_side: bool
    """Whether trials shared the devices, and so the links between them."""
    all_reduce_latency_seconds: tuple[float, ...]
    """Of each trial."""
    all_reduce_bytes_per_second: tuple[float, ...]
    clocks: dict[str, Clock]
    """By the node's number; the first one is what the others are held against."""
    differences: dict[str, dict[str, list[str | None]]]
    """Node -> name -> value on the first node, value there."""

    def as_json(self) -> dict[str, Any]:
        """In plain values; of what each trial measured the median and the worst."""
        latency, rate = self.all_reduce_latency_seconds, self.all_reduce_bytes_per_second
        return {
            "job": self.job,
            "hosts": list(self.hosts),
            "ranks": self.ranks,
            "backend": self.backend,
            "simulated_nodes": self.simulated,
            "side_by_side": self.side_by_side,
            "trials": len(latency),
            "all_reduce_latency_seconds": {"median": median(latency), "worst": max(latency)},
            "all_reduce_bytes_per_second": {"median": median(rate), "worst": min(rate)},
            "clocks": {node: asdict(clock) for node, clock in self.clocks.items()},
            "differences": self.differences,
        }


def allocations(records: Iterable[Record]) -> list[Allocated]:
    """The allocations that these records are of, in the order of their first trials; records without a preflight are left out."""
    groups: dict[tuple[Any, ...], list[tuple[Record, Mapping[str, Any]]]] = defaultdict(list)
    for record in records:
        if (found := preflight_of(record.parts)) is not None:
            groups[_job(record), _hosts(record), len(record.parts)].append((record, found))
    return [_fold(job, hosts, ranks, members) for (job, hosts, ranks), members in groups.items()]


def _job(record: Record) -> str | None:
    return (record.provenance.get("scheduler") or {}).get("job")


def _hosts(record: Record) -> tuple[str, ...]:
    """By the number of the node, from what each rank said."""
    return tuple(host for _, host in sorted({part.node: part.hostname for part in record.parts}.items()))


def _fold(job: str | None, hosts: tuple[str, ...], ranks: int, members: Sequence[tuple[Record, Mapping[str, Any]]]) -> Allocated:
    found = [seen for _, seen in members]
    return Allocated(
        job=job, hosts=hosts, ranks=ranks, backend=found[0]["backend"], simulated=any(record.simulated_nodes for record, _ in members),
        side_by_side=any(SIDE_BY_SIDE in record.flags for record, _ in members),
        all_reduce_latency_seconds=tuple(seen["all_reduce_latency_seconds"] for seen in found),
        all_reduce_bytes_per_second=tuple(seen["all_reduce_bytes_per_second"] for seen in found),
        clocks=_furthest(seen["clocks"] for seen in found),
        differences={node: names for seen in found for node, names in seen["differences"].items()},
    )  # fmt: skip


def _furthest(clocks: Iterable[Mapping[str, Mapping[str, float]]]) -> dict[str, Clock]:
    """Of every node the reading that was furthest off."""
    worst: dict[str, Clock] = {}
    for readings in clocks:
        for node, reading in readings.items():
            clock = Clock(offset_seconds=reading["offset_seconds"], error_seconds=reading["error_seconds"])
            if node not in worst or abs(clock.offset_seconds) > abs(worst[node].offset_seconds):
                worst[node] = clock
    return worst
