"""Sampling by inverse CDF from given uniform numbers, so that what is drawn depends on no generator's state.

Shapes: B sequences, R response positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.rollout.base import Sampling


class Drawn(NamedTuple):
    """A token for each sequence and its log-probability."""

    token_B: Tensor
    logp_B: Tensor


def uniform_numbers(seed: int, purpose: str, rows: Sequence[int], length: int) -> Tensor:
    """Numbers in [0, 1), shape BR, fp64, on the CPU: one for each (seed, purpose, row, position), whichever rank asks for the row.

    `purpose` tells iterations and evaluations apart.

    >>> both = uniform_numbers(1, "iteration:0", [4, 7], 3)
    >>> bool((uniform_numbers(1, "iteration:0", [7], 5)[0, :3] == both[1]).all())
    True
    """
    return torch.stack([torch.rand(length, generator=_generator(f"{seed}:{purpose}:{row}"), dtype=torch.float64) for row in rows])


def _generator(key: str) -> torch.Generator:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)


def draw(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> Drawn:
    """One token a row: the first at which the cumulated probability exceeds the row's uniform number.

    >>> rule = Sampling(temperature=1.0, top_k=0, eos=0, pad=0, natural=False)
    >>> draw(torch.zeros(3, 4), torch.tensor([0.0, 0.5, 0.99], dtype=torch.float64), rule).token_B.tolist()
    [1, 2, 3]
    """
    scaled_BV = logits_BV.float() / sampling.temperature
    weights_BV = torch.softmax(_allowed(scaled_BV, sampling), dim=-1)
    cumulated_BV = weights_BV.cumsum(dim=-1, dtype=torch.float64)
    threshold_B1 = (uniform_B * cumulated_BV[:, -1]).unsqueeze(-1)
    token_B1 = torch.searchsorted(cumulated_BV, threshold_B1, right=True).clamp_(max=logits_BV.shape[-1] - 1)
    logp_B = scaled_BV.gather(-1, token_B1).squeeze(-1) - torch.logsumexp(scaled_BV, dim=-1)
    return Drawn(token_B1.squeeze(-1), logp_B)


def _allowed(scaled_BV: Tensor, sampling: Sampling) -> Tensor:
    """The logits with -inf at tokens that may not be drawn."""
    if not sampling.natural:
        scaled_BV = scaled_BV.clone()
        scaled_BV[:, sampling.eos] = -torch.inf
    if sampling.top_k:
        kth_B1 = torch.topk(scaled_BV, min(sampling.top_k, scaled_BV.shape[-1]), dim=-1).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < kth_B1, -torch.inf)
    return scaled_BV
