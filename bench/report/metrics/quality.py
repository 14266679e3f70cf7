"""Losses, held-out figures, and sizes."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from bench.report.registry import NoValue, Trial, metric
from bench.stages.base import SPECS


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
