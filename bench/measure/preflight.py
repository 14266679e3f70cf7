"""Before a job of several ranks loads anything: what its network gives, how far its nodes' clocks lie apart, whether all run the same code.

Torch is imported inside functions, so that the launcher can read what ranks found.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from bench.measure.provenance import code_identity, versions
from bench.record import Part

if TYPE_CHECKING:
    import torch

EXCHANGES = 20
"""Small all-reduces: the latency is their median, the clocks' offset is bounded by the tightest of them."""
LARGE_REPEATS = 3
LARGE_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
"""Of the all-reduce that the bandwidth is taken from: a gradient bucket's order of size."""
CLOCK_LIMIT_SECONDS = 0.25
"""Offset above which telemetry (2 Hz) of one node would be laid to another's lap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What one rank contributes."""

    rank: int
    node: int
    latency_seconds: float
    large_seconds: float
    entries: Sequence[float]
    """Wall time before each exchange, seconds since the epoch by this host."""
    exits: Sequence[float]
    """Wall time after it."""
    code: Mapping[str, str | None]
    """Versions and identity of package and image."""


def preflight(device: torch.device, node: int) -> dict[str, Any]:
    """Measure over the process group; every rank calls it, and every rank gets the same plain values back. Collective."""
    import torch.distributed as dist

    begin = time.perf_counter()
    entries, exits, latency = _exchange(device)
    own = Seen(
        rank=dist.get_rank(), node=node, latency_seconds=latency, large_seconds=_large(device), entries=entries, exits=exits,
        code={**versions(), **code_identity()},
    )  # fmt: skip
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, asdict(own))
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
    found = summed_up([Seen(**seen) for seen in everyone], LARGE_BYTES[device.type])
    return {"backend": dist.get_backend(), **found, "seconds": time.perf_counter() - begin}


def _exchange(device: torch.device) -> tuple[list[float], list[float], float]:
    """Wall times around small all-reduces, and the median seconds of one."""
    import torch

    value = torch.zeros(1, device=device)
    _reduce(value)  # connects the ranks
    entries, exits, seconds = [], [], []
    for _ in range(EXCHANGES):
        entries.append(time.time())
        seconds.append(_reduce(value))
        exits.append(time.time())
    return entries, exits, median(seconds)


def _large(device: torch.device) -> float:
    """Seconds of the fastest of some large all-reduces."""
    import torch

    values = torch.zeros(LARGE_BYTES[device.type] // 4, device=device)
    _reduce(values)
    return min(_reduce(values) for _ in range(LARGE_REPEATS))


def _reduce(value: torch.Tensor) -> float:
    """Seconds of one all-reduce, the device synchronised at both edges."""
    import torch.distributed as dist

    from bench.measure.clock import synchronise

    synchronise(value.device)
    begin = time.perf_counter()
    dist.all_reduce(value)
    synchronise(value.device)
    return time.perf_counter() - begin


# -- from all ranks ----------------------------------------------------------------------------------------------


def summed_up(seen: Sequence[Seen], large_bytes: int) -> dict[str, Any]:
    """Latency and bandwidth of the slowest rank, and of each node against the first its clock and its differences.

    The bandwidth is that of nccl-tests (`busbw`): 2 (n - 1) / n x bytes / seconds, which does not depend on the number of ranks n.
    """
    ranks, slowest = len(seen), max(item.large_seconds for item in seen)
    first, *others = _by_node(seen)
    return {
        "all_reduce_latency_seconds": max(item.latency_seconds for item in seen),
        "all_reduce_bytes": large_bytes,
        "all_reduce_bytes_per_second": 2 * (ranks - 1) / ranks * large_bytes / slowest,
        "clocks": {str(item.node): _clock(first, item) for item in others},
        "differences": {str(item.node): found for item in others if (found := _differences(first, item))},
    }


def _by_node(seen: Iterable[Seen]) -> list[Seen]:
    """The lowest rank of every node."""
    found: dict[int, Seen] = {}
    for item in sorted(seen, key=lambda item: item.rank):
        found.setdefault(item.node, item)
    return [found[node] for node in sorted(found)]


def _clock(first: Seen, other: Seen) -> dict[str, float]:
    """How far the clock of `other` is ahead of that of `first`, and the largest error of that, in seconds.

    No rank leaves an all-reduce before all have entered it. So each exchange bounds the offset from both sides, as a round trip
    does (Cristian 1989); the tightest bounds over all exchanges count.
    """
    least = max(enter - leave for enter, leave in zip(other.entries, first.exits, strict=True))
    most = min(leave - enter for leave, enter in zip(other.exits, first.entries, strict=True))
    return {"offset_seconds": (least + most) / 2, "error_seconds": abs(most - least) / 2}


def _differences(first: Seen, other: Seen) -> dict[str, list[str | None]]:
    """What is not the same: name -> value on the first node, value on the other."""
    names = sorted(first.code.keys() | other.code.keys())
    return {name: [first.code.get(name), other.code.get(name)] for name in names if first.code.get(name) != other.code.get(name)}


def preflight_of(parts: Iterable[Part]) -> dict[str, Any] | None:
    """What the ranks of a trial found before they began, or None."""
    return next((part.facts["preflight"] for part in parts if "preflight" in part.facts), None)


def preflight_flags(parts: Iterable[Part]) -> list[str]:
    """What a reader must know of the nodes, by their numbers: other versions or another image, a clock that is off."""
    if (found := preflight_of(parts)) is None:
        return []
    flags = [f"node {node} is not the same as the first: {_in_words(values)}" for node, values in found["differences"].items()]
    for node, clock in found["clocks"].items():
        if abs(clock["offset_seconds"]) - clock["error_seconds"] > CLOCK_LIMIT_SECONDS:
            flags.append(f"the clock of node {node} is off by {clock['offset_seconds']:+.1f} s")
    return flags


def _in_words(values: Mapping[str, Sequence[str | None]]) -> str:
    return ", ".join(f"{name} {_short(theirs)} instead of {_short(mine)}" for name, (mine, theirs) in values.items())


def _short(value: str | None) -> str:
    """A version, or the beginning of a hash."""
    return "none" if value is None else value[:12] if len(value) == 64 else value
