"""PPO: throughputs of its phases, each with a numerator of its own, and what its iterations observed."""

from __future__ import annotations

from collections.abc import Iterator

from bench.measure.physics import PHASE_SLACK
from bench.report.metrics.speed import WINDOW
from bench.report.registry import TIME_GATES, NoValue, Trial, metric

PHASES = "Lap.phases of the timed window"
OTHER = "other"
"""The phase of what no phase claims."""


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


@metric(title="prompts/s", unit="prompts/s", direction="higher", source=WINDOW, stages=("ppo",), clocked=True)
def prompts_per_second(trial: Trial) -> float:
    """Prompts that went through whole iterations: rolled out, scored and learned from."""
    return trial.rate("sequences")


@metric(title="prefill", unit="prompt tokens/s", direction="higher", source=PHASES, stages=("ppo",), clocked=True)
def prefill_tokens_per_second(trial: Trial) -> float:
    """Prompt tokens of all ranks over the seconds of rollout_prefill alone, of its slowest rank."""
    return trial.total("prompt_tokens") / trial.in_phases("rollout_prefill")


@metric(title="decode", unit="response tokens/s", direction="higher", source=PHASES, stages=("ppo",), clocked=True)
def decode_tokens_per_second(trial: Trial) -> float:
    """Response tokens of all ranks over the seconds of rollout_decode alone, of its slowest rank; the first token of each response comes
    from the prefill.
    """
    return trial.total("response_tokens") / trial.in_phases("rollout_decode")


@metric(title="learning", unit="learned tokens/s", direction="higher", source=PHASES, stages=("ppo",), clocked=True)
def learning_tokens_per_second(trial: Trial) -> float:
    """Learned tokens of all ranks over the seconds of policy_learn and critic_learn alone, of their slowest rank; each PPO epoch
    counted.
    """
    return trial.total("learned_tokens") / trial.in_phases("policy_learn", "critic_learn")


def is_learning(phase: str) -> bool:
    """Whether a phase belongs to Coati's `learn`."""
    return "learn" in phase or phase == "ptx"


def is_making(phase: str) -> bool:
    """Whether a phase belongs to Coati's `make_experience`."""
    return not is_learning(phase) and phase not in ("sync", OTHER)


def phase_means(trial: Trial) -> dict[str, float]:
    """Mean seconds per iteration of each phase over the window and the ranks; NoValue where there are none."""
    steps = trial.timed().steps
    return {name: seconds / steps for name, seconds in trial.phases.items()}


def impossible_phases(trial: Trial) -> Iterator[str]:
    """Phases that sum to more than their lap."""
    if trial.window is not None and trial.window.phase_share > PHASE_SLACK:
        yield f"phases above the whole: they sum to {trial.window.phase_share:.0%} of a lap"


TIME_GATES.append(impossible_phases)


@metric(
    title="make experience",
    unit="s",
    direction="lower",
    source="Coati's make_experience; " + PHASES,
    stages=("ppo",),
    clocked=True,
)
def make_experience_seconds(trial: Trial) -> float:
    """Mean seconds per iteration and rank of rollout, scoring and advantages: every phase but learning, synchronising and the rest."""
    return sum(value for name, value in phase_means(trial).items() if is_making(name))


@metric(title="learn", unit="s", direction="lower", source="Coati's learn; " + PHASES, stages=("ppo",), clocked=True)
def learn_seconds(trial: Trial) -> float:
    """Mean seconds per iteration and rank of the updates of policy and critic."""
    return sum(value for name, value in phase_means(trial).items() if is_learning(name))


@metric(title="other", unit="s", direction="lower", source=PHASES, stages=("ppo",), clocked=True)
def other_seconds(trial: Trial) -> float:
    """Mean seconds per iteration and rank that no phase accounts for."""
    means = phase_means(trial)
    if OTHER not in means:
        raise NoValue("the phases have no residual")
    return means[OTHER]


@metric(title="other share", unit="share of iteration", direction="lower", source=PHASES, stages=("ppo",), clocked=True)
def other_share(trial: Trial) -> float:
    """Share of the phases' time that no phase accounts for; it stays within 3 % on a GPU."""
    return other_seconds(trial) / sum(phase_means(trial).values())


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
