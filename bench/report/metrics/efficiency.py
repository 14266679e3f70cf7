"""FLOPs of the trained work, and the share of what the device could have done in the time. Formulas: docs/flops.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.measure.flops import Flops, hfu, mbu, mfu, rollout_bytes, step_flops, total
from bench.measure.physics import impossible_numbers
from bench.report.device import attained_rate, measured_on, peak_of, shape_in
from bench.report.registry import TIME_GATES, NoValue, Trial, metric, once

COUNTED = "bench/measure/flops.py, from the counts of the timed window; docs/flops.md"
PEAK = "model FLOPs over the data sheet's dense peak (bench/measure/devices.py)"
PALM = f"{PEAK}; Chowdhery et al. 2022, appendix B"
POPE = "bytes that decoding must read over the data sheet's bandwidth; Pope et al. 2022, section 2"
ATTAINED = "model FLOPs over what `coati-bench doctor --bench` measured"
LEARNING = ("policy_learn", "critic_learn")


@once
def work_of(trial: Trial) -> dict[str, Flops]:
    """FLOPs of the window by phase, over all ranks; NoValue where shape or counts are not known."""
    counts = trial.timed().counts
    try:
        return step_flops(trial.cell, shape_in(trial), counts)
    except KeyError as missing:
        raise NoValue(f"the laps do not count {missing.args[0]}") from None


def _share(trial: Trial, flops: float, seconds: float, ceiling: float) -> float:
    return mfu(flops, seconds, devices=trial.cell.world_size, peak=ceiling)


@metric(title="model FLOPs per step", unit="TFLOP", direction="none", source=COUNTED)
def model_tflop_per_step(trial: Trial) -> float:
    """Floating-point operations in matrix products of one step over all ranks, on real tokens, nothing twice (PPO: of one iteration,
    rollout and scoring included). 10^12 operations.
    """
    return total(work_of(trial).values()).model / trial.timed().steps / 1e12


@metric(title="model FLOP/s per device", unit="TFLOP/s", direction="higher", source=COUNTED, clocked=True)
def model_tflops_per_second_per_device(trial: Trial) -> float:
    """Model FLOPs of the window over its seconds and the ranks: what one device did for the model, padding and recomputation left out."""
    return _achieved(trial) / 1e12


def _achieved(trial: Trial) -> float:
    return _share(trial, total(work_of(trial).values()).model, trial.timed().elapsed, 1.0)


@metric(title="MFU", unit="share of peak", direction="higher", source=PALM, clocked=True, name="mfu")
def model_flops_utilisation(trial: Trial) -> float:
    """Model FLOPs utilisation: model FLOPs of the window over what all devices could multiply in its time at their dense peak. LoRA
    counts what LoRA needs, not 6N. PPO: the whole iteration, of which decoding is bound by memory, so it is low by nature.
    """
    return _share(trial, total(work_of(trial).values()).model, trial.timed().elapsed, peak_of(trial))


@metric(title="HFU", unit="share of peak", direction="none", source="Korthikanti et al. 2022, section 6", clocked=True, name="hfu")
def hardware_flops_utilisation(trial: Trial) -> float:
    """Hardware FLOPs utilisation: as MFU, with padded positions and the recomputation of activation checkpointing: how busy the device
    was, useful or not.
    """
    flops = total(work_of(trial).values()).hardware
    return hfu(flops, trial.timed().elapsed, devices=trial.cell.world_size, peak=peak_of(trial))


@metric(title="vs attainable", unit="share of attainable", direction="higher", source=ATTAINED, clocked=True)
def vs_attainable(trial: Trial) -> float:
    """As MFU, over the rate of large matrix products measured on the node in the same type: no program reaches the data sheet's peak,
    and a lowered power limit moves it further away.
    """
    if trial.clock_problem:
        raise NoValue(trial.clock_problem)
    return _achieved(trial) / attained_rate(trial)


@metric(title="MFU of learning", unit="share of peak", direction="higher", source=PEAK, stages=("ppo",), clocked=True)
def learning_mfu(trial: Trial) -> float:
    """MFU of the phases policy_learn and critic_learn alone: what compares with MFU of SFT."""
    work = work_of(trial)
    return _share(trial, total(work[name] for name in LEARNING).model, trial.in_phases(*LEARNING), peak_of(trial))


@metric(title="MBU of decoding", unit="share of bandwidth", direction="higher", source=POPE, stages=("ppo",), clocked=True)
def decode_mbu(trial: Trial) -> float:
    """Memory bandwidth utilisation of decoding: weights and key-value cache that every decode step must read, over what the memory could
    deliver in the time of rollout_decode at its peak bandwidth. A lower bound: written bytes and activations are left out.
    """
    if trial.cell.settings.base_weights != "stored":
        raise NoValue("what is read of weights in 8 or 4 bits, and written to unpack them, is not counted")
    row, seconds = measured_on(trial), trial.in_phases("rollout_decode")
    read = rollout_bytes(trial.cell, shape_in(trial), trial.timed().counts)
    return mbu(read, seconds, devices=trial.cell.world_size, bandwidth=row.bandwidth)


# -- physics -----------------------------------------------------------------------------------------------------


def known(share: Callable[[Trial], float], trial: Trial) -> float | None:
    """A share of this trial, or None."""
    try:
        return share(trial)
    except NoValue:
        return None


def too_fast(trial: Trial) -> Iterator[str]:
    """Shares of a peak above 100 %, and rates above that of the node's matrix products."""
    whole, hardware = known(model_flops_utilisation, trial), known(hardware_flops_utilisation, trial)
    attained = known(attained_rate, trial)
    rate = None if attained is None else known(_achieved, trial)
    yield from impossible_numbers(mfu=whole, hfu=hardware, flops_per_second=rate, matrix_rate=attained)
    if trial.cell.stage == "ppo":
        learning, decoding = known(learning_mfu, trial), known(decode_mbu, trial)
        yield from (f"{text} (learning alone)" for text in impossible_numbers(mfu=learning))
        yield from impossible_numbers(mbu=decoding)


TIME_GATES.append(too_fast)
