"""Memory as it was measured, theory beside it, and what theory does not explain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

from bench.measure.physics import impossible_numbers
from bench.needs import needs
from bench.peak_memory import Moment, peak_moment
from bench.report.device import card_bytes, host_bytes, shape_in
from bench.report.metrics.ppo import is_learning, is_making
from bench.report.registry import GIB, MEMORY_GATES, NoValue, Trial, metric, once

BY_PHASE = "torch.cuda.max_memory_allocated, reset after each phase"


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
    and NCCL's buffers, this does not. Peak reserved where that is more: a peak between two readings, which the driver was not asked in.
    """
    seen = _seen_by_driver(trial)
    with suppress(NoValue):
        seen = max(seen, _reserved(trial))
    return _possible(seen, card_bytes(trial))


@metric(title="host peak", unit="GiB", direction="lower", source="/proc/self/status: VmHWM", clocked=True)
def host_peak_gib(trial: Trial) -> float:
    """Peak resident set of a rank's process; largest rank."""
    value, whole = _host_peak(trial), host_bytes(trial)
    if whole is not None and value > whole:
        raise NoValue(f"withheld: {value / GIB:.1f} GiB of {whole / GIB:.1f} GiB that the node has")
    return value / GIB


def _peak_of(trial: Trial, belongs: Callable[[str], bool]) -> float:
    """Largest allocator peak of some phases and any rank."""
    peaks = [part.memory.phases_peak_allocated_bytes.items() for part in trial.record.parts]
    found = [size for items in peaks for phase, size in items if belongs(phase)]
    if not found:
        raise NoValue("no allocator peak of these phases was recorded")
    return _possible(max(found), card_bytes(trial))


@metric(title="peak of rollout", unit="GiB", direction="lower", source=BY_PHASE, stages=("ppo",), clocked=True)
def peak_rollout_gib(trial: Trial) -> float:
    """Live bytes of the torch allocator at their peak during the rollout, prefill and decode; largest rank."""
    return _peak_of(trial, lambda phase: phase.startswith("rollout"))


@metric(title="peak of scoring", unit="GiB", direction="lower", source=BY_PHASE, stages=("ppo",), clocked=True)
def peak_scoring_gib(trial: Trial) -> float:
    """The same while the four models score the rollout and advantages are made."""
    return _peak_of(trial, lambda phase: is_making(phase) and not phase.startswith("rollout"))


@metric(title="peak of learning", unit="GiB", direction="lower", source=BY_PHASE, stages=("ppo",), clocked=True)
def peak_learning_gib(trial: Trial) -> float:
    """The same while policy and critic learn."""
    return _peak_of(trial, is_learning)


@metric(title="theory: states", unit="GiB", direction="none", source="bench/needs.py; Rajbhandari et al. 2020, section 3.1")
def theory_state_gib(trial: Trial) -> float:
    """Weights, gradients and optimizer states of all models that one rank holds, from the model's sizes, the sharding, the precision
    mode and the LoRA rank. On the device or in host memory, as the strategy places them.
    """
    found = needs(trial.cell, shape_in(trial))
    assert found is not None, "the shape was given"
    return found.state_bytes / GIB


@metric(title="theory: peak", unit="GiB", direction="none", source="bench/peak_memory.py; docs/flops.md")
def theory_peak_gib(trial: Trial) -> float:
    """What one device holds at the largest moment of the loop by theory: states, and what the layers and the loss of a micro-batch keep,
    or what the optimizer makes during its step. Communication buffers and workspaces are left out.
    """
    return _largest_moment(trial).bytes / GIB


@metric(title="unexplained", unit="GiB", direction="none", source="peak allocated less theory: peak", clocked=True)
def unexplained_memory_gib(trial: Trial) -> float:
    """Peak allocated less the theory of it; negative where theory takes too much."""
    return peak_allocated_gib(trial) - theory_peak_gib(trial)


@once
def _largest_moment(trial: Trial) -> Moment:
    shape = shape_in(trial)
    found = peak_moment(trial.cell, shape, length=_longest(trial), heads=_per_micro_batch(trial, "loss_tokens"))
    if found is None:
        raise NoValue(f"no theory of the peak of {shape.model_type}, of which it is not known what its layers keep")
    return found


def _longest(trial: Trial) -> float | None:
    """Tokens of the longest sequence, as the stage told it; None where the cell's own limit stands in for it.

    Where nothing was told and sequences are far shorter than the limit, the mean to which micro-batches were padded: a lower bound.
    """
    settings, told = trial.cell.settings, trial.lead.facts.get("longest_sequence")
    if isinstance(told, int):
        return told
    rows, padded = settings.micro_batch * (2 if trial.cell.stage == "rm" else 1), _per_micro_batch(trial, "padded_tokens")
    return padded / rows if padded and padded / rows < settings.sequence_length / 2 else None


def _per_micro_batch(trial: Trial, unit: str) -> float | None:
    """Mean units of a micro-batch (PPO: of the ptx loss); None where they are not counted."""
    prefix, settings = "ptx_" if trial.cell.stage == "ppo" else "", trial.cell.settings
    units, sequences = (trial.window.total(prefix + name) if trial.window else None for name in (unit, "sequences"))
    rows = settings.micro_batch * (2 if trial.cell.stage == "rm" else 1)
    return rows * units / sequences if units is not None and sequences else None


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


def _possible(value: int, card: int | None) -> float:
    """`value` bytes of a device in GiB; NoValue where it has less."""
    problem = next(iter(impossible_numbers(memory_bytes=value, card_bytes=card)), None)
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
