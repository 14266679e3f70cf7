"""Sampling that depends on no generator's state, and hardly on rounding.

Each token of the vocabulary gets a noise of its own, made from a key and the token's number; the token with the largest sum of
log-probability and noise is drawn (the Gumbel-max trick: Maddison, Tarlow and Minka, "A* Sampling", 2014). Two runs with
the same keys so draw the same token unless their probabilities differ by enough to change the winner; a walk along the cumulated
probabilities would add up the rounding of the whole vocabulary. Strategies and precision modes share rollouts thereby.

Shapes: B sequences, R response positions, V vocabulary, K tokens that may be drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.rollout.base import Sampling

LOW = 0xFFFFFFFF
"""The 32 bits that the hash works on, inside int64."""


class Drawn(NamedTuple):
    """A token for each sequence and its log-probability."""

    token_B: Tensor
    logp_B: Tensor


def noise_keys(seed: int, purpose: str, rows: Sequence[int], length: int) -> Tensor:
    """Keys of 63 bits, shape BR, on the CPU: one for each (seed, purpose, row, position), whichever rank asks for the row.

    `purpose` tells iterations and evaluations apart.

    >>> both = noise_keys(1, "iteration:0", [4, 7], 3)
    >>> bool((noise_keys(1, "iteration:0", [7], 5)[0, :3] == both[1]).all())
    True
    """
    return torch.stack([torch.randint(2**63 - 1, (length,), generator=_generator(f"{seed}:{purpose}:{row}")) for row in rows])


def _generator(key: str) -> torch.Generator:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)


def draw(logits_BV: Tensor, key_B: Tensor, sampling: Sampling) -> Drawn:
    """One token a row, by the row's key.

    >>> rule = Sampling(temperature=1.0, top_k=0, eos=0, pad=0, natural=False)
    >>> draw(torch.tensor([[50.0, 0.0, 0.0, 50.0]]), torch.tensor([7]), rule).token_B.tolist()
    [3]
    """
    scaled_BV = logits_BV.float() / sampling.temperature
    allowed_BV = scaled_BV
    if not sampling.natural:
        allowed_BV = scaled_BV.clone()
        allowed_BV[:, sampling.eos] = -torch.inf
    token_B1 = _winner(allowed_BV, key_B, sampling.top_k)
    logp_B = scaled_BV.gather(-1, token_B1).squeeze(-1) - torch.logsumexp(scaled_BV, dim=-1)
    return Drawn(token_B1.squeeze(-1), logp_B)


def _winner(allowed_BV: Tensor, key_B: Tensor, top_k: int) -> Tensor:
    """The drawn token of each row, B1; -inf is never drawn."""
    if top_k and top_k < allowed_BV.shape[-1]:
        values_BK, tokens_BK = torch.topk(allowed_BV, top_k, dim=-1)
    else:
        values_BK, tokens_BK = allowed_BV, torch.arange(allowed_BV.shape[-1], device=allowed_BV.device).expand_as(allowed_BV)
    best_B1 = (values_BK + gumbel(key_B, tokens_BK)).argmax(dim=-1, keepdim=True)
    return tokens_BK.gather(-1, best_B1)


def gumbel(key_B: Tensor, tokens_BK: Tensor) -> Tensor:
    """Standard Gumbel noise of each token, fp32: always the same for the same key and token.

    The largest values, which decide a draw, come from the smallest uniform numbers, where fp32 is finest.
    """
    key_B1 = key_B.unsqueeze(-1)
    bits_BK = _mixed(_mixed(tokens_BK ^ (key_B1 & LOW)) ^ (key_B1 >> 32))
    uniform_BK = ((bits_BK.float() + 0.5) * 2.0**-32).clamp_(max=1.0 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform_BK))


def _mixed(bits: Tensor) -> Tensor:
    """A permutation of 32-bit numbers that leaves no pattern: the form and constants of github.com/skeeto/hash-prospector.

    Both factors have 31 bits, so that no product leaves int64.
    """
    bits = ((bits ^ (bits >> 16)) * 0x21F0AAAD) & LOW
    bits = ((bits ^ (bits >> 15)) * 0x735A2D97) & LOW
    return bits ^ (bits >> 15)
