"""Stage 2, the reward model: one score a sequence, learned from preference pairs.

The numbered details are explained, with their sources, in docs/implementation-details.md. Shapes: P pairs, B = 2 P sequences
(the chosen ones, then the rejected ones), T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.checkpoint import save_checkpoint
from bench.data import collate
from bench.data.draws import Draws
from bench.errors import DataError
from bench.models.build import accepts_position_ids, add_lora, build_scorer, build_tokenizer, counts, initial_sha256, position_ids
from bench.rl.advantages import last_position
from bench.rl.losses import pair_losses
from bench.stages.base import Place, StepReport, step_count
from bench.stages.job import model_facts, read_split, started_from, sum_over_ranks
from bench.stages.schedule import learning_rate_at
from bench.strategies.base import PipelinedEngine, Strategy
from bench.trial import Trial


def build(trial: Trial, strategy: Strategy, place: Place) -> Rm:
    """The stage of `trial` on this rank."""
    return Rm(trial, strategy, place)


class Batch(NamedTuple):
    """The two sequences of each pair of one micro-batch, on the device, and their tokens."""

    ids_BT: Tensor
    mask_BT: Tensor
    tokens: int


def collate_batch(pairs: Sequence[collate.Pair], fill: int, device: torch.device, width: int | None = None) -> Batch:
    """Chosen sequences above rejected ones, padded to `width` or else to the longest: (13) one forward pass for both."""
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    padded = collate.pad_right(sequences, fill, width)
    tokens = sum(len(sequence) for sequence in sequences)
    return Batch(collate.to_device(padded.ids_BT, device), collate.to_device(padded.mask_BT, device), tokens)


def sequence_scores(scores_BT: Tensor, mask_BT: Tensor, *, padded_mean: bool) -> Tensor:
    """The score of each sequence.

    (14) It is read at the last real token. Old semantics: the mean over all positions but the last, padding included.
    """
    if padded_mean:
        return scores_BT[:, :-1].mean(dim=1)
    return scores_BT.gather(1, last_position(mask_BT).unsqueeze(1)).squeeze(1)


def right_pairs(margin_P: Tensor) -> Tensor:
    """1 for each pair whose chosen answer scores higher, 0 where the rejected one does.

    (17) A tie, which scores of 16 bits often are, is half right: an untrained model is to be right as often as a coin.
    """
    return (margin_P > 0).float() + (margin_P == 0).float() / 2


def check_pairs(pairs: Sequence[collate.Pair], length: int) -> None:
    """Raise DataError if most pairs are the same sequence twice: a loss that cannot fall would look like perfect agreement."""
    same = sum(pair.chosen == pair.rejected for pair in pairs)
    if same > len(pairs) / 2:
        raise DataError(
            f"{same} of {len(pairs)} training pairs are the same on both sides: sequence_length {length} cuts them before their answers "
            "differ; a longer sequence_length is needed"
        )


def shuffled(pairs: Sequence[collate.Pair], seed: int) -> list[collate.Pair]:
    """(17) A control: chosen and rejected are swapped in a random half of the pairs, so that there is nothing to learn."""
    draws = Draws(f"shuffle-labels:{seed}")
    return [collate.Pair(pair.rejected, pair.chosen) if draws.below(2) else pair for pair in pairs]


class Rm:
    """The stage on one rank; see `bench.stages.base.Stage`."""

    def __init__(self, trial: Trial, strategy: Strategy, place: Place) -> None:
        self._trial, self._place, self._cell = trial, place, trial.parsed_cell
        settings = self._cell.settings
        self._padded_mean = "rm-mean-over-padded-positions" in self._cell.semantics_switches
        self._width = settings.sequence_length if self._padded_mean else None
        self._tokenizer = build_tokenizer(trial)
        self._fill = collate.padding_id(self._tokenizer)
        split = read_split(trial, "pairs")
        self.total = step_count(self._cell, len(split.train))
        self._order = collate.RowOrder(len(split.train), batch=self._cell.step_batch, seed=trial.seed)
        used = self._order.used(self.total)
        encoded = self._encode([split.train[row] for row in used], "training")
        check_pairs(encoded, settings.sequence_length)
        self._pairs = dict(zip(used, encoded, strict=True))
        self._held_out = self._encode(split.held_out, "held-out")
        shapes = strategy.shapes_suffice(self._cell, place.rank)
        scorer = build_scorer(trial, fresh_head=True, source="policy", shapes=shapes)  # (11)
        self._config = scorer.config
        self._lora = add_lora(scorer, self._cell, trial.seed)
        self._places = accepts_position_ids(scorer)
        self.facts = model_facts(counts(scorer), initial_sha256(scorer), self._lora, scorer.config)
        self.facts["longest_sequence"] = self._width or max(len(ids) for pair in encoded for ids in pair)
        self._engine = strategy.prepare(scorer, self._cell, place.device, learning_rate=settings.learning_rate)
        self.engines = {"scorer": self._engine}

    def _encode(self, rows: Sequence[dict[str, Any]], purpose: str) -> list[collate.Pair]:
        settings = self._cell.settings
        pairs = collate.encode_pairs(rows, self._tokenizer, settings.sequence_length, self._place.beat)  # (12)
        return shuffled(pairs, settings.base_seed if purpose == "held-out" else self._trial.seed) if settings.shuffle_labels else pairs

    def advance(self, index: int) -> StepReport:
        """One optimizer step."""
        settings, place = self._cell.settings, self._place
        rate = learning_rate_at(
            index, self.total, peak=settings.learning_rate, schedule=settings.schedule, warmup_share=settings.warmup_share
        )
        self._engine.set_learning_rate(rate)
        rows = self._order.rows(index)
        work = {"loss_tokens": 0, "tokens": 0, "padded_tokens": 0, "sequences": 0}
        micros = collate.micro_steps(rows, rank=place.data_rank, world=place.data_ranks, micro=settings.micro_batch)
        pass_all = self._pipeline if isinstance(self._engine, PipelinedEngine) else self._accumulate
        sums = pass_all(micros, len(rows), work)
        norm = self._engine.step()
        loss, accuracy, margin = sum_over_ranks(sums, place) / len(rows)
        series = {"loss": loss, "accuracy": accuracy, "margin": margin, "gradient_norm": norm, "learning_rate": rate}
        return StepReport(steps=[series], counts=work)

    def _accumulate(self, micros: Sequence[Sequence[int]], step_pairs: int, work: dict[str, int]) -> Tensor:
        """Forward and backward passes of a step, one micro-batch after the other; this rank's sums of loss, right pairs and margin."""
        place, sums = self._place, torch.zeros(3, device=self._place.device)
        for micro, members in enumerate(micros, 1):
            batch = collate_batch([self._pairs[row] for row in members], self._fill, place.device, self._width)
            margin_P = self._margins(batch)
            losses_P = pair_losses(margin_P, self._cell.settings.loss)  # (15)
            self._engine.backward(losses_P.sum() / step_pairs, last=micro == len(micros))  # (16)
            sums += torch.stack([losses_P.detach().sum(), right_pairs(margin_P.detach()).sum(), margin_P.detach().sum()])
            _count(work, batch)
            place.beat()
        return sums

    def _pipeline(self, micros: Sequence[Sequence[int]], step_pairs: int, work: dict[str, int]) -> Tensor:
        """The same where micro-batches follow each other through stages, and so have one width."""
        pairs = [[self._pairs[row] for row in members] for members in micros]
        width = self._width or max(len(side) for members in pairs for pair in members for side in pair)
        batches = [collate_batch(members, self._fill, self._place.device, width) for members in pairs]
        for batch in batches:
            _count(work, batch)
        weight_P = torch.full((len(micros[0]),), 1.0 / step_pairs, device=self._place.device)
        sums = self._pipelined_sums(batches, weight_P)
        return sums * torch.tensor([step_pairs] * 3, device=self._place.device)

    def _pipelined_sums(self, batches: Sequence[Batch], weight_P: Tensor) -> Tensor:
        """Weighted sums of loss, right pairs and margin over micro-batches of one width, by an engine that takes all of them at once."""
        assert isinstance(self._engine, PipelinedEngine)

        def losses(scores_BT: Tensor, index: int) -> Tensor:
            margin_P = self._margin_of(scores_BT, batches[index])
            return self._weighted(margin_P, weight_P)

        inputs = self._inputs(torch.cat([batch.ids_BT for batch in batches]), torch.cat([batch.mask_BT for batch in batches]))
        return self._engine.run(inputs, len(batches[0].ids_BT), losses, values=3)

    def _weighted(self, margin_P: Tensor, weight_P: Tensor) -> Tensor:
        terms = (pair_losses(margin_P, self._cell.settings.loss), right_pairs(margin_P), margin_P)
        return torch.stack([(term * weight_P).sum() for term in terms])

    def _margins(self, batch: Batch) -> Tensor:
        """Score of the chosen less score of the rejected sequence of each pair."""
        return self._margin_of(self._engine.module(**self._inputs(batch.ids_BT, batch.mask_BT)), batch)

    def _inputs(self, ids_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
        places = {"position_ids": position_ids(mask_BT)} if self._places else {}
        return {"input_ids": ids_BT, "attention_mask": mask_BT, **places}

    def _margin_of(self, scores_BT: Tensor, batch: Batch) -> Tensor:
        chosen_P, rejected_P = sequence_scores(scores_BT.float(), batch.mask_BT, padded_mean=self._padded_mean).chunk(2)
        return chosen_P - rejected_P

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss, accuracy and margin on the held-out pairs."""
        place, settings, pairs = self._place, self._cell.settings, self._held_out
        sums = torch.zeros(3, dtype=torch.float64, device=place.device)
        self._engine.module.eval()
        for rows, weights in collate.held_out_steps(len(pairs), rank=place.data_rank, world=place.data_ranks, micro=settings.micro_batch):
            batch = collate_batch([pairs[row] for row in rows], self._fill, place.device, self._width)
            weight_P = torch.tensor(weights, device=place.device)
            pipelined = isinstance(self._engine, PipelinedEngine)
            sums += self._pipelined_sums([batch], weight_P) if pipelined else self._weighted(self._margins(batch), weight_P)
            place.beat()
        self._engine.module.train()
        loss, accuracy, margin = (sum_over_ranks(sums, place) / len(pairs)).tolist()
        return {"loss": loss, "accuracy": accuracy, "margin": margin}

    def save(self, folder: str) -> None:
        """Write the trained reward model, adapters merged."""
        state = self._engine.full_state()
        if state is not None:
            save_checkpoint(
                Path(folder), state=state, config=self._config, stage="rm", tokenizer=self._tokenizer,
                started_from=started_from(self._trial), lora=self._lora,
            )  # fmt: skip


def _count(work: dict[str, int], batch: Batch) -> None:
    """(18) Every real token of both sequences counts as a loss token: the score at the end depends on all of them."""
    work["loss_tokens"] += batch.tokens
    work["tokens"] += batch.tokens
    work["padded_tokens"] += batch.ids_BT.numel()
    work["sequences"] += batch.ids_BT.shape[0]
