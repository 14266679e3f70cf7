"""The parts of the stages that can be looked at without a trial."""

from __future__ import annotations

import pytest
import torch

from bench.data import collate
from bench.errors import DataError, UserError
from bench.models.build import accepts_position_ids
from bench.rollout.base import Rollout
from bench.rollout.head import HeadWindow
from bench.stages import rm, sft
from bench.stages.ppo import Scored, check_batches, loss_weights, make_experience
from bench.stages.ppo_models import ScoreModel
from bench.stages.reader import Reader
from bench.stages.schedule import learning_rate_at
from tests.trials import tiny_cell

CPU = torch.device("cpu")
COATI = {"semantics": "coati-0.2.8"}


def tiny_policy():
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4)).eval()


def tiny_scorer():
    from bench.models.build import Scorer

    return Scorer(tiny_policy().transformer).eval()


# -- SFT ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader():
    policy = tiny_policy()
    return Reader(policy, HeadWindow(policy), accepts_position_ids(policy))


def sft_loss(reader, *sequences, fill=0):
    batch = sft.collate_batch(list(sequences), fill, CPU)
    return float(sft.token_losses(reader, batch).detach().sum() / batch.loss_tokens)


def test_the_loss_is_that_of_transformers_with_masked_labels(reader):
    sequences = [collate.Tokens([5, 6, 7, 8, 9], 2), collate.Tokens([10, 11, 12], 1)]
    padded = collate.pad_right([sequence.ids for sequence in sequences], 0)
    labels = padded.ids_BT.masked_fill(padded.mask_BT == 0, -100)
    labels[0, :2], labels[1, :1] = -100, -100
    expected = reader.module(input_ids=padded.ids_BT, attention_mask=padded.mask_BT, labels=labels).loss
    assert sft_loss(reader, *sequences) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_masked_token_contributes_nothing_as_a_label(reader):
    """What the first prompt token should have been predicted as does not matter; that it is read does."""
    sequence = collate.Tokens([5, 6, 7, 8, 9], 3)
    batch = sft.collate_batch([sequence], 0, CPU)
    assert batch.place_K.tolist() == [2, 3]
    assert batch.target_K.tolist() == [8, 9]
    losses = sft.token_losses(reader, batch)
    assert losses.shape == (2,)
    assert (losses > 0).all()


def test_padding_contributes_nothing(reader):
    short, long = collate.Tokens([5, 6, 7], 1), collate.Tokens(list(range(4, 20)), 15)
    alone = sft.token_losses(reader, sft.collate_batch([short], 0, CPU))
    padded = sft.token_losses(reader, sft.collate_batch([short, long], 3, CPU))
    torch.testing.assert_close(padded[:2], alone)


def test_the_old_mean_weighs_micro_batches_alike_and_the_standard_one_tokens():
    batch = sft.Batch(torch.zeros(1, 5), torch.ones(1, 5), torch.zeros(2), torch.zeros(2), loss_tokens=2, tokens=5)
    standard, old = tiny_cell("sft", steps=1), tiny_cell("sft", steps=1, **COATI)
    assert sft.loss_denominator(standard, batch, step_tokens=30, num_micro_batches=4) == 30
    assert sft.loss_denominator(old, batch, step_tokens=30, num_micro_batches=4) == 8


def test_data_whose_responses_are_mostly_cut_off_is_refused():
    kept, lost = collate.Tokens([1, 2, 3], 1), collate.Tokens([1, 2], 2)
    sft.check_responses([kept, lost], 64)
    with pytest.raises(DataError, match=r"2 of 3 training sequences have no response token left: sequence_length 64"):
        sft.check_responses([kept, lost, lost], 64)


# -- RM ----------------------------------------------------------------------------------------------------------------


def rm_scores(pairs, *, fill=0, width=None, padded_mean=False):
    batch = rm.collate_batch(pairs, fill, CPU, width)
    with torch.no_grad():
        scores = tiny_scorer()(batch.ids_BT, batch.mask_BT)
    return rm.sequence_scores(scores, batch.mask_BT, padded_mean=padded_mean)


PAIRS = [collate.Pair([5, 6, 7, 8], [5, 6, 9]), collate.Pair([10, 11], [10, 12, 13, 14, 15])]


def test_the_score_is_read_at_the_last_real_token():
    batch = rm.collate_batch(PAIRS, 0, CPU)
    scores = torch.arange(batch.ids_BT.numel(), dtype=torch.float32).reshape(batch.ids_BT.shape)
    assert rm.sequence_scores(scores, batch.mask_BT, padded_mean=False).tolist() == [3.0, 6.0, 12.0, 19.0]


def test_padding_changes_no_score_but_changes_the_old_one():
    narrow, wide = rm_scores(PAIRS), rm_scores(PAIRS, width=12)
    torch.testing.assert_close(narrow, wide, atol=1e-5, rtol=1e-5)
    old_narrow, old_wide = rm_scores(PAIRS, padded_mean=True), rm_scores(PAIRS, width=12, padded_mean=True)
    assert (old_narrow - old_wide).abs().max() > 1e-3


def test_the_old_score_is_the_mean_over_all_positions_but_the_last():
    scores = torch.tensor([[1.0, 2.0, 3.0, 100.0]])
    assert rm.sequence_scores(scores, torch.tensor([[1, 1, 0, 0]]), padded_mean=True).tolist() == [2.0]


def test_shuffled_labels_swap_about_half_of_the_pairs_and_always_the_same():
    pairs = [collate.Pair([row, 1], [row, 2]) for row in range(400)]
    mixed = rm.shuffled(pairs, 7)
    swapped = sum(pair.chosen[1] == 2 for pair in mixed)
    assert 160 < swapped < 240
    assert mixed == rm.shuffled(pairs, 7)
    assert [pair.chosen[0] for pair in mixed] == list(range(400))


# -- PPO ---------------------------------------------------------------------------------------------------------------


def tiny_rollout(rows=4, length=5):
    torch.manual_seed(1)
    mask = (torch.arange(length) < torch.tensor([5, 2, 4, 1]).unsqueeze(1)).long()
    ids = torch.randint(3, 30, (rows, 3 + length))
    logp = -torch.rand(rows, length) * mask
    rollout = Rollout(ids, torch.cat([torch.ones(rows, 3, dtype=torch.long), mask], dim=1), mask, logp)
    scored = Scored(
        torch.randn(rows) * 3, logp + 0.3 * torch.randn(rows, length) * mask, logp, torch.rand(rows, length), torch.randn(rows, length)
    )
    return rollout, scored


def test_without_kl_the_advantage_is_reward_less_value():
    rollout, scored = tiny_rollout()
    cell = tiny_cell("ppo", kl_coef=0.0, gamma=1.0, gae_lambda=1.0, whiten_advantages=False, reward_clip=None)
    experience, _ = make_experience(rollout, scored, cell)
    expected = (scored.reward_n.unsqueeze(1) - scored.values_nR) * rollout.response_mask_BR
    torch.testing.assert_close(experience.advantages_NR, expected)


def test_the_kl_penalty_is_per_token_and_lowers_the_return():
    rollout, scored = tiny_rollout()
    free, _ = make_experience(rollout, scored, tiny_cell("ppo", kl_coef=0.0, gae_lambda=1.0, whiten_advantages=False))
    paid, _ = make_experience(rollout, scored, tiny_cell("ppo", kl_coef=0.5, gae_lambda=1.0, whiten_advantages=False))
    kl = (scored.logp_nR - scored.reference_logp_nR) * rollout.response_mask_BR
    from_here_on = kl.flip(1).cumsum(1).flip(1) * rollout.response_mask_BR
    torch.testing.assert_close(free.returns_NR - paid.returns_NR, 0.5 * from_here_on)


def test_whitening_is_over_the_response_tokens_of_the_whole_iteration():
    rollout, scored = tiny_rollout()
    experience, _ = make_experience(rollout, scored, tiny_cell("ppo"))
    chosen = experience.advantages_NR[rollout.response_mask_BR > 0]
    assert float(chosen.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(chosen.var(unbiased=False)) == pytest.approx(1.0, abs=1e-3)


def test_old_semantics_give_one_reward_a_sequence_neither_clipped_nor_whitened():
    rollout, scored = tiny_rollout()
    scored = scored._replace(reward_n=torch.tensor([9.0, -9.0, 1.0, 0.0]), values_nR=torch.full((4, 5), 0.5))
    experience, _ = make_experience(rollout, scored, tiny_cell("ppo", kl_coef=0.1, **COATI))
    x = (scored.logp_nR - scored.reference_logp_nR).double()
    mask = rollout.response_mask_BR
    kl = ((x.exp() - 1 - x) * mask).sum(1) / mask.sum(1)
    expected = ((scored.reward_n - 0.1 * kl).unsqueeze(1) - 0.5) * mask
    torch.testing.assert_close(experience.advantages_NR.double(), expected, atol=1e-5, rtol=1e-5)
    assert experience.returns_NR.abs().max() > 5


def test_kl_is_0_and_observations_are_right_where_policy_and_reference_agree():
    rollout, scored = tiny_rollout()
    scored = scored._replace(reference_logp_nR=scored.logp_nR)
    _, seen = make_experience(rollout, scored, tiny_cell("ppo"))
    assert float(seen["kl"]) == float(seen["kl_sum"]) == 0.0
    assert float(seen["response_tokens"]) == 3.0
    assert float(seen["rollout_logprob_error"]) == 0.0
    assert float(seen["reward"]) == pytest.approx(float(scored.reward_n.mean()))


def test_loss_weights_sum_to_1_by_token_or_by_sequence():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    assert loss_weights(mask, by_sequence=False).tolist() == [pytest.approx([0.2] * 4), pytest.approx([0.2, 0, 0, 0])]
    assert loss_weights(mask, by_sequence=True).tolist() == [pytest.approx([0.125] * 4), pytest.approx([0.5, 0, 0, 0])]


def test_values_stand_before_each_response_token_and_the_old_value_is_the_prompts_mean():
    scorer, ids = tiny_scorer(), torch.tensor([[0, 5, 6, 7, 8], [4, 5, 6, 7, 9]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    with torch.no_grad():
        scores = scorer(ids, mask)
        new = ScoreModel(scorer, places=False, coati=frozenset()).values(ids, mask, 2)
        old = ScoreModel(scorer, places=False, coati=frozenset({"ppo-sequence-reward-without-gae"})).values(ids, mask, 2)
    torch.testing.assert_close(new, scores[:, 2:4])
    torch.testing.assert_close(old[0], scores[0, 1:3].mean().expand(2))
    torch.testing.assert_close(old[1], scores[1, :3].mean().expand(2))


@pytest.mark.parametrize(("prompts", "world"), [(20, 1), (18, 4)])
def test_prompts_that_do_not_divide_are_told(prompts, world):
    with pytest.raises(UserError, match="prompts_per_iteration do not divide"):
        check_batches(tiny_cell("ppo", global_batch=16), prompts, world)


# -- schedule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 2, 7, 64])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_learning_rate_rises_to_its_peak_and_never_is_0_or_above_it(total, schedule):
    rates = [learning_rate_at(step, total, peak=2.0, schedule=schedule, warmup_share=0.03) for step in range(total)]
    assert all(0 < rate <= 2.0 for rate in rates)
    assert total == 1 or max(rates) == 2.0
    peak = rates.index(max(rates))
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)


def test_without_warm_up_the_first_step_has_the_peak():
    assert learning_rate_at(0, 10, peak=3.0, schedule="cosine", warmup_share=0.0) == 3.0
