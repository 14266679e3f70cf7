"""From scores to advantages: token rewards, generalised advantage estimation, whitening. Pure tensor arithmetic.

Shapes: B sequences, R response positions. Masks are 1 on response tokens, which come first in each row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def token_rewards(scores_B: Tensor, kl_BR: Tensor, mask_BR: Tensor, *, kl_coef: float, reward_clip: float | None) -> Tensor:
    """Reward of each token: -kl_coef x KL, and at the sequence's last response token the clipped score too.

    Ziegler et al. 2019 (section 2), Ouyang et al. 2022 (equation 2).

    >>> token_rewards(torch.tensor([9.0]), torch.ones(1, 3), torch.tensor([[1, 1, 0]]), kl_coef=0.5, reward_clip=5.0)
    tensor([[-0.5000,  4.5000, -0.0000]])
    """
    weight_BR = mask_BR.to(scores_B.dtype)
    clipped_B = scores_B if reward_clip is None else scores_B.clamp(-reward_clip, reward_clip)
    rewards_BR = -kl_coef * kl_BR * weight_BR
    return rewards_BR.scatter_add(1, last_position(mask_BR).unsqueeze(1), clipped_B.unsqueeze(1))


def last_position(mask_BT: Tensor) -> Tensor:
    """Index of the last position of each row whose mask is 1 (0 for a row without any).

    >>> last_position(torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]))
    tensor([2, 3])
    """
    positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return (mask_BT.long() * positions_T).amax(dim=1)


def generalised_advantages(rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each response token, 0 elsewhere.

    A_t = sum over l of (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, V behind the last token 0
    (Schulman et al. 2016, equation 16); return = advantage + value. The sum is one product with a triangular matrix.

    >>> generalised_advantages(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]]), torch.ones(1, 2), gamma=1.0, lam=0.5)
    (tensor([[0.1250, 0.7500]]), tensor([[0.6250, 1.0000]]))
    """
    weight_BR = mask_BR.to(rewards_BR.dtype)
    values_BR = values_BR * weight_BR
    next_values_BR = torch.cat([values_BR[:, 1:], torch.zeros_like(values_BR[:, :1])], dim=1)
    deltas_BR = (rewards_BR + gamma * next_values_BR - values_BR) * weight_BR
    advantages_BR = (deltas_BR @ _powers(gamma * lam, rewards_BR)) * weight_BR
    return advantages_BR, (advantages_BR + values_BR) * weight_BR


def _powers(base: float, like_BR: Tensor) -> Tensor:
    """Matrix M with M[s, t] = base^(s - t) for s >= t, else 0."""
    positions_R = torch.arange(like_BR.shape[1], device=like_BR.device, dtype=like_BR.dtype)
    distance_RR = positions_R.unsqueeze(1) - positions_R.unsqueeze(0)
    return torch.where(distance_RR >= 0, base ** distance_RR.clamp(min=0), torch.zeros_like(distance_RR))


class Moments(NamedTuple):
    """Mean and (biased) variance of a masked quantity."""

    mean: Tensor
    variance: Tensor


def power_sums(values_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """Return (count, sum, sum of squares) over the masked positions, fp64: adding those of all ranks gives those of the job."""
    weight_BR = mask_BR.double()
    values_BR = values_BR.double()
    return torch.stack([weight_BR.sum(), (values_BR * weight_BR).sum(), (values_BR.square() * weight_BR).sum()])


def moments(sums: Tensor) -> Moments:
    """Mean and variance from `power_sums`.

    >>> moments(power_sums(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1, 1, 0]])))
    Moments(mean=tensor(2., dtype=torch.float64), variance=tensor(1., dtype=torch.float64))
    """
    mean = sums[1] / sums[0]
    return Moments(mean, (sums[2] / sums[0] - mean.square()).clamp(min=0.0))


def whiten(values_BR: Tensor, mask_BR: Tensor, of: Moments) -> Tensor:
    """Shift and scale to mean 0 and variance 1, 0 where the mask is 0."""
    scaled_BR = (values_BR - of.mean.to(values_BR.dtype)) * torch.rsqrt(of.variance.to(values_BR.dtype) + 1e-8)
    return scaled_BR * mask_BR.to(values_BR.dtype)


def explained_variance(errors: Moments, returns: Moments) -> Tensor:
    """Return 1 - Var(returns - values) / Var(returns); 0 where the returns do not vary.

    >>> explained_variance(Moments(torch.tensor(0.0), torch.tensor(1.0)), Moments(torch.tensor(0.0), torch.tensor(4.0)))
    tensor(0.7500)
    """
    ratio = errors.variance / returns.variance.clamp(min=1e-12)
    return torch.where(returns.variance > 1e-12, 1.0 - ratio, torch.zeros_like(ratio))
