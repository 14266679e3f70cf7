"""What the stages promise of their first steps, and what the old semantics change."""

from __future__ import annotations

import pytest

from tests.trials import only, run_forked, tiny_cell, tiny_trial

RM = {"steps": 2, "global_batch": 8, "micro_batch": 8, "sequence_length": 64, "held_out_rows": 8}
PPO = {
    "iterations": 2, "prompts_per_iteration": 16, "global_batch": 8, "micro_batch": 8, "prompt_length": 16, "response_length": 8,
    "sequence_length": 64, "held_out_rows": 8, "lap_steps": 1, "learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("semantics")


def run(root, stage, **changes):
    cell = tiny_cell(stage, **{**(RM if stage == "rm" else PPO), **changes})
    return only(run_forked(tiny_trial(cell, root / cell.cell_id)))


@pytest.fixture(scope="module")
def ppo(root):
    return run(root, "ppo", ppo_epochs=2)


def test_kl_is_0_before_anything_is_learned(ppo):
    assert ppo.series["kl"][0] == 0.0
    assert ppo.held_out["kl_before"] == 0.0
    assert ppo.series["kl"][1] > 0.0


def test_the_ratio_is_1_on_the_first_mini_batch_of_every_iteration(ppo):
    assert max(ppo.series["first_ratio_error"]) < 1e-5
    assert max(abs(value) for value in ppo.series["first_approximate_kl"]) < 1e-6


def test_rollout_and_learner_agree_on_logprobs(ppo):
    assert 0.0 <= max(ppo.series["rollout_logprob_error"]) < 1e-4


def test_the_first_policy_loss_without_ptx_is_minus_the_mean_advantage(root):
    """Ratio 1 and whitened advantages over one step of all sequences: the loss is 0."""
    part = run(root, "ppo", global_batch=16)
    assert part.series["loss"][0] == pytest.approx(0.0, abs=1e-5)


def test_policy_value_and_ptx_losses_are_recorded_and_mix_as_stated(root):
    part = run(root, "ppo", ptx="synthetic-instruct", ptx_coef=0.25, global_batch=16)
    for step, (policy, ptx) in enumerate(zip(part.series["policy_loss"], part.series["ptx_loss"], strict=True)):
        assert part.series["loss"][step] == pytest.approx(0.75 * policy + 0.25 * ptx, rel=1e-5)
    assert min(part.series["value_loss"]) > 0
    assert part.series["ptx_loss"][0] > 5


def test_fixed_responses_have_exactly_r_tokens_and_natural_ones_at_most(root):
    fixed, natural = run(root, "ppo"), run(root, "ppo", length="natural")
    assert set(fixed.series["response_tokens"]) == {8.0}
    assert fixed.laps[0].counts == {
        "sequences": 16,
        "prompt_tokens": fixed.laps[0].counts["prompt_tokens"],
        "response_tokens": 128,
        "learned_tokens": 128,
    }
    assert max(natural.series["response_tokens"]) <= 8.0


def test_phases_add_up_to_the_lap(ppo):
    names = {
        "rollout_prefill",
        "rollout_decode",
        "reward",
        "reference",
        "policy_logprob",
        "value",
        "advantage",
        "policy_learn",
        "critic_learn",
        "other",
    }
    for lap in ppo.laps:
        assert lap.phases.keys() == names
        assert sum(lap.phases.values()) <= lap.seconds * 1.001
        assert lap.phases["other"] < 0.25 * lap.seconds


def test_samples_are_kept_as_text(ppo):
    assert len(ppo.facts["samples"]) == 3
    assert {"prompt", "response", "reward"} == ppo.facts["samples"][0].keys()
    assert all(sample["prompt"] for sample in ppo.facts["samples"])


def test_the_critic_may_learn_at_its_own_rate_also_at_0(root):
    part = run(root, "ppo", critic_learning_rate=0.0)
    assert set(part.series["critic_learning_rate"]) == {0.0}
    assert max(part.series["learning_rate"]) == 1e-3


def test_both_reward_losses_train_alike(root):
    one, other = run(root, "rm", loss="log_sig"), run(root, "rm", loss="log_exp")
    assert one.series["loss"] == pytest.approx(other.series["loss"], abs=1e-6)
    assert one.held_out["margin_after"] == pytest.approx(other.held_out["margin_after"], abs=1e-5)


def test_the_old_reward_depends_on_the_padded_length_and_the_standard_one_does_not(root):
    standard = [run(root, "rm", sequence_length=length).held_out["margin_before"] for length in (64, 96)]
    old = [run(root, "rm", sequence_length=length, semantics="coati-0.2.8").held_out["margin_before"] for length in (64, 96)]
    assert standard[0] == pytest.approx(standard[1], abs=1e-6)
    assert abs(old[0] - old[1]) > 1e-5


def test_the_old_ppo_learns_from_one_advantage_a_sequence(root):
    """Not whitened, so the first loss is the mean of value - reward, not 0; all else is computed from the same rollout."""
    standard, old = run(root, "ppo", global_batch=16), run(root, "ppo", global_batch=16, semantics="coati-0.2.8")
    assert old.series["entropy"][0] == standard.series["entropy"][0]
    assert abs(old.series["loss"][0]) > 1e-3
    assert old.facts["semantics_switches"][-1] == "ppo-sequence-reward-without-gae"


def test_with_lora_only_the_adapters_are_trained_and_counted(root):
    part = run(root, "ppo", lora_rank=4)
    assert part.facts["lora"]["rank"] == 4
    assert part.facts["lora"]["trainable"] == part.facts["parameters"]["trainable"] < part.facts["parameters"]["total"]
    assert part.facts["critic"]["parameters"]["trainable"] > part.facts["lora"]["trainable"]


@pytest.mark.parametrize("model", ["llama-tiny", "opt-tiny", "gpt2-tiny"])
def test_other_architectures_roll_out_with_a_cache_as_they_learn(root, model):
    from bench.models.presets import PRESETS

    if model not in PRESETS:
        pytest.skip(f"no preset {model}")
    part = run(root, "ppo", model=model, iterations=1, length="natural")
    assert max(part.series["rollout_logprob_error"]) < 1e-4
    assert max(part.series["first_ratio_error"]) < 1e-4
