"""Two rollout engines: with a KV cache, and one that computes everything anew for each token.

The second is what coati v0.2.8 did in effect, and what the first is tested against. Both drive the module as a strategy wrapped
it, in whatever mode the caller put it; neither needs a gradient.
"""

from __future__ import annotations

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

    def append(self, logits_BV: Tensor, uniform_B: Tensor) -> None:
        """Draw the next token of every row; rows that have ended get padding."""
        token_B, logp_B = draw(logits_BV, uniform_B, self._sampling)
        column, going_B = self.prompt + self.written, ~self.done_B
        self.ids_BS[:, column] = torch.where(going_B, token_B, self._sampling.pad)
        self.mask_BS[:, column] = going_B.to(self.mask_BS.dtype)
        self.logp_BR[:, self.written] = torch.where(going_B, logp_B, 0.0)
        if self._sampling.natural:
            self.done_B |= token_B == self._sampling.eos
        self.written += 1

    def result(self) -> Rollout:
        """What was written; the response positions that no row reached are cut off."""
        end = self.prompt + self.written
        return Rollout(self.ids_BS[:, :end], self.mask_BS[:, :end], self.mask_BS[:, self.prompt : end], self.logp_BR[:, : self.written])


class CachedRollout:
    """Prefill once, then one token a forward pass with a KV cache."""

    def __init__(self, module: nn.Module, sampling: Sampling, around: Surroundings | None = None) -> None:
        self._module, self._sampling, self._around = module, sampling, around or Surroundings()

    @torch.no_grad()
    def generate(self, ids_BP: Tensor, mask_BP: Tensor, uniforms_BR: Tensor) -> Rollout:
        """See `RolloutEngine.generate`."""
        length = uniforms_BR.shape[1]
        tape = _Tape(ids_BP, mask_BP, length, self._sampling)
        with self._around.phase("rollout_prefill"):
            cache = self._extend(tape, ids_BP, None, uniforms_BR)
        with self._around.phase("rollout_decode"):
            while tape.written < length and not _ended(tape, self._sampling, self._around):
                self._around.beat()
                newest_B1 = tape.ids_BS[:, tape.prompt + tape.written - 1].unsqueeze(1)
                cache = self._extend(tape, newest_B1, cache, uniforms_BR)
        return tape.result()

    def _extend(self, tape: _Tape, ids: Tensor, cache: Any, uniforms_BR: Tensor) -> Any:
        """Feed `ids` behind what the cache holds, draw the next token, return the cache."""
        mask = tape.mask_BS[:, : tape.prompt + tape.written]
        cache = self._around.new_cache() if cache is None else cache
        with self._around.last_only(1):
            output = forward_arguments(self._module, ids, mask, self._around, past_key_values=cache, use_cache=True)
        tape.append(output.logits[:, -1], uniforms_BR[:, tape.written])
        return output.past_key_values


class UncachedRollout:
    """One forward pass over the whole sequence for each token."""

    def __init__(self, module: nn.Module, sampling: Sampling, around: Surroundings | None = None) -> None:
        self._module, self._sampling, self._around = module, sampling, around or Surroundings()

    @torch.no_grad()
    def generate(self, ids_BP: Tensor, mask_BP: Tensor, uniforms_BR: Tensor) -> Rollout:
        """See `RolloutEngine.generate`."""
        length = uniforms_BR.shape[1]
        tape = _Tape(ids_BP, mask_BP, length, self._sampling)
        with self._around.phase("rollout_decode"):
            while tape.written < length and not _ended(tape, self._sampling, self._around):
                self._around.beat()
                width = tape.prompt + tape.written
                with self._around.last_only(1):
                    output = forward_arguments(self._module, tape.ids_BS[:, :width], tape.mask_BS[:, :width], self._around, use_cache=False)
                tape.append(output.logits[:, -1], uniforms_BR[:, tape.written])
        return tape.result()


def _ended(tape: _Tape, sampling: Sampling, around: Surroundings) -> bool:
    """Whether all responses have ended; only looked at every `CHECK_EVERY` tokens, at the same ones on every rank."""
    return sampling.natural and tape.written > 0 and tape.written % CHECK_EVERY == 0 and around.all_done(tape.done_B)
