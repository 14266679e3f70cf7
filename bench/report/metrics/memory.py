"""Memory as it was measured, theory beside it, and what theory does not explain."""

from __future__ import annotations

from collections.abc import Iterator

from bench.measure.physics import impossible_numbers
from bench.report.device import card_bytes, host_bytes
from bench.report.registry import GIB, MEMORY_GATES, NoValue, Trial, metric


@metric(title="peak allocated", unit="GiB", direction="lower", source="torch.cuda.max_memory_allocated", clocked=True)
def peak_allocated_gib(trial: Trial) -> float:
    """Live bytes of the torch allocator at their peak in the measured loop; largest rank. GiB = 2^30 bytes."""
    return _possible(_allocated(trial), card_bytes(trial))


@metric(title="peak reserved", unit="GiB", direction="lower", source="torch.cuda.max_memory_reserved", clocked=True)
def peak_reserved_gib(trial: Trial) -> float:
    """Bytes that the torch allocator held, cached blocks included; largest rank."""
    return _possible(_reserved(trial), card_bytes(trial))


@metric(title="device memory", unit="GiB", direction="lower", source="NVML memory info, idle baseline subtracted", clocked=True)
def device_memory_gib(trial: Trial) -> float:
    """What the driver saw used, polled from outside the training process, less the idle baseline; largest device. Torch misses the context
    and NCCL's buffers, this does not.
    """
    return _possible(_seen_by_driver(trial), card_bytes(trial))


@metric(title="host peak", unit="GiB", direction="lower", source="/proc/self/status: VmHWM", clocked=True)
def host_peak_gib(trial: Trial) -> float:
    """Peak resident set of a rank's process; largest rank."""
    return _possible(_host_peak(trial), host_bytes(trial))


def _allocated(trial: Trial) -> int:
    return trial.largest("peak_allocated_bytes", lambda part: part.memory.peak_allocated_bytes)


def _reserved(trial: Trial) -> int:
    return trial.largest("peak_reserved_bytes", lambda part: part.memory.peak_reserved_bytes)


def _host_peak(trial: Trial) -> int:
    return trial.largest("host_peak_bytes", lambda part: part.memory.host_peak_bytes)


def _seen_by_driver(trial: Trial) -> int:
    peaks = trial.record.observed.get("device_memory_peak_bytes")
    values = [value for value in peaks.values() if isinstance(value, int)] if isinstance(peaks, dict) else []
    if not values:
        raise NoValue("no device was observed from outside")
    return max(values)


def _possible(value: int, whole: int | None) -> float:
    """`value` bytes in GiB; NoValue where there is less."""
    problem = next(iter(impossible_numbers(memory_bytes=value, card_bytes=whole)), None)
    if problem:
        raise NoValue(f"withheld: {problem}")
    return value / GIB


def impossible_memory(trial: Trial) -> Iterator[str]:
    """More memory on a device than it has."""
    for read in (_allocated, _reserved, _seen_by_driver):
        try:
            yield from impossible_numbers(memory_bytes=read(trial), card_bytes=card_bytes(trial))
        except NoValue:
            continue


MEMORY_GATES.append(impossible_memory)
