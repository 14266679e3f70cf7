"""The tables below a stage's main table: every other figure, in groups, so that the main table fits on a page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from bench.report.analysis import CellResult
from bench.report.metrics import METRICS
from bench.report.tables import Line, Table, identity_columns, metric_column, starts_of_groups

GROUPS: dict[str, tuple[str, ...]] = {
    "Speed and efficiency": (
        "mfu", "hfu", "vs_attainable", "model_tflops_per_second_per_device", "model_tflop_per_step", "learning_mfu", "decode_mbu",
        "loss_tokens_per_second_per_device", "tokens_per_second", "padded_tokens_per_second", "padding_efficiency", "samples_per_second",
        "straggler_ratio", "slowest_node_ratio", "time_to_first_step",
    ),
    "Phases": (
        "prompts_per_second", "prefill_tokens_per_second", "decode_tokens_per_second", "learning_tokens_per_second",
        "prompt_tokens_per_second", "learned_tokens_per_second", "make_experience_seconds", "learn_seconds", "other_seconds", "other_share",
    ),
    "Memory": (
        "peak_allocated_gib", "theory_peak_gib", "unexplained_memory_gib", "theory_state_gib", "peak_rollout_gib",
        "peak_scoring_gib", "peak_learning_gib", "peak_reserved_gib", "device_memory_gib",
        "host_peak_gib",
    ),
    "Losses, quality and sizes": (
        "first_loss", "final_loss", *(name for name in METRICS if name.startswith("held_out_")), "final_reward", "final_kl",
        "first_ratio_error", "rollout_logprob_error", "parameters", "trainable_parameters",
    ),
    "Energy and cost": (
        "energy_per_1000_loss_tokens", "energy_per_iteration", "energy_joules", "trial_energy_per_1000_loss_tokens",
        "trial_energy_per_iteration", "device_hours_per_million_loss_tokens",
        "device_hours_per_1000_iterations", "cost_per_million_loss_tokens", "cost_per_1000_iterations",
    ),
}  # fmt: skip
"""Metrics by group, in the order of their columns; a stage shows those that it has."""


@dataclass(frozen=True, slots=True)
class Detail:
    """One group of figures of a stage."""

    title: str
    table: Table
    absent: tuple[str, ...]
    """Figures that no cell has, with the reason that they share."""


def detail_tables(results: Sequence[CellResult]) -> list[Detail]:
    """The groups of one stage's cells; none where no cell has any figure of a group."""
    return [detail for title, names in GROUPS.items() if (detail := _detail(results, title, names)) is not None]


def _detail(results: Sequence[CellResult], title: str, names: Sequence[str]) -> Detail | None:
    stage = results[0].cell.stage
    own = [name for name in names if stage in METRICS[name].stages]
    there = [name for name in own if any(result.summary(name) for result in results)]
    if not there:
        return None
    makers = [*identity_columns(results), *map(metric_column, there)]
    lines = tuple(
        Line(tuple(make(result) for _, make in makers), result.cell.strategy, first)
        for result, first in zip(results, starts_of_groups(results), strict=True)
    )
    reasons: dict[str, list[str]] = defaultdict(list)
    for name in own:
        if name not in there:
            reasons[_why(results, name)].append(METRICS[name].title)
    absent = tuple(f"{', '.join(titles)}: {reason}" for reason, titles in reasons.items())
    return Detail(title, Table(tuple(column for column, _ in makers), lines, ()), absent)


def _why(results: Sequence[CellResult], name: str) -> str:
    """The reasons why no cell has a figure."""
    return "; ".join(dict.fromkeys(result.why_none(name) for result in results if result.ok)) or "no ok trial"
