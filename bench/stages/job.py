"""What every stage needs of the whole job: sums and rows over data-parallel ranks, and the rows that it trains and is judged on.

Shapes: N rows of the job, n rows of this rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig

from bench.data.formats import read_rows
from bench.data.splits import split_rows
from bench.measure.shape import config_sizes
from bench.stages.base import Place
from bench.trial import Trial


def sum_over_ranks(values: Tensor, place: Place) -> Tensor:
    """Sum of `values` over the data-parallel ranks, the same on each of them. Collective."""
    if place.data_ranks > 1:
        dist.all_reduce(values, op=dist.ReduceOp.SUM, group=place.group)
    return values


def max_over_ranks(values: Tensor, place: Place) -> Tensor:
    """Largest of `values` over the data-parallel ranks. Collective."""
    if place.data_ranks > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=place.group)
    return values


def agreed(flag: Tensor, place: Place) -> bool:
    """Whether `flag` is true on every rank. Collective; the host waits for the device."""
    if place.data_ranks == 1:
        return bool(flag)
    votes = flag.to(torch.int32)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=place.group)
    return bool(votes)


def gather_rows(rows_n: Tensor, place: Place) -> Tensor:
    """Rows of all data-parallel ranks in their order; every rank has as many. Collective."""
    if place.data_ranks == 1:
        return rows_n
    parts = [torch.empty_like(rows_n) for _ in range(place.data_ranks)]
    dist.all_gather(parts, rows_n.contiguous(), group=place.group)
    return torch.cat(parts)


class Split(NamedTuple):
    """Rows to train on and rows kept out of training."""

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


def read_all(trial: Trial, name: str, kind: str) -> list[dict[str, Any]]:
    """All rows of one of the trial's data sets. Raises DataError."""
    return read_rows(Path(trial.datum(name).path), kind, rejected_share=trial.limits.rejected_share).rows


def read_split(trial: Trial, kind: str) -> Split:
    """The rows of the trial's data; held-out ones are drawn by the base seed, so that all trials keep out the same.

    Raises DataError.
    """
    settings = trial.parsed_cell.settings
    path = Path(trial.datum(settings.data).path)
    found = read_rows(path, kind, rejected_share=trial.limits.rejected_share, first=settings.rows)
    return Split(*split_rows(found.rows, settings.held_out_rows, settings.base_seed))


def started_from(trial: Trial) -> dict[str, str]:
    """Role -> sha256 of what the trial begins from."""
    return {item.name: item.sha256 for item in trial.starts}


def model_facts(counts: dict[str, int], initial_sha256: str | None, lora: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """A trained model's facts under the names that reports read."""
    return {
        "model_config": config_sizes(config.to_dict()),
        "parameters": {"total": counts["parameters"], "trainable": counts["trainable"]},
        "initial_weights_sha256": initial_sha256,
        "lora": lora or None,
    }
