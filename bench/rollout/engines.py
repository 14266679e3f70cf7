"""Two rollout engines: with a KV cache, and one that computes everything anew for each token.

The second is what coati v0.2.8 did in effect, and what the first is tested against. Both drive the module as a strategy wrapped
it, in whatever mode the caller put it; neither needs a gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.rollout.base import CHECK_EVERY, Rollout, Sampling, Surroundings, forward_arguments
from bench.rollout.sampling import draw


def cache_of(model: Any) -> Callable[[], Any]:
    """What makes empty KV caches for a transformers model; older architectures (GPT-2) take none but their own."""
    from transformers import DynamicCache

    return DynamicCache if model._supports_cache_class else lambda: None


class _Tape:
    """The sequences while they grow."""

    def __init__(self, ids_BP: Tensor, mask_BP: Tensor, length: int, sampling: Sampling) -> None:
        batch, self.prompt = ids_BP.shape
        self.ids_BS = ids_BP.new_full((batch, self.prompt + length), sampling.pad)
        self.mask_BS = mask_BP.new_zeros((batch, self.prompt + length))
        self.logp_BR = torch.zeros((batch, length), dtype=torch.float32, device=ids_BP.device)
        self.ids_BS[:, : self.prompt], self.mask_BS[:, : self.prompt] = ids_BP, mask_BP
        self.done_B = torch.zeros(batch, dtype=torch.bool, device=ids_BP.device)
        self.written = 0
        self._sampling = sampling

    @property
    def width(self) -> int:
        """Positions so far."""
        return self.prompt + self.written

    def append(self, logits_BV: Tensor, key_B: Tensor) -> None:
        """Draw the next token of every row; rows that have ended get padding."""
        token_B, logp_B = draw(logits_BV, key_B, self._sampling)
        column, going_B = self.width, ~self.done_B
        self.ids_BS[:, column] = torch.where(going_B, token_B, self._sampling.pad)
        self.mask_BS[:, column] = going_B.to(self.mask_BS.dtype)
        self.logp_BR[:, self.written] = torch.where(going_B, logp_B, 0.0)
        if self._sampling.natural:
            self.done_B |= token_B == self._sampling.eos
        self.written += 1

    def result(self) -> Rollout:
        """What was written; the response positions that no row reached are cut off."""
        end = self.width
        return Rollout(self.ids_BS[:, :end], self.mask_BS[:, :end], self.mask_BS[:, self.prompt : end], self.logp_BR[:, : self.written])


class _Generation(ABC):
    """The loop of both engines: a pass over the prompts, then one token after the other."""

    def __init__(self, module: nn.Module, sampling: Sampling, around: Surroundings | None = None) -> None:
        self._module, self._sampling, self._around = module, sampling, around or Surroundings()

    @torch.no_grad()
    def generate(self, ids_BP: Tensor, mask_BP: Tensor, keys_BR: Tensor) -> Rollout:
        """See `RolloutEngine.generate`."""
        length = keys_BR.shape[1]
        tape = _Tape(ids_BP, mask_BP, length, self._sampling)
        with self._around.phase("rollout_prefill"):
            cache = self._extend(tape, None, keys_BR)
        with self._around.phase("rollout_decode"):
            while tape.written < length and not _ended(tape, self._sampling, self._around):
                self._around.beat()
                cache = self._extend(tape, cache, keys_BR)
        return tape.result()

    def _extend(self, tape: _Tape, cache: Any, keys_BR: Tensor) -> Any:
        """Draw the next token of every row; returns the cache for the token after it."""
        with self._around.last_only(1):
            output = self._forward(tape, cache)
        tape.append(output.logits[:, -1], keys_BR[:, tape.written])
        return output.get("past_key_values")

    @abstractmethod
    def _forward(self, tape: _Tape, cache: Any) -> Any:
        """Output of the model whose last logits are those of the next token; `cache` is None on the prompts."""


class CachedRollout(_Generation):
    """Prefill once, then one token a forward pass with a KV cache."""

    def _forward(self, tape: _Tape, cache: Any) -> Any:
        first = cache is None
        ids = tape.ids_BS[:, : tape.width] if first else tape.ids_BS[:, tape.width - 1 : tape.width]
        cache = self._around.new_cache() if first else cache
        mask = tape.mask_BS[:, : tape.width]
        return forward_arguments(self._module, ids, mask, self._around, past_key_values=cache, use_cache=True)


class UncachedRollout(_Generation):
    """One forward pass over the whole sequence for each token."""

    def _forward(self, tape: _Tape, cache: Any) -> Any:
        assert cache is None, "nothing is cached"
        return forward_arguments(self._module, tape.ids_BS[:, : tape.width], tape.mask_BS[:, : tape.width], self._around, use_cache=False)


def _ended(tape: _Tape, sampling: Sampling, around: Surroundings) -> bool:
    """Whether all responses have ended; only looked at every `CHECK_EVERY` tokens, at the same ones on every rank."""
    return sampling.natural and tape.written % CHECK_EVERY == 0 and around.all_done(tape.done_B)
