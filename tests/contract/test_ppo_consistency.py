"""A rollout or a learner that is wrong makes the trial invalid, in the real stage on real models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.record import Part
from bench.rollout.engines import CachedRollout
from bench.stages import ppo
from tests.trials import run_forked, tiny_cell, tiny_trial

PRECISIONS = ("fp32", "bf16-master")


def run(folder: Path, **changes: object) -> Part:
    """A PPO trial of two iterations, on weights whose distributions are not flat."""
    cell = tiny_cell(
        "ppo", iterations=2, prompts_per_iteration=8, global_batch=8, micro_batch=4, prompt_length=16, response_length=16, **changes
    )  # fmt: skip
    return run_forked(tiny_trial(cell, folder / "trial"))[0]


@pytest.fixture
def sharper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights give nearly flat distributions; sharper ones are like those of a trained model."""
    build = ppo.build_models

    def built(*arguments: object) -> object:
        models = build(*arguments)
        with torch.no_grad():
            for reader in (models.policy_reader, models.reference):
                reader.reader.module.get_input_embeddings().weight.mul_(6.0)
        return models

    monkeypatch.setattr(ppo, "build_models", built)


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Have the rollout engine answer with other log-probabilities than it sampled by."""
    generate = CachedRollout.generate

    def wrong(self: CachedRollout, *arguments: object) -> object:
        rollout = generate(self, *arguments)
        return rollout._replace(logp_BR=change(rollout.logp_BR))

    monkeypatch.setattr(CachedRollout, "generate", wrong)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_right_engine_is_consistent_on_sharp_distributions(tmp_path: Path, sharper: None, precision: str) -> None:
    part = run(tmp_path, precision=precision)
    assert (part.outcome, part.reason) == ("ok", None)
    assert 1 < part.series["entropy"][0] < 6.5, "neither flat nor certain"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "change",
    [lambda logp: logp.roll(1, dims=1), lambda logp: logp / 0.7, lambda logp: logp - 1.5],
    ids=("shifted", "temperature", "offset"),
)
def test_an_engine_with_wrong_log_probabilities_makes_the_trial_invalid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharper: None, precision: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    spoil(monkeypatch, change)
    part = run(tmp_path, precision=precision)
    assert part.outcome == "invalid"
    assert part.reason is not None
    assert part.reason.startswith("PPO consistency at iteration 0: rollout_")
    assert f"is rounding in {precision}" in part.reason
    assert part.series["rollout_kl"], "the values that say so are kept"


def test_a_learner_with_other_old_log_probabilities_is_invalid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = ppo.make_experience

    def wrong(*arguments: object) -> object:
        experience, observed = make(*arguments)
        return experience._replace(logp_NR=experience.logp_NR + 0.1), observed

    monkeypatch.setattr(ppo, "make_experience", wrong)
    part = run(tmp_path)
    assert part.outcome == "invalid"
    assert part.reason is not None
    assert part.reason.startswith("PPO consistency at iteration 0: first_ratio_error is 0.095")


@pytest.mark.parametrize(("name", "value"), [("reward", float("nan")), ("kl", float("inf"))])
def test_a_reward_or_kl_that_is_not_finite_is_invalid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: float) -> None:
    observe = ppo.observe
    monkeypatch.setattr(ppo, "observe", lambda *arguments: {**observe(*arguments), name: torch.tensor(value)})
    part = run(tmp_path)
    assert (part.outcome, part.step) == ("invalid", 0)
    assert part.reason == f"PPO consistency at iteration 0: {name} is {value}; a finite number would be right"


def test_all_ranks_agree_that_a_trial_is_invalid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda logp: logp + 1.0)
    cell = tiny_cell(
        "ppo", strategy="ddp", nodes=2, iterations=2, prompts_per_iteration=8, global_batch=8, micro_batch=4, response_length=8
    )
    parts = run_forked(tiny_trial(cell, tmp_path / "trial"))
    assert {part.outcome for part in parts} == {"invalid"}
    assert len({part.reason for part in parts}) == 1
