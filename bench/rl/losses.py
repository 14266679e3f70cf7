"""Log-probabilities and losses: pure tensor arithmetic.

Shapes: B sequences, T positions, R response positions, V vocabulary, P preference pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

CHUNK_ELEMENTS = 1 << 26
"""Logits that are held in fp32 at a time (256 MiB)."""


class _TokenLogprobs(torch.autograd.Function):
    """Log-softmax at the targets; keeps the logits and one number a position, never an fp32 copy of all logits."""

    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, targets_BT: Tensor, temperature: float, chunk: int) -> Tensor:
        log_norm_BT = torch.empty(targets_BT.shape, dtype=torch.float32, device=logits_BTV.device)
        chosen_BT = torch.empty_like(log_norm_BT)
        for part in _parts(logits_BTV, chunk):
            scaled = logits_BTV[:, part].float() / temperature
            log_norm_BT[:, part] = torch.logsumexp(scaled, dim=-1)
            chosen_BT[:, part] = scaled.gather(-1, targets_BT[:, part].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        ctx.save_for_backward(logits_BTV, targets_BT, log_norm_BT)
        ctx.temperature, ctx.chunk = temperature, chunk
        return (chosen_BT - log_norm_BT).masked_fill_(targets_BT < 0, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor, None, None, None]:
        logits_BTV, targets_BT, log_norm_BT = ctx.saved_tensors
        grad_logits_BTV = torch.empty_like(logits_BTV)
        weight_BT = grad_BT.masked_fill(targets_BT < 0, 0.0) / ctx.temperature
        for part in _parts(logits_BTV, ctx.chunk):
            weight = weight_BT[:, part].unsqueeze(-1)
            slope = torch.exp(logits_BTV[:, part].float() / ctx.temperature - log_norm_BT[:, part].unsqueeze(-1)).mul_(-weight)
            slope.scatter_add_(-1, targets_BT[:, part].clamp(min=0).unsqueeze(-1), weight)
            grad_logits_BTV[:, part] = slope
        return grad_logits_BTV, None, None, None


def _parts(logits_BTV: Tensor, chunk: int) -> list[slice]:
    """Slices of the positions, so that no part has more than `chunk` logits (but at least one position)."""
    batch, length, vocabulary = logits_BTV.shape
    width = max(1, chunk // max(1, batch * vocabulary))
    return [slice(start, start + width) for start in range(0, length, width)]


def token_logprobs(logits_BTV: Tensor, targets_BT: Tensor, *, temperature: float = 1.0, chunk: int = CHUNK_ELEMENTS) -> Tensor:
    """Return log softmax(logits / temperature) at each target, shape BT, fp32; 0 where the target is negative.

    The logits at position t belong to the target at position t: shift before. Differentiable once. The backward pass
    recomputes the softmax in parts, so 16-bit logits are never copied whole to fp32.

    >>> token_logprobs(torch.zeros(1, 2, 4), torch.tensor([[3, -100]])).exp()
    tensor([[0.2500, 1.0000]])
    """
    return _TokenLogprobs.apply(logits_BTV, targets_BT, temperature, chunk)


@torch.no_grad()
def token_entropies(logits_BTV: Tensor, *, temperature: float = 1.0, chunk: int = CHUNK_ELEMENTS) -> Tensor:
    """Entropy in nats of softmax(logits / temperature) at each position, shape BT, fp32, without gradient.

    >>> token_entropies(torch.zeros(1, 1, 4)).exp()
    tensor([[4.]])
    """
    entropy_BT = torch.empty(logits_BTV.shape[:2], dtype=torch.float32, device=logits_BTV.device)
    for part in _parts(logits_BTV, chunk):
        logp = torch.log_softmax(logits_BTV[:, part].float() / temperature, dim=-1)
        entropy_BT[:, part] = -(logp.exp() * logp).sum(dim=-1)
    return entropy_BT


def pair_losses(margin_P: Tensor, kind: str) -> Tensor:
    """Loss of each preference pair, of margin = score of chosen - score of rejected; stable for any margin.

    `log_sig` is -log sigmoid(margin), `log_exp` is log(1 + exp(-margin)): the same function (Bradley and Terry 1952;
    Ouyang et al. 2022, equation 1), written in the two ways of coati v0.2.8's `PairWiseLoss` and `LogExpLoss`.

    >>> pair_losses(torch.tensor([0.0, 200.0, -200.0]), "log_exp")
    tensor([  0.6931,   0.0000, 200.0000])
    """
    if kind == "log_sig":
        return -functional.logsigmoid(margin_P)
    assert kind == "log_exp", kind
    return torch.logaddexp(torch.zeros_like(margin_P), -margin_P)


def policy_terms(logp_BR: Tensor, old_logp_BR: Tensor, advantages_BR: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Clipped policy loss of each token and where the clip was in force (Schulman et al. 2017, equation 7).

    >>> terms, clipped = policy_terms(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), torch.tensor([[2.0, 2.0]]), 0.2)
    >>> terms, clipped
    (tensor([[-2.0000, -2.4000]]), tensor([[False,  True]]))
    """
    ratio_BR = torch.exp(logp_BR - old_logp_BR)
    free_BR = -advantages_BR * ratio_BR
    clipped_BR = -advantages_BR * ratio_BR.clamp(1.0 - clip, 1.0 + clip)
    return torch.maximum(free_BR, clipped_BR), clipped_BR > free_BR


def value_terms(values_BR: Tensor, old_values_BR: Tensor, returns_BR: Tensor, clip: float | None) -> Tensor:
    """Clipped squared error of each value, without the factor 1/2 (PPO as in openai/baselines `ppo2/model.py`).

    >>> value_terms(torch.tensor([[2.0]]), torch.tensor([[0.0]]), torch.tensor([[2.0]]), 0.5)
    tensor([[2.2500]])
    """
    free_BR = (values_BR - returns_BR).square()
    if clip is None:
        return free_BR
    near_BR = old_values_BR + (values_BR - old_values_BR).clamp(-clip, clip)
    return torch.maximum(free_BR, (near_BR - returns_BR).square())


def masked_mean(values_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """Mean of each row over the positions whose mask is 1; 0 for a row without any.

    >>> masked_mean(torch.tensor([[1.0, 3.0, 9.0], [1.0, 1.0, 1.0]]), torch.tensor([[1, 1, 0], [0, 0, 0]]))
    tensor([2., 0.])
    """
    weight_BR = mask_BR.to(values_BR.dtype)
    return (values_BR * weight_BR).sum(dim=-1) / weight_BR.sum(dim=-1).clamp(min=1.0)
