"""Estimates of the KL divergence between the policy and another model, from the tokens that the policy sampled.

Shapes: B sequences, R response positions. Names k1 and k3 after Schulman, "Approximating KL Divergence" (2020).
"""

from __future__ import annotations

import torch
from torch import Tensor


def k1(logp_BR: Tensor, other_logp_BR: Tensor) -> Tensor:
    """Return log p - log q at each token: unbiased for KL(p, q) when the tokens are sampled from p; can be negative.

    >>> k1(torch.tensor([[-1.0]]), torch.tensor([[-3.0]]))
    tensor([[2.]])
    """
    return logp_BR - other_logp_BR


def k3(logp_BR: Tensor, other_logp_BR: Tensor) -> Tensor:
    """Return q/p - 1 - log(q/p) at each token: unbiased too, of less variance, never negative.

    >>> k3(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -3.0]]))
    tensor([[0.0000, 1.1353]])
    """
    log_ratio_BR = other_logp_BR - logp_BR
    return torch.expm1(log_ratio_BR) - log_ratio_BR


def coati_sequence_kl(logp_BR: Tensor, other_logp_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """One number a sequence, as in coati v0.2.8's `compute_approx_kl`: the masked mean of e^x - 1 - x, x = log p - log q.

    Its x has the other sign than in `k3`, so under samples of p it estimates no KL; kept for the old semantics.

    >>> coati_sequence_kl(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-2.0, -1.0]]), torch.tensor([[1, 1]]))
    tensor([0.3591])
    """
    log_ratio_BR = logp_BR - other_logp_BR
    weight_BR = mask_BR.to(logp_BR.dtype)
    return ((torch.expm1(log_ratio_BR) - log_ratio_BR) * weight_BR).sum(-1) / weight_BR.sum(-1).clamp(min=1.0)
