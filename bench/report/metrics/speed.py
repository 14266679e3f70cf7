"""Derived metrics: one decorated function each, from one record. docs/metrics.md is generated from this file.

A metric without data has no value and says why; it is never 0. To add one, write one function with the decorator: old
records get it too.
"""

from __future__ import annotations

from statistics import fmean, median
from typing import Any

from bench.report.registry import GIB, METRICS, Metric, NoValue, Trial, Value, metric
from bench.stages.base import SPECS

__all__ = ["METRICS", "Metric", "NoValue", "Trial", "Value", "phase_means", "primary_metric"]

WINDOW = "Lap.counts and Lap.seconds of the timed window"
PHASES = "Lap.phases of the timed window"
PHASE_SLACK = 1.03
"""Phases may exceed the lap by this factor at most."""


# -- speed -------------------------------------------------------------------------------------------------------


@metric(title="loss tokens/s", unit="tokens/s", direction="higher", source=WINDOW, stages=("sft", "rm"), clocked=True)
def loss_tokens_per_second(trial: Trial) -> float:
    """Tokens that carry loss, summed over data-parallel ranks, over the elapsed time of the slowest rank in the timed window.
    Never a mean of rates and never a mean over ranks, which hides the straggler.
    """
    return trial.rate("loss_tokens")


@metric(title="tokens/s", unit="tokens/s", direction="higher", source=WINDOW, stages=("sft", "rm"), clocked=True)
def tokens_per_second(trial: Trial) -> float:
    """Tokens that are not padding, prompts included, over the same window."""
    return trial.rate("tokens")


@metric(title="padded tokens/s", unit="tokens/s", direction="none", source=WINDOW, stages=("sft", "rm"), clocked=True)
def padded_tokens_per_second(trial: Trial) -> float:
    """Tokens with padding over the same window: what the device computed, useful or not."""
    return trial.rate("padded_tokens")


@metric(title="sequences/s", unit="sequences/s", direction="higher", source=WINDOW, clocked=True)
def sequences_per_second(trial: Trial) -> float:
    """Sequences over the same window; a sample of the reward model is a preference pair, two sequences. PPO: rollouts, each also
    learned from.
    """
    return trial.rate("sequences")


@metric(title="loss tokens/s per device", unit="tokens/s", direction="higher", source=WINDOW, stages=("sft", "rm"), clocked=True)
def loss_tokens_per_second_per_device(trial: Trial) -> float:
    """Loss tokens/s divided by every rank of the job."""
    return trial.rate("loss_tokens") / trial.cell.world_size


@metric(title="step time", unit="s", direction="lower", source=WINDOW, clocked=True)
def step_seconds(trial: Trial) -> float:
    """Median over the laps of the window: seconds of the slowest rank / steps of the lap. PPO: seconds of an iteration (one rollout and
    its learning).
    """
    return median(lap.seconds / lap.steps for lap in trial.timed().laps if lap.steps)


@metric(title="straggler ratio", unit="x", direction="lower", source=WINDOW, clocked=True)
def straggler_ratio(trial: Trial) -> float:
    """Seconds of the slowest rank over those of the median rank, summed over the window."""
    totals = [sum(seconds) for seconds in zip(*(lap.seconds_by_rank for lap in trial.timed().laps), strict=True)]
    if len(totals) < 2:
        raise NoValue("one rank has no straggler")
    return max(totals) / median(totals)


@metric(title="padding efficiency", unit="share", direction="higher", source="Lap.counts of the timed window", stages=("sft", "rm"))
def padding_efficiency(trial: Trial) -> float:
    """Tokens that are not padding / tokens with padding, over the timed window. A count, so it holds on any machine."""
    if trial.window is None:
        raise NoValue("no lap was finished")
    tokens, padded = trial.window.total("tokens"), trial.window.total("padded_tokens")
    if tokens is None or not padded:
        raise NoValue("the laps do not count tokens and padded_tokens")
    return tokens / padded


@metric(title="time to first step", unit="s", direction="lower", source="Part.seconds", clocked=True)
def time_to_first_step(trial: Trial) -> float:
    """From the start of a rank to the end of its first step: import, load, shard, compile. Slowest rank."""
    values = [part.seconds["time_to_first_step"] for part in trial.record.parts if "time_to_first_step" in part.seconds]
    if not values:
        raise NoValue("no rank finished a first step")
    return max(values)


# -- memory ------------------------------------------------------------------------------------------------------


@metric(title="peak allocated", unit="GiB", direction="lower", source="torch.cuda.max_memory_allocated", clocked=True)
def peak_allocated_gib(trial: Trial) -> float:
    """Live bytes of the torch allocator at their peak in the measured loop; largest rank. GiB = 2^30 bytes."""
    return trial.largest("peak_allocated_bytes", lambda part: part.memory.peak_allocated_bytes)


@metric(title="peak reserved", unit="GiB", direction="lower", source="torch.cuda.max_memory_reserved", clocked=True)
def peak_reserved_gib(trial: Trial) -> float:
    """Bytes that the torch allocator held, cached blocks included; largest rank."""
    return trial.largest("peak_reserved_bytes", lambda part: part.memory.peak_reserved_bytes)


@metric(title="device memory", unit="GiB", direction="lower", source="NVML memory info, idle baseline subtracted", clocked=True)
def device_memory_gib(trial: Trial) -> float:
    """What the driver saw used, polled from outside the training process, less the idle baseline; largest device. Torch misses the context
    and NCCL's buffers, this does not.
    """
    peaks = trial.record.observed.get("device_memory_peak_bytes")
    values = [value for value in peaks.values() if isinstance(value, int)] if isinstance(peaks, dict) else []
    if not values:
        raise NoValue("no device was observed from outside")
    return trial.possible(max(values)) / GIB


@metric(title="host peak", unit="GiB", direction="lower", source="/proc/self/status: VmHWM", clocked=True)
def host_peak_gib(trial: Trial) -> float:
    """Peak resident set of a rank's process; largest rank."""
    return trial.largest("host_peak_bytes", lambda part: part.memory.host_peak_bytes)


# -- loss --------------------------------------------------------------------------------------------------------


@metric(title="first loss", unit="nats", direction="none", source="Part.series: loss")
def first_loss(trial: Trial) -> float:
    """Loss of the first step: sum of token losses / loss tokens of the whole step, over all ranks and micro-steps. The parity test starts
    here, before any update. PPO: the policy's loss.
    """
    return trial.series("loss")[0]


@metric(title="final loss", unit="nats", direction="lower", source="Part.series: loss", stages=("sft", "rm"))
def final_loss(trial: Trial) -> float:
    """Mean loss of the last lap's steps: single steps are noisy, as each sees other data."""
    return fmean(trial.series("loss")[-trial.cell.settings.lap_steps :])


def _register_held_out() -> None:
    units = {"loss": "nats", "accuracy": "share", "margin": "reward", "reward": "reward", "kl": "nats", "response_tokens": "tokens"}
    names = {name for spec in SPECS.values() for name in spec.held_out}
    for name in sorted(names):
        stages = tuple(stage for stage, spec in SPECS.items() if name in spec.held_out)
        direction = next(spec.held_out[name] for spec in SPECS.values() if name in spec.held_out)
        for edge in ("before", "after"):
            _register_edge(name, edge, units.get(name, ""), direction, stages)


def _register_edge(name: str, edge: str, unit: str, direction: str, stages: tuple[str, ...]) -> None:
    words = name.replace("_", " ")

    def compute(trial: Trial) -> float:
        key = f"{name}_{edge}"
        if key not in trial.lead.held_out:
            raise NoValue(f"no held-out {key} was measured")
        return trial.lead.held_out[key]

    compute.__doc__ = f"Held-out {words} {edge} training, on rows (PPO: prompts) that are never trained on, outside the timed laps."
    metric(
        title=f"held-out {words} {edge}",
        unit=unit,
        direction=direction,
        source="Part.held_out",
        stages=stages,
        name=f"held_out_{name}_{edge}",
    )(compute)


_register_held_out()


# -- PPO ---------------------------------------------------------------------------------------------------------


@metric(title="prompt tokens/s", unit="tokens/s", direction="higher", source=WINDOW, stages=("ppo",), clocked=True)
def prompt_tokens_per_second(trial: Trial) -> float:
    """Prompt tokens that are not padding, over whole iterations."""
    return trial.rate("prompt_tokens")


@metric(title="response tokens/s", unit="tokens/s", direction="higher", source=WINDOW, stages=("ppo",), clocked=True)
def response_tokens_per_second(trial: Trial) -> float:
    """Generated tokens over whole iterations, learning included: what a PPO user waits for."""
    return trial.rate("response_tokens")


@metric(title="learned tokens/s", unit="tokens/s", direction="higher", source=WINDOW, stages=("ppo",), clocked=True)
def learned_tokens_per_second(trial: Trial) -> float:
    """Response tokens that an update was computed from, each PPO epoch counted, over whole iterations."""
    return trial.rate("learned_tokens")


def is_learning(phase: str) -> bool:
    """Whether a phase belongs to Coati's `learn`."""
    return "learn" in phase or phase == "ptx"


def is_making(phase: str) -> bool:
    """Whether a phase belongs to Coati's `make_experience`."""
    return not is_learning(phase) and phase not in ("sync", "other")


def phase_means(trial: Trial) -> dict[str, float]:
    """Mean seconds per iteration of each phase over the window, slowest rank of each lap; NoValue where there are none."""
    window = trial.timed()
    names = list(dict.fromkeys(name for lap in window.laps for name in lap.phases))
    if not names:
        raise NoValue("the laps have no phases")
    for lap in window.laps:
        if sum(lap.phases.values()) > lap.seconds * PHASE_SLACK:
            raise NoValue("withheld: the phases of a lap sum to more than the lap")
    return {name: sum(lap.phases.get(name, 0.0) for lap in window.laps) / window.steps for name in names}


@metric(
    title="make experience",
    unit="s",
    direction="lower",
    source="Coati's make_experience; " + PHASES,
    stages=("ppo",),
    clocked=True,
)
def make_experience_seconds(trial: Trial) -> float:
    """Mean seconds per iteration of rollout, scoring and advantages: every phase but learning, synchronising and the rest."""
    return sum(value for name, value in phase_means(trial).items() if is_making(name))


@metric(title="learn", unit="s", direction="lower", source="Coati's learn; " + PHASES, stages=("ppo",), clocked=True)
def learn_seconds(trial: Trial) -> float:
    """Mean seconds per iteration of the updates of policy and critic."""
    return sum(value for name, value in phase_means(trial).items() if is_learning(name))


@metric(title="other", unit="s", direction="lower", source=PHASES, stages=("ppo",), clocked=True)
def other_seconds(trial: Trial) -> float:
    """Mean seconds per iteration that no phase accounts for; within 3 % of the iteration on a GPU."""
    means = phase_means(trial)
    if "other" not in means:
        raise NoValue("the phases have no residual")
    return means["other"]


def final_of(trial: Trial, name: str) -> float:
    """Last value of a series of the job."""
    return trial.series(name)[-1]


@metric(title="final reward", unit="reward", direction="higher", source="Part.series: reward", stages=("ppo",))
def final_reward(trial: Trial) -> float:
    """Mean reward of the last iteration's rollouts, before the KL penalty."""
    return final_of(trial, "reward")


@metric(title="final KL", unit="nats", direction="none", source="Part.series: kl", stages=("ppo",))
def final_kl(trial: Trial) -> float:
    """KL of policy and reference policy on the last iteration's rollouts."""
    return final_of(trial, "kl")


def largest_of(trial: Trial, name: str) -> float:
    """Largest value of a series of the job."""
    return max(trial.series(name))


@metric(title="first ratio error", unit="share", direction="lower", source="Part.series: first_ratio_error", stages=("ppo",))
def first_ratio_error(trial: Trial) -> float:
    """Largest |ratio - 1| of new and old probability in the first update of any iteration: 0 but for rounding, since nothing was learned
    yet.
    """
    return largest_of(trial, "first_ratio_error")


@metric(title="rollout log-prob error", unit="nats", direction="lower", source="Part.series: rollout_logprob_error", stages=("ppo",))
def rollout_logprob_error(trial: Trial) -> float:
    """Largest difference of a token's log-probability between the rollout engine and the learner, over all iterations."""
    return largest_of(trial, "rollout_logprob_error")


# -- energy ------------------------------------------------------------------------------------------------------


@metric(title="energy", unit="J", direction="lower", source="NVML total energy counter, one reader per node", clocked=True)
def energy_joules(trial: Trial) -> float:
    """Energy that the devices used over the whole trial, start and evaluation included."""
    devices = trial.record.observed.get("devices")
    found = [device.get("energy_joules") for device in devices.values() if isinstance(device, dict)] if isinstance(devices, dict) else []
    values = [float(value) for value in found if isinstance(value, (int, float))]
    if not values or len(values) < len(found):
        raise NoValue("no device counts its energy" if not values else "not every device counts its energy")
    return sum(values)


# -- size --------------------------------------------------------------------------------------------------------


def _parameters(trial: Trial, key: str) -> float:
    counts: Any = trial.lead.facts.get("parameters")
    value = counts.get(key) if isinstance(counts, dict) else None
    if not isinstance(value, int):
        raise NoValue(f"the record has no count of {key} parameters")
    return value


@metric(title="parameters", unit="count", direction="none", source="counted from tensors", name="parameters")
def parameter_total(trial: Trial) -> float:
    """Parameters of the trained model, adapters included; PPO: of the policy."""
    return _parameters(trial, "total")


@metric(title="trainable parameters", unit="count", direction="none", source="counted from tensors")
def trainable_parameters(trial: Trial) -> float:
    """Parameters that the optimizer updates; PPO: of the policy."""
    return _parameters(trial, "trainable")


def primary_metric(stage: str) -> str:
    """The metric that strategies of a stage are compared by."""
    return "response_tokens_per_second" if stage == "ppo" else "loss_tokens_per_second"
