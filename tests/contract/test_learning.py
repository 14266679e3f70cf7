"""The stages really learn, and their controls really do not."""

from __future__ import annotations

from math import sqrt
from statistics import fmean, stdev

import pytest

from tests.trials import only, run_forked, tiny_cell, tiny_trial

SFT = {"steps": 30, "global_batch": 8, "micro_batch": 8, "sequence_length": 64, "learning_rate": 1e-2, "warmup_share": 0.1}
RM = {"steps": 15, "global_batch": 8, "micro_batch": 8, "sequence_length": 64, "learning_rate": 5e-3, "warmup_share": 0.1}
PPO = {
    "iterations": 8, "prompts_per_iteration": 32, "global_batch": 16, "micro_batch": 16, "prompt_length": 24, "response_length": 12,
    "learning_rate": 2e-3, "warmup_share": 0.1, "lap_steps": 1,
}  # fmt: skip
SEEDS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("learning")


@pytest.fixture(scope="module")
def policy(root):
    return trained(root, "sft", SFT)


@pytest.fixture(scope="module")
def reward(root, policy):
    return trained(root, "rm", RM, starts={"policy": policy[1]})


def trained(root, stage, settings, starts=None):
    """A trial that saves its weights: its part and their folder."""
    folder = root / f"{stage}-start"
    part = only(run_forked(tiny_trial(tiny_cell(stage, **settings), folder, save=True, starts=starts)))
    return part, folder / "weights"


def test_sft_halves_the_held_out_loss(policy):
    part, _ = policy
    assert part.held_out["loss_after"] < part.held_out["loss_before"] / 2


def test_sft_at_learning_rate_0_learns_nothing(root):
    part = only(run_forked(tiny_trial(tiny_cell("sft", **{**SFT, "steps": 5, "learning_rate": 0.0}), root / "sft-control")))
    assert part.held_out["loss_after"] == part.held_out["loss_before"]


def test_rm_tells_chosen_from_rejected_on_held_out_pairs(reward):
    part, _ = reward
    assert part.held_out["accuracy_after"] >= 0.9
    assert part.held_out["margin_after"] > 1.0
    assert abs(part.held_out["margin_before"]) < 0.05


def test_rm_with_shuffled_labels_is_right_as_often_as_a_coin(root):
    """500 held-out pairs: a coin lies within 0.5 +- 0.05 with 97.5 %, and the seed is fixed."""
    cell = tiny_cell("rm", **{**RM, "shuffle_labels": True, "held_out_rows": 500, "micro_batch": 8})
    part = only(run_forked(tiny_trial(cell, root / "rm-control")))
    assert 0.45 <= part.held_out["accuracy_after"] <= 0.55


def test_a_stage_starts_from_the_weights_that_the_one_before_it_left(policy, reward, root):
    """The policy's held-out loss before further training is that after its own training: nothing was lost on disk."""
    part, folder = policy
    again = only(run_forked(tiny_trial(tiny_cell("sft", **{**SFT, "steps": 1}), root / "again", starts={"policy": folder})))
    assert again.held_out["loss_before"] == pytest.approx(part.held_out["loss_after"], rel=1e-6)
    assert (reward[1] / "model.safetensors").is_file()


@pytest.fixture(scope="module")
def rewards(root, policy, reward):
    """Held-out rewards before and after PPO, by learning rate, one for each seed."""
    starts = {"policy": policy[1], "reward": reward[1]}

    def run(rate, trial):
        cell = tiny_cell("ppo", **{**PPO, "learning_rate": rate})
        return only(run_forked(tiny_trial(cell, root / f"ppo-{rate}-{trial}", trial=trial, starts=starts)))

    return {2e-3: [run(2e-3, trial) for trial in range(SEEDS)], 0.0: [run(0.0, 0)]}


def test_ppo_raises_the_held_out_reward_by_more_than_two_standard_errors(rewards):
    gains = [part.held_out["reward_after"] - part.held_out["reward_before"] for part in rewards[2e-3]]
    assert min(gains) > 0
    assert fmean(gains) > 2 * stdev(gains) / sqrt(len(gains))


def test_ppo_at_learning_rate_0_gains_nothing(rewards):
    (control,) = rewards[0.0]
    assert control.held_out["reward_after"] == pytest.approx(control.held_out["reward_before"], abs=1e-5)
    assert control.held_out["kl_after"] == 0.0
    assert min(part.held_out["reward_after"] for part in rewards[2e-3]) > control.held_out["reward_after"]


def test_ppo_stays_near_its_reference(rewards):
    for part in rewards[2e-3]:
        assert 0.0 < part.held_out["kl_after"] < 0.5
        assert max(part.series["kl"]) < 1.0


def test_a_higher_kl_coefficient_keeps_the_policy_nearer(root, policy, reward, rewards):
    starts = {"policy": policy[1], "reward": reward[1]}
    strict = only(run_forked(tiny_trial(tiny_cell("ppo", **{**PPO, "kl_coef": 5.0}), root / "ppo-strict", starts=starts)))
    assert strict.held_out["kl_after"] < rewards[2e-3][0].held_out["kl_after"]
