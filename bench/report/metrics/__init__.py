"""Derived metrics: one decorated function each, from one record. docs/metrics.md is generated from these files.

A metric without data has no value and says why; it is never 0. To add one, write one function with the decorator in the file of
its kind: old records get it too. The order of the imports below is the order of the columns.
"""

# ruff: noqa: I001

from __future__ import annotations

from bench.report.metrics import speed, efficiency, memory, quality, ppo, cost
from bench.report.metrics.ppo import phase_means
from bench.report.registry import METRICS, Metric, NoValue, Trial, Value

__all__ = ["METRICS", "Metric", "NoValue", "Trial", "Value", "phase_means", "primary_metric"]

MODULES = (speed, efficiency, memory, quality, ppo, cost)
"""Where metrics are registered."""


def primary_metric(stage: str) -> str:
    """The metric that strategies of a stage are compared by."""
    return "response_tokens_per_second" if stage == "ppo" else "loss_tokens_per_second"
