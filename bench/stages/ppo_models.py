"""The four models of PPO: the policy and its reference, the critic and the reward model, and how they are read.

The numbered details are explained, with their sources, in docs/implementation-details.md.

Shapes: B sequences of one forward pass; P prompt positions, R response positions, S = P + R; V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from bench.data.collate import NO_LOSS
from bench.models.build import accepts_position_ids, add_lora, backbone, build_policy, build_scorer, counts, initial_sha256, position_ids
from bench.rl.losses import masked_mean, token_logprobs
from bench.rollout.head import HeadWindow
from bench.stages.base import Place
from bench.stages.job import model_facts
from bench.stages.reader import Reader
from bench.stages.rm import sequence_scores
from bench.strategies.base import Engine, Strategy
from bench.trial import Trial


class LanguageModel(NamedTuple):
    """The policy, or its frozen reference, as PPO reads it."""

    reader: Reader
    temperature: float

    def logprobs(self, ids_BS: Tensor, mask_BS: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Log-probability of each response token (0 behind its end), and the logits they come from."""
        logits_BRV = self.reader.logits(ids_BS, mask_BS, slice(-length - 1, -1))  # (26)
        targets_BR = ids_BS[:, -length:].masked_fill(mask_BS[:, -length:] == 0, NO_LOSS)
        return token_logprobs(logits_BRV, targets_BR, temperature=self.temperature), logits_BRV  # (25)


class ScoreModel(NamedTuple):
    """The critic, or the frozen reward model."""

    module: nn.Module
    places: bool
    coati: frozenset[str]
    """Old behaviours that are switched on."""

    def scores(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Output of the head at every position, BS, fp32."""
        places = {"position_ids": position_ids(mask_BS)} if self.places else {}
        return self.module(input_ids=ids_BS, attention_mask=mask_BS, **places).float()

    def rewards(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """(27) Score of each sequence, as the reward model was trained to give it."""
        return sequence_scores(self.scores(ids_BS, mask_BS), mask_BS, padded_mean="rm-mean-over-padded-positions" in self.coati)

    def values(self, ids_BS: Tensor, mask_BS: Tensor, length: int) -> Tensor:
        """(28) Value before each response token, BR. Old semantics: one value, the mean over the prompt's tokens, at all of them."""
        scores_BS = self.scores(ids_BS, mask_BS)
        if "ppo-sequence-reward-without-gae" in self.coati:
            value_B = masked_mean(scores_BS[:, :-length], mask_BS[:, :-length])
            return value_B.unsqueeze(1).expand(-1, length)
        return scores_BS[:, -length - 1 : -1]


class Models(NamedTuple):
    """All four, and what a checkpoint needs to know of the policy."""

    policy: Engine
    critic: Engine
    policy_reader: LanguageModel
    critic_reader: ScoreModel
    reference: LanguageModel
    reward: ScoreModel
    config: Any
    lora: dict[str, Any]
    facts: dict[str, Any]


def build_models(trial: Trial, strategy: Strategy, place: Place) -> Models:
    """(19) Policy and reference from the start `policy`; (20) critic and reward model from the start `reward`, or with a fresh head."""
    cell = trial.parsed_cell
    settings, switches = cell.settings, frozenset(cell.semantics_switches)
    shapes = strategy.shapes_suffice(cell, place.rank)
    policy = build_policy(trial, shapes=shapes)
    places, config = accepts_position_ids(policy), policy.config
    reference = strategy.place_frozen(policy, cell, place.device)
    place.beat()
    fresh = settings.reward_model == "fresh-head"
    critic = build_scorer(trial, fresh_head=fresh, source="policy" if fresh else "reward", shapes=shapes)
    reward = strategy.place_frozen(critic, cell, place.device)
    place.beat()
    lora, critic_lora = add_lora(policy, cell, trial.seed), add_lora(critic, cell, trial.seed + 1)
    facts = model_facts(counts(policy), initial_sha256(policy), lora, policy.config)
    facts["critic"] = model_facts(counts(critic), initial_sha256(critic), critic_lora, critic.config)
    window = HeadWindow(policy)
    critic_rate = settings.learning_rate if settings.critic_learning_rate is None else settings.critic_learning_rate
    policy_engine = strategy.prepare(policy, cell, place.device, learning_rate=settings.learning_rate)
    critic_engine = strategy.prepare(critic, cell, place.device, learning_rate=critic_rate)
    return Models(
        policy=policy_engine,
        critic=critic_engine,
        policy_reader=LanguageModel(Reader(policy_engine.module, window, places), settings.temperature),
        critic_reader=ScoreModel(critic_engine.module, places, switches),
        reference=LanguageModel(Reader(reference, HeadWindow(backbone(reference)), places), settings.temperature),
        reward=ScoreModel(reward, places, switches),
        config=config,
        lora=lora,
        facts=facts,
    )
