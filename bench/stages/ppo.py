"""Stage 3, proximal policy optimisation: the policy learns to raise the reward model's score without leaving its reference.

One iteration: roll out prompts, score the responses, turn scores into advantages, learn policy and critic. The numbered details are
explained, with their sources, in docs/implementation-details.md.

Shapes: N sequences of the iteration over all ranks, n those of this rank, B of one forward pass; P prompt positions, R response
positions, S = P + R; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.cell import Cell
from bench.checkpoint import save_checkpoint
from bench.data import collate
from bench.data.draws import Draws
from bench.errors import UserError
from bench.measure.clock import PhaseClock
from bench.models.build import backbone, build_tokenizer, position_ids
from bench.rl import advantages as gae
from bench.rl.kl import coati_sequence_kl, k1, k3
from bench.rl.losses import policy_terms, token_entropies, value_terms
from bench.rollout.base import Rollout, Sampling, Surroundings
from bench.rollout.engines import CachedRollout, cache_of
from bench.rollout.sampling import noise_keys
from bench.stages import sft
from bench.stages.base import Place, StepReport
from bench.stages.job import agreed, gather_rows, max_over_ranks, read_all, read_split, started_from, sum_over_ranks
from bench.stages.ppo_models import LanguageModel, build_models
from bench.stages.schedule import learning_rate_at
from bench.strategies.base import Strategy
from bench.trial import Trial

SAMPLES = 3
"""Held-out responses that are kept as text."""
MEANS = ("policy_loss", "ptx_loss", "clip_share", "value_loss")
"""Values of a step of which an iteration keeps the mean."""
FIRST = ("first_ratio_error", "first_approximate_kl")
"""Values of an iteration's first step."""


def build(trial: Trial, strategy: Strategy, place: Place) -> Ppo:
    """The stage of `trial` on this rank. Raises UserError for batches that do not divide."""
    return Ppo(trial, strategy, place)


# -- experience ------------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """What the four models say of a rollout of this rank, before anything is learned from it."""

    reward_n: Tensor
    reference_logp_nR: Tensor
    logp_nR: Tensor
    entropy_nR: Tensor
    values_nR: Tensor


class Experience(NamedTuple):
    """What learning reads: all rows of the iteration, the same on every rank."""

    ids_NS: Tensor
    mask_NS: Tensor
    response_mask_NR: Tensor
    logp_NR: Tensor
    values_NR: Tensor
    advantages_NR: Tensor
    returns_NR: Tensor

    def rows(self, index_B: Tensor) -> Experience:
        """Some of the rows."""
        return Experience(*(field.index_select(0, index_B) for field in self))


def make_experience(rollout: Rollout, scored: Scored, cell: Cell) -> tuple[Experience, dict[str, Tensor]]:
    """Advantages and returns of the whole iteration, and its observations; both arguments hold the rows of all ranks."""
    settings, mask_NR = cell.settings, rollout.response_mask_BR
    if "ppo-sequence-reward-without-gae" in cell.semantics_switches:
        advantages_NR, returns_NR = coati_advantages(scored, mask_NR, settings.kl_coef)
    else:
        rewards_NR = gae.token_rewards(
            scored.reward_n,
            k1(scored.logp_nR, scored.reference_logp_nR),
            mask_NR,
            kl_coef=settings.kl_coef,
            reward_clip=settings.reward_clip,
        )  # fmt: skip (29) (30)
        advantages_NR, returns_NR = gae.generalised_advantages(
            rewards_NR, scored.values_nR, mask_NR, gamma=settings.gamma, lam=settings.gae_lambda
        )  # (31)
        if settings.whiten_advantages:  # (32)
            advantages_NR = gae.whiten(advantages_NR, mask_NR, gae.moments(gae.power_sums(advantages_NR, mask_NR)))
    experience = Experience(rollout.ids_BS, rollout.mask_BS, mask_NR, scored.logp_nR, scored.values_nR, advantages_NR, returns_NR)
    return experience, observe(rollout, scored, returns_NR)


def coati_advantages(scored: Scored, mask_NR: Tensor, kl_coef: float) -> tuple[Tensor, Tensor]:
    """Old semantics: one reward a sequence, less its mean KL; advantage = reward - value at every token, not whitened."""
    return_N = scored.reward_n - kl_coef * coati_sequence_kl(scored.logp_nR, scored.reference_logp_nR, mask_NR)
    returns_NR = return_N.unsqueeze(1) * mask_NR
    return returns_NR - scored.values_nR * mask_NR, returns_NR


def observe(rollout: Rollout, scored: Scored, returns_NR: Tensor) -> dict[str, Tensor]:
    """Values of the iteration for the record; (35) KL is the k3 estimate."""
    mask_NR = rollout.response_mask_BR
    tokens, sequences = mask_NR.sum(), mask_NR.shape[0]
    kl = (k3(scored.logp_nR, scored.reference_logp_nR) * mask_NR).sum()
    errors, returns = (gae.moments(gae.power_sums(what, mask_NR)) for what in (returns_NR - scored.values_nR, returns_NR))
    return {
        "reward": scored.reward_n.mean(),
        "kl": kl / tokens,
        "kl_sum": kl / sequences,
        "entropy": (scored.entropy_nR * mask_NR).sum() / tokens,
        "response_tokens": tokens / sequences,
        "explained_variance": gae.explained_variance(errors, returns),
        "rollout_logprob_error": ((rollout.logp_BR - scored.logp_nR).abs() * mask_NR).max(),  # (36)
        "rollout_kl": (k3(rollout.logp_BR, scored.logp_nR) * mask_NR).sum() / tokens,
    }


def loss_weights(mask_GR: Tensor, *, by_sequence: bool) -> Tensor:
    """(33) Weight of each response token in the losses of a step; they sum to 1 over the step's sequences, of all ranks.

    Every token weighs the same; `by_sequence` (old semantics): every sequence does.
    """
    if by_sequence:
        return mask_GR / mask_GR.sum(dim=1, keepdim=True).clamp(min=1) / mask_GR.shape[0]
    return mask_GR / mask_GR.sum().clamp(min=1)


# -- the stage -------------------------------------------------------------------------------------------------------


class Ppo:
    """The stage on one rank; see `bench.stages.base.Stage`."""

    def __init__(self, trial: Trial, strategy: Strategy, place: Place) -> None:
        self._trial, self._place, self._cell = trial, place, trial.parsed_cell
        settings = self._settings = self._cell.settings
        self.total = settings.iterations
        scale = place.data_ranks if settings.scaling == "weak" else 1
        self._num_prompts = settings.prompts_per_iteration * scale  # (21)
        check_batches(self._cell, self._num_prompts, place.data_ranks)
        self._own = self._num_prompts // place.data_ranks
        self._steps = settings.ppo_epochs * (self._num_prompts // self._cell.step_batch)
        self._tokenizer = build_tokenizer(trial)
        self._fill = collate.padding_id(self._tokenizer)
        split = read_split(trial, "prompts")
        self._order = collate.RowOrder(len(split.train), batch=self._num_prompts, seed=trial.seed)
        self._prompts = collate.encode_prompts(split.train, self._tokenizer, settings.prompt_length, place.beat)  # (22)
        self._held_out = collate.encode_prompts(split.held_out, self._tokenizer, settings.prompt_length, place.beat)
        self._ptx = PtxRows(trial, self._tokenizer, place) if settings.ptx_coef > 0 else None
        self._models = build_models(trial, strategy, place)
        self.facts = self._models.facts
        if self._ptx:
            self.facts["longest_sequence"] = self._ptx.longest(self.total * self._steps)
        self.engines = {"policy": self._models.policy, "critic": self._models.critic}
        self._clock = PhaseClock(place.device)
        self._engine = self._rollout_engine()

    def _rollout_engine(self) -> CachedRollout:
        settings, place, policy = self._settings, self._place, self._models.policy_reader.reader
        sampling = Sampling(
            temperature=settings.temperature,
            top_k=settings.top_k,
            eos=self._tokenizer.eos_token_id,
            pad=self._fill,
            natural=settings.length == "natural",
        )
        around = Surroundings(
            positions=position_ids if policy.places else None,
            new_cache=cache_of(backbone(policy.module)),
            last_only=policy.window.last,
            phase=self._clock.phase,
            beat=place.beat,
            all_done=lambda done_B: agreed(done_B.all(), place),
        )
        return CachedRollout(policy.module, sampling, around)

    # -- one iteration ---------------------------------------------------------------------------------------------

    def advance(self, index: int) -> StepReport:
        """One iteration: rollout, score, learn."""
        place, clock = self._place, self._clock
        clock.start()
        slots = range(place.data_rank * self._own, (place.data_rank + 1) * self._own)
        rows = self._order.rows(index)
        prompts = [self._prompts[rows[slot]] for slot in slots]
        keys_nR = noise_keys(self._trial.seed, f"iteration:{index}", slots, self._settings.response_length)  # (24)
        self._train_mode(False)
        rollout = self._roll_out(prompts, keys_nR)
        scored = self._score(rollout)
        with clock.phase("advantage"):
            rollout = Rollout(*(gather_rows(field, place) for field in rollout))
            scored = Scored(*(gather_rows(field, place) for field in scored))
            experience, observed = make_experience(rollout, scored, self._cell)
        self._train_mode(True)
        steps, learned = self._learn(experience, index)
        work = {
            "sequences": self._own,
            "prompt_tokens": sum(map(len, prompts)),
            "response_tokens": int(experience.response_mask_NR[slots.start : slots.stop].sum()),
            "learned_tokens": int(learned),
            **(self._ptx.take_work() if self._ptx else {}),
        }
        totals = {name: sum(step.pop(name) for step in steps) / len(steps) for name in MEANS}
        extremes = {name: steps[0].pop(name) for name in FIRST}
        return StepReport(
            steps=steps, iteration={**observed, **totals, **extremes}, counts=work, phases=clock.read(), phase_peaks=clock.peaks
        )

    def _train_mode(self, on: bool) -> None:
        """(37) Dropout is 0 in all models, so the modes differ only in activation checkpointing, which has no KV cache."""
        self._models.policy.module.train(on)
        self._models.critic.module.train(on)

    def _roll_out(self, prompts: Sequence[Sequence[int]], keys_nR: Tensor) -> Rollout:
        """Responses of this rank to `prompts`, all in one batch."""
        device = self._place.device
        padded = collate.pad_left(prompts, self._fill, self._settings.prompt_length)  # (23)
        ids_nP, mask_nP, keys_nR = (collate.to_device(tensor, device) for tensor in (*padded, keys_nR))
        return self._engine.generate(ids_nP, mask_nP, keys_nR)

    @torch.no_grad()
    def _score(self, rollout: Rollout) -> Scored:
        """What the models say of the rollout, micro-batch by micro-batch."""
        models, length = self._models, rollout.logp_BR.shape[1]
        parts = [(rollout.ids_BS[part], rollout.mask_BS[part]) for part in _parts(self._own, self._settings.micro_batch)]
        reward_n = self._each("reward", parts, models.reward.rewards)
        reference_nR = self._each("reference", parts, lambda ids, mask: models.reference.logprobs(ids, mask, length)[0])
        both = self._each("policy_logprob", parts, lambda ids, mask: torch.stack(self._with_entropy(ids, mask, length), dim=-1))
        values_nR = self._each("value", parts, lambda ids, mask: models.critic_reader.values(ids, mask, length))
        return Scored(reward_n, reference_nR, both[..., 0].contiguous(), both[..., 1].contiguous(), values_nR)

    def _each(self, phase: str, parts: Sequence[tuple[Tensor, Tensor]], read: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        found = []
        with self._clock.phase(phase):
            for ids_BS, mask_BS in parts:
                found.append(read(ids_BS, mask_BS))
                self._place.beat()
            return torch.cat(found)

    def _with_entropy(self, ids_BS: Tensor, mask_BS: Tensor, length: int) -> tuple[Tensor, Tensor]:
        logp_BR, logits_BRV = self._models.policy_reader.logprobs(ids_BS, mask_BS, length)
        return logp_BR, token_entropies(logits_BRV, temperature=self._settings.temperature)

    # -- learning --------------------------------------------------------------------------------------------------

    def _learn(self, experience: Experience, index: int) -> tuple[list[dict[str, Any]], Tensor]:
        """All steps of an iteration; and how many response tokens this rank learned from."""
        steps: list[dict[str, Any]] = []
        learned = torch.zeros((), device=self._place.device)
        for epoch in range(self._settings.ppo_epochs):
            order = Draws(f"experience:{self._trial.seed}:{index}:{epoch}").permutation(self._num_prompts)  # (34)
            for start in range(0, self._num_prompts, self._cell.step_batch):
                rows = order[start : start + self._cell.step_batch]
                values, tokens = self._step(experience, rows, index * self._steps + len(steps), first=not steps)
                steps.append(values)
                learned += tokens
        return steps, learned

    def _step(self, experience: Experience, rows: list[int], number: int, *, first: bool) -> tuple[dict[str, Any], Tensor]:
        """One optimizer step of the policy and one of the critic, on the same sequences."""
        place, settings = self._place, self._settings
        coati = "ppo-sequence-reward-without-gae" in self._cell.semantics_switches
        weights_GR = loss_weights(experience.response_mask_NR[self._index(rows)], by_sequence=coati)
        mine = collate.micro_steps(range(len(rows)), rank=place.data_rank, world=place.data_ranks, micro=settings.micro_batch)
        micros = [(experience.rows(self._index([rows[i] for i in part])), weights_GR[self._index(part)]) for part in mine]
        rate, critic_rate = self._set_rates(number)
        with self._clock.phase("policy_learn"):
            sums, largest, norm = self._learn_policy(micros, number)
        with self._clock.phase("critic_learn"):
            value_loss, critic_norm = self._learn_critic(micros, coati=coati)
        sums = sum_over_ranks(torch.cat([sums, value_loss.unsqueeze(0)]), place)
        loss, policy_loss, ptx_loss, clip_share, approximate_kl, value_loss = sums
        values = {
            "loss": loss, "gradient_norm": norm, "critic_gradient_norm": critic_norm,
            "learning_rate": rate, "critic_learning_rate": critic_rate,
            "policy_loss": policy_loss, "ptx_loss": ptx_loss, "clip_share": clip_share, "value_loss": value_loss,
        }  # fmt: skip
        if first:
            values |= {"first_ratio_error": max_over_ranks(largest, place), "first_approximate_kl": approximate_kl}
        return values, torch.stack([micro.response_mask_NR.sum() for micro, _ in micros]).sum()

    def _set_rates(self, number: int) -> tuple[float, float]:
        """Learning rates of policy and critic at optimizer step `number` of the trial."""
        settings, total = self._settings, self.total * self._steps
        factor = learning_rate_at(number, total, peak=1.0, schedule=settings.schedule, warmup_share=settings.warmup_share)
        rate = settings.learning_rate * factor
        critic_rate = rate if settings.critic_learning_rate is None else settings.critic_learning_rate * factor
        self._models.policy.set_learning_rate(rate)
        self._models.critic.set_learning_rate(critic_rate)
        return rate, critic_rate

    def _learn_policy(self, micros: list[tuple[Experience, Tensor]], number: int) -> tuple[Tensor, Tensor, Any]:
        """One step of the policy: sums of (loss, PPO loss, ptx loss, clip share, approximate KL), largest |ratio - 1|, gradient norm."""
        settings, models, device = self._settings, self._models, self._place.device
        sums, largest = torch.zeros(5, device=device), torch.zeros((), device=device)
        ptx = self._ptx.micro_batches(number) if self._ptx else [None] * len(micros)
        for number_done, ((micro, weights_BR), ptx_batch) in enumerate(zip(micros, ptx, strict=True), 1):
            logp_BR, _ = models.policy_reader.logprobs(micro.ids_NS, micro.mask_NS, micro.logp_NR.shape[1])
            terms_BR, clipped_BR = policy_terms(logp_BR, micro.logp_NR, micro.advantages_NR, settings.policy_clip)  # (38)
            policy_loss = (terms_BR * weights_BR).sum()
            ptx_loss = self._ptx.loss(models.policy_reader, *ptx_batch) if self._ptx and ptx_batch else torch.zeros_like(policy_loss)
            loss = (1.0 - settings.ptx_coef) * policy_loss + settings.ptx_coef * ptx_loss  # (40)
            models.policy.backward(loss, last=number_done == len(micros))
            log_ratio_BR = (logp_BR.detach() - micro.logp_NR) * micro.response_mask_NR
            means = ((clipped_BR * weights_BR).sum(), (k3(micro.logp_NR, logp_BR.detach()) * weights_BR).sum())
            sums += torch.stack([loss.detach(), policy_loss.detach(), ptx_loss.detach(), *means])
            largest = torch.maximum(largest, torch.expm1(log_ratio_BR).abs().max())
            self._place.beat()
        return sums, largest, models.policy.step()

    def _learn_critic(self, micros: list[tuple[Experience, Tensor]], *, coati: bool) -> tuple[Tensor, Any]:
        """One step of the critic: value loss and gradient norm."""
        total = torch.zeros((), device=self._place.device)
        for number_done, (micro, weights_BR) in enumerate(micros, 1):
            values_BR = self._models.critic_reader.values(micro.ids_NS, micro.mask_NS, micro.logp_NR.shape[1])
            terms_BR = value_terms(values_BR, micro.values_NR, micro.returns_NR, self._settings.value_clip)
            loss = (terms_BR * weights_BR).sum() * (1.0 if coati else 0.5)  # (39)
            self._models.critic.backward(loss, last=number_done == len(micros))
            total += loss.detach()
            self._place.beat()
        return total, self._models.critic.step()

    def _index(self, rows: Sequence[int]) -> Tensor:
        return collate.to_device(torch.tensor(rows, dtype=torch.long), self._place.device)

    # -- outside the laps ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Reward, KL and response tokens on the held-out prompts, with the same keys every time (41)."""
        place, prompts = self._place, self._held_out
        totals = torch.zeros(3, dtype=torch.float64, device=place.device)
        self._train_mode(False)
        for rows, weights in collate.held_out_steps(len(prompts), rank=place.data_rank, world=place.data_ranks, micro=self._own):
            keys_nR = noise_keys(self._settings.base_seed, "held-out", rows, self._settings.response_length)
            rollout = self._roll_out([prompts[row] for row in rows], keys_nR)
            scored = self._score(rollout)
            mask_nR = rollout.response_mask_BR * torch.tensor(weights, device=place.device).unsqueeze(1)
            kl = (k3(scored.logp_nR, scored.reference_logp_nR) * mask_nR).sum()
            totals += torch.stack([(scored.reward_n * mask_nR[:, 0]).sum(), kl, mask_nR.sum()])
            if 0 in rows and place.data_rank == 0:
                self.facts["samples"] = self._samples(rollout, scored)
        self._train_mode(True)
        reward, kl, tokens = sum_over_ranks(totals, place).tolist()
        return {"reward": reward / len(prompts), "kl": kl / tokens, "response_tokens": tokens / len(prompts)}

    def _samples(self, rollout: Rollout, scored: Scored) -> list[dict[str, Any]]:
        """The first few responses as text."""
        prompt = rollout.ids_BS.shape[1] - rollout.logp_BR.shape[1]
        found = []
        for ids_S, mask_S, reward in zip(rollout.ids_BS[:SAMPLES].cpu(), rollout.mask_BS[:SAMPLES].cpu(), scored.reward_n, strict=False):
            texts = [self._tokenizer.decode(part) for part in (ids_S[:prompt][mask_S[:prompt] > 0], ids_S[prompt:][mask_S[prompt:] > 0])]
            found.append({"prompt": texts[0], "response": texts[1], "reward": round(float(reward), 4)})
        return found

    def save(self, folder: str) -> None:
        """Write the trained policy, adapters merged."""
        state = self._models.policy.full_state()
        if state is not None:
            save_checkpoint(
                Path(folder), state=state, config=self._models.config, stage="ppo", tokenizer=self._tokenizer,
                started_from=started_from(self._trial), lora=self._models.lora,
            )  # fmt: skip


class PtxRows:
    """Instruction rows for the language-model loss that is mixed into the policy's."""

    def __init__(self, trial: Trial, tokenizer: Any, place: Place) -> None:
        self._place, self._cell = place, trial.parsed_cell
        settings = self._cell.settings
        if settings.ptx == "none":
            raise UserError(f"ptx_coef is {settings.ptx_coef}, but ptx names no data; name instruction data, or set ptx_coef to 0")
        rows = read_all(trial, settings.ptx, "instruct")
        self._sequences = collate.encode_instruct(rows, tokenizer, settings.sequence_length, place.beat)
        self._order = collate.RowOrder(len(rows), batch=self._cell.step_batch, seed=trial.seed)
        self._fill = collate.padding_id(tokenizer)
        self._work: dict[str, int] = {}

    def longest(self, steps: int) -> int:
        """Tokens of the longest row that the first `steps` steps touch."""
        return max(len(self._sequences[row].ids) for row in self._order.used(steps))

    def take_work(self) -> dict[str, int]:
        """What this rank computed since the last call, under the names of SFT's counts with `ptx_` in front."""
        work, self._work = self._work, {}
        return {f"ptx_{name}": count for name, count in work.items()}

    def micro_batches(self, step: int) -> Iterator[tuple[sft.Batch, int]]:
        """Yield the micro-batches of this rank in a step of as many rows as PPO has sequences, and what their losses are divided by."""
        place, rows = self._place, self._order.rows(step)
        step_tokens = max(1, sum(self._sequences[row].loss_tokens for row in rows))
        micros = collate.micro_steps(rows, rank=place.data_rank, world=place.data_ranks, micro=self._cell.settings.micro_batch)
        for members in micros:
            batch = sft.collate_batch([self._sequences[row] for row in members], self._fill, place.device)
            sft.count(self._work, batch)
            yield batch, sft.loss_denominator(self._cell, batch, step_tokens, len(rows) // len(members))

    @staticmethod
    def loss(policy: LanguageModel, batch: sft.Batch, denominator: int) -> Tensor:
        """Share of this micro-batch in the step's ptx loss."""
        return sft.token_losses(policy.reader, batch).sum() / denominator


def check_batches(cell: Cell, num_prompts: int, world_size: int) -> None:
    """Raise UserError if the prompts of an iteration do not divide over ranks and steps."""
    if num_prompts % world_size or num_prompts % cell.step_batch:
        raise UserError(
            f"prompts_per_iteration do not divide; seen: {num_prompts} prompts over all ranks, {world_size} ranks, "
            f"{cell.step_batch} sequences a step; a multiple of both the ranks and the global batch would be right"
        )


def _parts(rows: int, micro: int) -> list[slice]:
    return [slice(start, start + micro) for start in range(0, rows, micro)]
