"""The protocol of rollout engines, and what a rollout is.

Shapes: B sequences, P prompt positions, R response positions, S = P + R. Prompts are padded on the left, responses begin at
position P in every row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class Rollout(NamedTuple):
    """Prompts and sampled responses."""

    ids_BS: Tensor
    mask_BS: Tensor
    """1 on prompt tokens and response tokens."""
    response_mask_BR: Tensor
    """1 on response tokens, the EOS that ended the response included."""
    logp_BR: Tensor
    """Log-probability of each response token, fp32, 0 elsewhere: at the temperature, before top-k and EOS suppression."""


class RolloutEngine(Protocol):
    """Samples responses from a policy."""

    def generate(self, ids_BP: Tensor, mask_BP: Tensor, keys_BR: Tensor) -> Rollout:
        """Sample as many response tokens as `keys_BR` has columns (`natural`: at most), each by its own key (see `noise_keys`).

        Collective under sharded strategies: every rank calls it with as many columns.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float
    top_k: int
    """0 draws among all tokens."""
    eos: int
    pad: int
    natural: bool
    """Whether EOS ends a response; otherwise it is never drawn."""


def _locally_done(done_B: Tensor) -> bool:
    return bool(done_B.all())


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What an engine needs from the stage around it; all of it may be left out."""

    positions: Callable[[Tensor], Tensor] | None = None
    """Attention mask -> position ids, for models that take them."""
    new_cache: Callable[[], Any] = field(default=lambda: None)
    """An empty KV cache of the kind that the model takes; None lets it make its own."""
    last_only: Callable[[int], AbstractContextManager[Any]] = field(default=lambda _: nullcontext())
    """Makes the model compute the logits of the last so many positions only."""
    phase: Callable[[str], AbstractContextManager[Any]] = field(default=lambda _: nullcontext())
    """Clock of the phases `rollout_prefill` and `rollout_decode`."""
    beat: Callable[[], None] = field(default=lambda: None)
    """Called once a token."""
    all_done: Callable[[Tensor], bool] = _locally_done
    """Whether the responses of all ranks have ended; collective."""


CHECK_EVERY = 8
"""Tokens between two looks at whether all responses have ended (a look makes the host wait for the device)."""


def forward_arguments(module: nn.Module, ids: Tensor, mask: Tensor, around: Surroundings, **rest: Any) -> Any:
    """Output of `module` on `ids`, the last columns of what `mask` covers."""
    places = {} if around.positions is None else {"position_ids": around.positions(mask)[:, -ids.shape[1] :]}
    return module(input_ids=ids, attention_mask=mask, **places, **rest)
