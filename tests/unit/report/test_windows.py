from __future__ import annotations

from dataclasses import replace

import pytest

from bench.record import Lap
from bench.report.inventory import Row
from bench.report.metrics import Trial
from bench.report.windows import JobLap, cut_window, is_steady, job_laps, theil_sen
from tests.unit.report.trial_factory import make_cell, make_record


def laps(*seconds: float, steps: int = 5) -> list[JobLap]:
    return [JobLap(index * steps, steps, value, (value,), {"tokens": 10}, ({},)) for index, value in enumerate(seconds)]


def test_five_laps_are_dropped_as_warm_up() -> None:
    window = cut_window(laps(9, 8, 7, 6, 5, 2, 2, 2, 2), "sft")
    assert window is not None
    assert (window.dropped, window.elapsed, window.total("tokens"), window.steady) == (5, 8, 40, True)


def test_ppo_drops_two_iterations() -> None:
    window = cut_window(laps(9, 8, 2, 2, 2, 2, steps=1), "ppo")
    assert window is not None
    assert (window.dropped, window.elapsed) == (2, 8)


def test_a_short_trial_drops_its_first_lap_only_and_says_so() -> None:
    window = cut_window(laps(9, 2, 2), "sft")
    assert window is not None
    assert (window.dropped, window.elapsed) == (1, 4)
    assert window.indicative == "too few laps to drop 5 as warm-up; dropped 1"


def test_a_single_lap_is_kept() -> None:
    window = cut_window(laps(9), "sft")
    assert window is not None
    assert (window.dropped, window.elapsed, window.steady) == (0, 9, None)


def test_no_laps_give_no_window() -> None:
    assert cut_window([], "sft") is None


def test_a_longer_warm_up_is_found_and_dropped() -> None:
    window = cut_window(laps(*[9] * 5, *[4.0] * 6, *[2.0] * 14), "sft")
    assert window is not None
    assert 5 < window.dropped <= 11
    assert window.steady is True


def test_a_series_that_never_settles_is_kept_whole_and_called_unsteady() -> None:
    window = cut_window(laps(*[1.0 + 0.1 * index for index in range(20)]), "sft")
    assert window is not None
    assert (window.dropped, window.steady) == (5, False)


def test_laps_that_drift_are_unsteady_however_few_are_left_of_them() -> None:
    """Dropping three of six would leave three, too few to test: no reason to believe in them."""
    for count in (6, 7, 8):
        window = cut_window(laps(*[10.0 + 2 * index for index in range(count)], steps=1), "ppo")
        assert window is not None
        assert (window.dropped, window.steady) == (2, False)


def test_phases_are_known_of_each_rank() -> None:
    """Ranks that wait for each other share a lap, not its phases: which was slower by a hair decides nothing."""
    cell = make_cell("ppo", processes_per_node=2)
    record = make_record(cell)
    for slower in (0, 1):
        parts = [replace(it, laps=[of_rank(lap, it.rank, hair=it.rank == slower) for lap in it.laps]) for it in record.parts]
        trial = Trial(Row(replace(record, parts=parts), cell, "a"))
        assert trial.window is not None
        seconds = 10.0 * len(trial.window.steps_by_lap)
        assert trial.in_phases("rollout_decode") == pytest.approx(0.6 * seconds)
        assert trial.phases == pytest.approx({"rollout_decode": 0.4 * seconds, "policy_learn": 0.6 * seconds})
        assert trial.window.phase_share == pytest.approx(1.0, rel=1e-3)


def of_rank(lap: Lap, rank: int, *, hair: bool) -> Lap:
    """A lap of 10 s, in which one rank decodes for 6 s and the other for 2."""
    decode = (6.0, 2.0)[rank]
    return replace(lap, seconds=10.001 if hair else 10.0, phases={"rollout_decode": decode, "policy_learn": 10.0 - decode})


def test_a_long_window_is_publishable() -> None:
    window = cut_window(laps(*[10.0] * 12), "sft")
    assert window is not None
    assert window.indicative is None


@pytest.mark.parametrize(
    ("seconds", "steps", "words"),
    [(10.0, 4, "window of 28 steps and 70.0 s"), (8.0, 5, "window of 35 steps and 56.0 s")],
)
def test_too_few_steps_or_seconds_are_indicative(seconds: float, steps: int, words: str) -> None:
    window = cut_window(laps(*[seconds] * 12, steps=steps), "sft")
    assert window is not None
    assert window.indicative == f"{words}; publishable from 30 steps and 60 s"


def test_a_drift_beyond_two_percent_is_not_steady() -> None:
    assert is_steady(laps(1.0, 1.0, 1.0, 1.0)) is True
    assert is_steady(laps(1.0, 1.0, 1.03, 1.03)) is False
    assert is_steady(laps(1.0, 1.0, 1.0)) is None


def test_the_robust_slope_ignores_an_outlier() -> None:
    assert theil_sen([0, 1, 2, 3, 99, 5, 6]) == pytest.approx(1.0)


def test_work_is_summed_over_ranks_and_the_slowest_rank_sets_the_time() -> None:
    record = make_record(make_cell("sft", "ddp", nodes=2), seconds=0.1)
    lap = job_laps(record)[1]
    assert lap.counts["loss_tokens"] == 8 * 5 * 60
    assert lap.seconds_by_rank == (pytest.approx(0.5), pytest.approx(0.505))
    assert lap.seconds == pytest.approx(0.505)


def test_ranks_that_see_the_same_tokens_count_once() -> None:
    record = make_record(make_cell("sft", "hybrid", nodes=2))
    shared = [replace(part, facts={**part.facts, "data_parallel_rank": 0}) for part in record.parts]
    lap = job_laps(replace(record, parts=shared))[0]
    assert lap.counts["loss_tokens"] == 4 * 5 * 60


def test_a_rank_that_stopped_early_ends_the_common_laps() -> None:
    record = make_record(make_cell("sft", "ddp", nodes=2))
    short = replace(record.parts[1], laps=record.parts[1].laps[:2])
    assert len(job_laps(replace(record, parts=[record.parts[0], short]))) == 2


def test_elapsed_is_that_of_the_slowest_rank_over_the_whole_window() -> None:
    first = [Lap(first_step=i * 5, steps=5, seconds=s, counts={"tokens": 1}) for i, s in enumerate((1.0, 3.0, 1.0))]
    second = [Lap(first_step=i * 5, steps=5, seconds=s, counts={"tokens": 1}) for i, s in enumerate((1.0, 1.0, 2.5))]
    record = make_record(make_cell("sft", "ddp", nodes=2))
    parts = [replace(part, laps=own) for part, own in zip(record.parts, (first, second), strict=True)]
    window = cut_window(job_laps(replace(record, parts=parts)), "sft")
    assert window is not None
    assert window.elapsed == 4.0
