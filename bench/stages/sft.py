"""Stage 1, supervised fine-tuning: the language-model loss of responses to instructions.

The numbered details are explained, with their sources, in docs/implementation-details.md. Shapes: B sequences, T positions,
K places in B x T that carry loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.cell import Cell
from bench.checkpoint import save_checkpoint
from bench.data import collate
from bench.errors import DataError
from bench.models.build import accepts_position_ids, add_lora, build_policy, build_tokenizer, counts, initial_sha256
from bench.rl.losses import token_logprobs
from bench.rollout.head import HeadWindow
from bench.stages.base import Place, StepReport, step_count
from bench.stages.job import model_facts, read_split, started_from, sum_over_ranks
from bench.stages.reader import Reader
from bench.stages.schedule import learning_rate_at
from bench.strategies.base import PipelinedEngine, Strategy
from bench.trial import Trial


def build(trial: Trial, strategy: Strategy, place: Place) -> Sft:
    """The stage of `trial` on this rank."""
    return Sft(trial, strategy, place)


class Batch(NamedTuple):
    """One micro-batch on the device, and its counts."""

    ids_BT: Tensor
    mask_BT: Tensor
    place_K: Tensor
    target_K: Tensor
    loss_tokens: int
    tokens: int


def collate_batch(sequences: Sequence[collate.Tokens], fill: int, device: torch.device, width: int | None = None) -> Batch:
    """Pad to `width`, or else to the longest sequence of the micro-batch.

    (3) Only response tokens carry loss; prompt and padding do not. (4) The mask comes from lengths, not from `ids != pad`.
    """
    padded = collate.pad_right([sequence.ids for sequence in sequences], fill, width)
    places = collate.loss_places(sequences, padded.ids_BT.shape[1])
    tensors = [collate.to_device(tensor, device) for tensor in (*padded, *places)]
    loss_tokens, tokens = (sum(counts) for counts in zip(*((one.loss_tokens, len(one.ids)) for one in sequences), strict=True))
    return Batch(tensors[0], tensors[1], tensors[2], tensors[3], loss_tokens, tokens)


def token_losses(reader: Reader, batch: Batch) -> Tensor:
    """Minus log-probability of each token that carries loss, K; (10) the head computes no other logits."""
    logits_1KV = reader.logits(batch.ids_BT, batch.mask_BT, batch.place_K)
    return -token_logprobs(logits_1KV, batch.target_K.unsqueeze(0)).squeeze(0)


def pipelined_losses(engine: PipelinedEngine, reader: Reader, batches: Sequence[Batch], weights: Sequence[Tensor | float]) -> Tensor:
    """Sum of the weighted token losses of micro-batches of one width, with the backward passes of a step where gradients are enabled."""

    def losses(output: Any, index: int) -> Tensor:
        batch = batches[index]
        logits_1KV = output.logits.flatten(0, 1).index_select(0, batch.place_K).unsqueeze(0)
        losses_K = -token_logprobs(logits_1KV, batch.target_K.unsqueeze(0)).squeeze(0)
        return (losses_K * weights[index]).sum().unsqueeze(0)

    inputs = reader.inputs(torch.cat([batch.ids_BT for batch in batches]), torch.cat([batch.mask_BT for batch in batches]))
    return engine.run(inputs, len(batches[0].ids_BT), losses)[0]


def loss_denominator(cell: Cell, batch: Batch, step_tokens: int, num_micro_batches: int) -> int:
    """(7) What token losses are divided by: loss tokens of the whole step over all ranks and micro-steps.

    Old semantics: those of the micro-batch, times the micro-batches of the step over all ranks.
    """
    if "loss-mean-per-micro-batch" in cell.semantics_switches:
        return max(1, batch.loss_tokens) * num_micro_batches
    return max(1, step_tokens)


def check_responses(sequences: Sequence[collate.Tokens], length: int) -> None:
    """Raise DataError if most responses were cut off: a loss over hardly any token would look like perfect agreement."""
    without = sum(sequence.loss_tokens == 0 for sequence in sequences)
    if without > len(sequences) / 2:
        raise DataError(
            f"{without} of {len(sequences)} training sequences have no response token left: sequence_length {length} cuts them inside the "
            "prompt; a longer sequence_length is needed"
        )


class Sft:
    """The stage on one rank; see `bench.stages.base.Stage`."""

    def __init__(self, trial: Trial, strategy: Strategy, place: Place) -> None:
        self._trial, self._place, self._cell = trial, place, trial.parsed_cell
        settings = self._cell.settings
        self._tokenizer = build_tokenizer(trial)
        self._fill = collate.padding_id(self._tokenizer)
        split = read_split(trial, "instruct")
        self.total = step_count(self._cell, len(split.train))
        self._order = collate.RowOrder(len(split.train), batch=self._cell.step_batch, seed=trial.seed)  # (5)
        used = self._order.used(self.total)
        encoded = collate.encode_instruct(
            [split.train[row] for row in used], self._tokenizer, settings.sequence_length, place.beat
        )  # (1) (2)
        check_responses(encoded, settings.sequence_length)
        self._sequences = dict(zip(used, encoded, strict=True))
        self._held_out = collate.encode_instruct(split.held_out, self._tokenizer, settings.sequence_length, place.beat)
        policy = build_policy(trial, shapes=strategy.shapes_suffice(self._cell, place.rank))
        self._config = policy.config
        self._lora = add_lora(policy, self._cell, trial.seed)
        window, places = HeadWindow(policy), accepts_position_ids(policy)
        self.facts = model_facts(counts(policy), initial_sha256(policy), self._lora, policy.config)
        self.facts["longest_sequence"] = max(len(sequence.ids) for sequence in encoded)
        self._engine = strategy.prepare(policy, self._cell, place.device, learning_rate=settings.learning_rate)
        self.engines = {"policy": self._engine}
        self._reader = Reader(self._engine.module, window, places)

    def advance(self, index: int) -> StepReport:
        """One optimizer step."""
        settings, place = self._cell.settings, self._place
        rate = learning_rate_at(
            index, self.total, peak=settings.learning_rate, schedule=settings.schedule, warmup_share=settings.warmup_share
        )  # (8)
        self._engine.set_learning_rate(rate)
        rows = self._order.rows(index)
        step_tokens = sum(self._sequences[row].loss_tokens for row in rows)
        work: dict[str, int] = {}
        micros = collate.micro_steps(rows, rank=place.data_rank, world=place.data_ranks, micro=settings.micro_batch)  # (6)
        pass_all = self._pipeline if isinstance(self._engine, PipelinedEngine) else self._accumulate
        loss = pass_all(micros, step_tokens, work)
        norm = self._engine.step()  # (9)
        return StepReport(
            steps=[{"loss": sum_over_ranks(loss, place), "gradient_norm": norm, "learning_rate": rate}],
            counts=work,
        )

    def _accumulate(self, micros: Sequence[Sequence[int]], step_tokens: int, work: dict[str, int]) -> Tensor:
        """Forward and backward passes of a step, one micro-batch after the other; this rank's share of the step's loss."""
        place, loss = self._place, torch.zeros((), device=self._place.device)
        for micro, members in enumerate(micros, 1):
            batch = collate_batch([self._sequences[row] for row in members], self._fill, place.device)
            part = token_losses(self._reader, batch).sum() / self._denominator(batch, step_tokens, micros)
            self._engine.backward(part, last=micro == len(micros))
            loss += part.detach()
            count(work, batch)
            place.beat()
        return loss

    def _pipeline(self, micros: Sequence[Sequence[int]], step_tokens: int, work: dict[str, int]) -> Tensor:
        """The same where micro-batches follow each other through stages, and so have one width."""
        assert isinstance(self._engine, PipelinedEngine)
        width = max(len(self._sequences[row].ids) for members in micros for row in members)
        batches = [collate_batch([self._sequences[row] for row in members], self._fill, self._place.device, width) for members in micros]
        for batch in batches:
            count(work, batch)
        weights = [1.0 / self._denominator(batch, step_tokens, micros) for batch in batches]
        return pipelined_losses(self._engine, self._reader, batches, weights)

    def _denominator(self, batch: Batch, step_tokens: int, micros: Sequence[Sequence[int]]) -> int:
        return loss_denominator(self._cell, batch, step_tokens, len(micros) * self._place.data_ranks)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss of the held-out loss tokens."""
        place, sequences = self._place, self._held_out
        totals = torch.zeros(2, dtype=torch.float64, device=place.device)
        self._engine.module.eval()
        micro = self._cell.settings.micro_batch
        for rows, weights in collate.held_out_steps(len(sequences), rank=place.data_rank, world=place.data_ranks, micro=micro):
            batch = collate_batch([sequences[row] for row in rows], self._fill, place.device)
            weight_K = torch.tensor(weights, device=place.device)[batch.place_K // batch.ids_BT.shape[1]]
            if isinstance(self._engine, PipelinedEngine):
                loss = pipelined_losses(self._engine, self._reader, [batch], [weight_K])
            else:
                loss = (token_losses(self._reader, batch) * weight_K).sum()
            totals += torch.stack([loss, ((batch.target_K >= 0) * weight_K).sum()])
            place.beat()
        self._engine.module.train()
        total, tokens = sum_over_ranks(totals, place).tolist()
        return {"loss": total / max(1.0, tokens)}

    def save(self, folder: str) -> None:
        """Write the trained policy, adapters merged."""
        state = self._engine.full_state()
        if state is not None:
            save_checkpoint(
                Path(folder), state=state, config=self._config, stage="sft", tokenizer=self._tokenizer,
                started_from=started_from(self._trial), lora=self._lora,
            )  # fmt: skip


def count(work: dict[str, int], batch: Batch) -> None:
    """Add the batch to the work of this rank."""
    found = {
        "loss_tokens": batch.loss_tokens,
        "tokens": batch.tokens,
        "padded_tokens": batch.ids_BT.numel(),
        "sequences": len(batch.ids_BT),
    }
    for name, number in found.items():
        work[name] = work.get(name, 0) + number
