"""From rows to tensors: templates, tokenisation, the order of the rows, and which rank takes which of them.

Shapes: B sequences, T positions, P prompt positions. A global batch is the same rows in the same order at any world size; what a
step's loss is divided by follows from token counts that every rank knows, without a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.data.draws import Draws
from bench.errors import DataError

PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
"""The templates of Stanford Alpaca (`train.py`, PROMPT_DICT), as in coati v0.2.8's `sft_dataset.py`."""

NO_LOSS = -100
"""Target of a position that carries no loss (any negative number is one)."""

TOKENISED_AT_A_TIME = 512


class Tokens(NamedTuple):
    """Token ids of one sequence; the first `prompt` of them carry no loss."""

    ids: list[int]
    prompt: int

    @property
    def loss_tokens(self) -> int:
        """Tokens that carry loss: those behind the prompt (the very first token of a text is predicted from nothing)."""
        return max(0, len(self.ids) - max(self.prompt, 1))


class Pair(NamedTuple):
    """Token ids of a preference pair's two sequences."""

    chosen: list[int]
    rejected: list[int]


# -- tokenisation ------------------------------------------------------------------------------------------------


def instruct_prompt(row: dict[str, Any]) -> str:
    """The text before the response.

    >>> instruct_prompt({"instruction": "Add.", "input": "1 2"}).splitlines()[-4:]
    ['### Input:', '1 2', '', '### Response:']
    """
    return (PROMPT_WITH_INPUT if row.get("input") else PROMPT_WITHOUT_INPUT).format_map(row)


def encode_instruct(rows: Sequence[dict[str, Any]], tokenizer: Any, length: int, beat: Callable[[], None] = lambda: None) -> list[Tokens]:
    """Prompt + output + EOS of each instruction row, cut at the end to `length` tokens."""
    prompts = _tokenise([instruct_prompt(row) for row in rows], tokenizer, True, beat)
    outputs = _tokenise([row["output"] for row in rows], tokenizer, False, beat)
    return [
        Tokens((prompt + output + [tokenizer.eos_token_id])[:length], min(len(prompt), length))
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def encode_pairs(rows: Sequence[dict[str, Any]], tokenizer: Any, length: int, beat: Callable[[], None] = lambda: None) -> list[Pair]:
    """Prompt + answer + EOS of both answers of each preference pair, cut at the end to `length` tokens."""
    prompts = _tokenise([row["prompt"] for row in rows], tokenizer, True, beat)
    answers = [_tokenise([row[side] for row in rows], tokenizer, False, beat) for side in ("chosen", "rejected")]
    end = [tokenizer.eos_token_id]
    return [
        Pair((prompt + chosen + end)[:length], (prompt + rejected + end)[:length])
        for prompt, chosen, rejected in zip(prompts, *answers, strict=True)
    ]


def encode_prompts(rows: Sequence[dict[str, Any]], tokenizer: Any, length: int, beat: Callable[[], None] = lambda: None) -> list[list[int]]:
    """The instruction of each row, without a template; a longer one keeps the tokenizer's first token (BOS), if any, and its last ones."""
    (front,) = _tokenise([""], tokenizer, True, beat)
    return [_cut_in_front(ids, length, front) for ids in _tokenise([row["instruction"] for row in rows], tokenizer, True, beat)]


def _cut_in_front(ids: list[int], length: int, front: list[int]) -> list[int]:
    """The last `length` tokens, of which `front` stays the first ones where they are.

    >>> _cut_in_front([1, 7, 8, 9], 3, [1]), _cut_in_front([7, 8, 9], 2, []), _cut_in_front([1, 7], 3, [1])
    ([1, 8, 9], [8, 9], [1, 7])
    """
    if len(ids) <= length:
        return ids
    kept = front if ids[: len(front)] == front and len(front) < length else []
    return [*kept, *ids[len(ids) - length + len(kept) :]]


def padding_id(tokenizer: Any) -> int:
    """The id that fills up batches: the padding token's, else EOS's (masks never look at ids)."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _tokenise(texts: list[str], tokenizer: Any, special: bool, beat: Callable[[], None]) -> list[list[int]]:
    """Ids of each text; `special` lets the tokenizer put its own first token (LLaMA: BOS) in front."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), TOKENISED_AT_A_TIME):
        ids += tokenizer(texts[start : start + TOKENISED_AT_A_TIME], add_special_tokens=special, verbose=False)["input_ids"]
        beat()
    return ids


# -- which rows, in which order, on which rank -------------------------------------------------------------------


class RowOrder:
    """The rows of every step: each epoch is a permutation by seed and epoch, cut into whole global batches.

    >>> order = RowOrder(5, batch=2, seed=1)
    >>> sorted(order.rows(0) + order.rows(1)) == sorted(set(order.rows(0) + order.rows(1))), order.rows(0) != order.rows(2)
    (True, True)
    """

    def __init__(self, rows: int, *, batch: int, seed: int) -> None:
        if rows < batch:
            raise DataError(
                f"too few training rows for one global batch: {rows} rows, {batch} needed; use more data, or lower global_batch"
            )
        self._rows, self._batch, self._seed = rows, batch, seed
        self._per_epoch = rows // batch
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def rows(self, step: int) -> list[int]:
        """Indices of the rows of step `step` (from 0), in order; leftover rows that fill no batch are dropped."""
        epoch, place = divmod(step, self._per_epoch)
        return self._permutation(epoch)[place * self._batch : (place + 1) * self._batch]

    def used(self, steps: int) -> list[int]:
        """Indices of all rows that the first `steps` steps touch, ascending."""
        return sorted({row for step in range(min(steps, self._per_epoch * 64)) for row in self.rows(step)})

    def _permute(self, epoch: int) -> list[int]:
        return Draws(f"epoch:{self._seed}:{epoch}").permutation(self._rows)


def micro_steps(batch: Sequence[int], *, rank: int, world: int, micro: int) -> list[list[int]]:
    """What `rank` takes of a global batch in each micro-step: micro-step a takes [(a x world + rank) x micro : + micro].

    >>> micro_steps(range(8), rank=1, world=2, micro=2)
    [[2, 3], [6, 7]]
    """
    assert len(batch) % (world * micro) == 0, (len(batch), world, micro)
    return [list(batch[start : start + micro]) for start in range(rank * micro, len(batch), world * micro)]


def held_out_steps(rows: int, *, rank: int, world: int, micro: int) -> Iterator[tuple[list[int], list[float]]]:
    """Yield (indices, weights) of this rank's micro-batches of the held-out rows.

    Every rank gets the same number of batches of the same size (a sharded model's forward pass is collective); surplus places
    repeat row 0 with weight 0.
    """
    whole = -(-rows // (world * micro)) * world * micro
    for places in micro_steps(range(whole), rank=rank, world=world, micro=micro):
        yield [place if place < rows else 0 for place in places], [float(place < rows) for place in places]


# -- tensors -----------------------------------------------------------------------------------------------------


class Padded(NamedTuple):
    """Sequences of different length as one tensor and its mask (1 on tokens)."""

    ids_BT: Tensor
    mask_BT: Tensor


def pad_right(sequences: Sequence[Sequence[int]], fill: int, width: int | None = None) -> Padded:
    """Pad at the end, to `width` or else to the longest.

    >>> pad_right([[5, 6], [7]], 0).ids_BT.tolist()
    [[5, 6], [7, 0]]
    """
    return _pad(sequences, fill, width, left=False)


def pad_left(sequences: Sequence[Sequence[int]], fill: int, width: int | None = None) -> Padded:
    """Pad in front, to `width` or else to the longest.

    >>> pad_left([[5, 6], [7]], 0, width=3).mask_BT.tolist()
    [[0, 1, 1], [0, 0, 1]]
    """
    return _pad(sequences, fill, width, left=True)


def _pad(sequences: Sequence[Sequence[int]], fill: int, width: int | None, *, left: bool) -> Padded:
    width = width or max(len(ids) for ids in sequences)
    ids_BT = torch.full((len(sequences), width), fill, dtype=torch.long)
    mask_BT = torch.zeros((len(sequences), width), dtype=torch.long)
    for row, ids in enumerate(sequences):
        place = slice(width - len(ids), width) if left else slice(0, len(ids))
        ids_BT[row, place] = torch.tensor(ids, dtype=torch.long)
        mask_BT[row, place] = 1
    return Padded(ids_BT, mask_BT)


class LossPlaces(NamedTuple):
    """Where loss is read in a batch: places in the flattened B x T, and the token that the logits there should predict."""

    place_K: Tensor
    target_K: Tensor


def loss_places(sequences: Sequence[Tokens], width: int) -> LossPlaces:
    """The places of all tokens that carry loss; never empty: a batch without any gets one place with the target `NO_LOSS`.

    >>> [tensor.tolist() for tensor in loss_places([Tokens([5, 6, 7, 8], 2), Tokens([5, 9], 0)], width=5)]
    [[1, 2, 5], [7, 8, 9]]
    """
    places: list[int] = []
    targets: list[int] = []
    for row, (ids, prompt) in enumerate(sequences):
        first = max(prompt, 1)
        places += range(row * width + first - 1, row * width + len(ids) - 1)
        targets += ids[first:]
    return LossPlaces(torch.tensor(places or [0], dtype=torch.long), torch.tensor(targets or [NO_LOSS], dtype=torch.long))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; the host does not wait for the copy."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
