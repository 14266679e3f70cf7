from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bench.cell import Cell
from bench.record import Memory
from bench.report.inventory import Row
from bench.report.metrics import METRICS, Trial, Value, primary_metric
from tests.unit.report.trial_factory import GIB, make_cell, make_record

GPU: dict[str, Any] = {"device": "cuda", "model": "bloom-560m", "steps": 50}


def trial_of(cell: Cell, **rest: Any) -> Trial:
    return Trial(Row(make_record(cell, **rest), cell, "a.json"))


def changed(trial: Trial, **changes: Any) -> Trial:
    """The trial with the part of every rank changed."""
    parts = [dataclasses.replace(part, **changes) for part in trial.record.parts]
    return Trial(Row(dataclasses.replace(trial.record, parts=parts), trial.cell, "a.json"))


def number(trial: Trial, name: str) -> float:
    value = trial.values[name]
    assert value.number is not None, value.reason
    return value.number


def test_throughput_by_hand() -> None:
    """10 laps of 5 steps of 8 rows, 5 dropped; two ranks at 0.1 and 0.101 s a step: the slower one sets the time."""
    trial = trial_of(make_cell("sft", "ddp", nodes=2, **GPU), seconds=0.1)
    elapsed = 25 * 0.101
    assert number(trial, "loss_tokens_per_second") == pytest.approx(25 * 8 * 60 / elapsed)
    assert number(trial, "tokens_per_second") == pytest.approx(25 * 8 * 90 / elapsed)
    assert number(trial, "padded_tokens_per_second") == pytest.approx(25 * 8 * 120 / elapsed)
    assert number(trial, "sequences_per_second") == pytest.approx(25 * 8 / elapsed)
    assert number(trial, "loss_tokens_per_second_per_device") == pytest.approx(25 * 8 * 60 / elapsed / 2)
    assert number(trial, "step_seconds") == pytest.approx(0.101)
    assert number(trial, "straggler_ratio") == pytest.approx(0.101 / 0.1005)
    assert number(trial, "padding_efficiency") == pytest.approx(0.75)
    assert number(trial, "time_to_first_step") == pytest.approx(4.6)


def test_a_preference_pair_is_two_sequences() -> None:
    trial = trial_of(make_cell("rm", **GPU), seconds=0.1)
    assert number(trial, "sequences_per_second") == pytest.approx(25 * 8 * 2 / 2.5)


def test_memory_is_that_of_the_largest_rank() -> None:
    trial = trial_of(make_cell("sft", "ddp", nodes=2, **GPU))
    assert number(trial, "peak_allocated_gib") == pytest.approx(4.1, rel=1e-6)
    assert number(trial, "peak_reserved_gib") == pytest.approx(5.0)
    assert number(trial, "device_memory_gib") == pytest.approx(6.5)
    assert number(trial, "host_peak_gib") == pytest.approx(1.2, rel=1e-6)


def test_ppo_has_a_peak_for_each_kind_of_phase() -> None:
    trial = trial_of(make_cell("ppo", "ddp", nodes=2, device="cuda", iterations=8), seconds=20.0)
    peaks = {"rollout_prefill": 5, "rollout_decode": 6, "reward": 7, "advantage": 1, "policy_learn": 9, "critic_learn": 8}
    memories = [
        dataclasses.replace(part.memory, phases_peak_allocated_bytes={name: (size + part.rank) * GIB for name, size in peaks.items()})
        for part in trial.record.parts
    ]
    parts = [dataclasses.replace(part, memory=memory) for part, memory in zip(trial.record.parts, memories, strict=True)]
    values = Trial(Row(dataclasses.replace(trial.record, parts=parts), trial.cell, "a.json")).values
    assert [values[f"peak_{kind}_gib"].number for kind in ("rollout", "scoring", "learning")] == [7, 8, 10]
    assert trial.values["peak_rollout_gib"].reason == "no allocator peak of these phases was recorded"


def test_losses() -> None:
    trial = changed(trial_of(make_cell("sft")), series={"loss": [9.0, *[5.0] * 25, 1.0, 2.0, 3.0, 4.0]})
    assert number(trial, "first_loss") == 9.0
    assert number(trial, "final_loss") == pytest.approx((5 + 1 + 2 + 3 + 4) / 5)


def test_ppo_by_hand() -> None:
    """8 iterations at 20 s, 2 dropped; 32 prompts of 64 and responses of 64."""
    trial = trial_of(make_cell("ppo", device="cuda", iterations=8), seconds=20.0)
    assert number(trial, "response_tokens_per_second") == pytest.approx(6 * 32 * 64 / 120)
    assert number(trial, "prompt_tokens_per_second") == pytest.approx(6 * 32 * 64 / 120)
    assert number(trial, "learned_tokens_per_second") == pytest.approx(6 * 32 * 64 / 120)
    assert number(trial, "make_experience_seconds") == pytest.approx((0.04 + 0.38 + 0.05 + 0.05 + 0.05 + 0.04 + 0.01) * 20)
    assert number(trial, "learn_seconds") == pytest.approx((0.22 + 0.12) * 20)
    assert number(trial, "other_seconds") == pytest.approx(0.04 * 20)
    assert number(trial, "final_reward") == pytest.approx(-0.12 + 0.07 * 7)
    assert number(trial, "final_kl") == pytest.approx(0.028)


def test_a_peak_between_two_readings_of_the_driver_is_at_least_what_torch_held() -> None:
    trial = trial_of(make_cell("sft", **GPU))
    observed = trial.record.observed | {"device_memory_peak_bytes": {"a": GIB}}
    seen = Trial(Row(dataclasses.replace(trial.record, observed=observed), trial.cell, "a.json"))
    assert number(seen, "device_memory_gib") == number(seen, "peak_reserved_gib") > 1


def test_energy_is_summed_over_devices() -> None:
    devices = {"a": {"energy_joules": 2.0}, "b": {"energy_joules": 3.5}}
    trial = trial_of(make_cell("sft", "ddp", processes_per_node=2, **GPU))

    def observed(**more: Any) -> Trial:
        return Trial(Row(dataclasses.replace(trial.record, observed={"devices": devices} | more), trial.cell, "a.json"))

    assert number(observed(), "energy_joules") == 5.5
    assert observed(nodes_without_telemetry=[1]).values["energy_joules"].reason == "no telemetry of node 1"
    one = observed(devices={"a": {"energy_joules": 2.0}})
    assert one.values["energy_joules"].reason == "devices that were read: 1; the job has 2"


def test_a_metric_without_data_has_a_reason_and_never_zero() -> None:
    trial = trial_of(make_cell("sft"), outcome="error", reason="died", ranks=range(0))
    assert {value.number for value in trial.values.values()} == {None}
    assert all(value.reason for value in trial.values.values())
    assert trial.values["loss_tokens_per_second"] == Value(None, "ranks without a part: 0")


def test_a_cpu_says_why_it_has_no_allocator_peak() -> None:
    assert trial_of(make_cell("sft")).values["peak_allocated_gib"].reason == "no torch allocator statistics on a CPU"


def test_a_job_that_lacks_a_rank_has_no_throughput() -> None:
    trial = trial_of(make_cell("sft", "ddp", nodes=3, global_batch=12), ranks=range(0, 3, 2))
    assert trial.values["loss_tokens_per_second"] == Value(None, "ranks without a part: 1")


def test_one_rank_has_no_straggler() -> None:
    assert trial_of(make_cell("sft")).values["straggler_ratio"].number is None


def test_memory_above_the_card_is_withheld() -> None:
    trial = trial_of(make_cell("sft", **GPU))
    memory = Memory(peak_allocated_bytes=90 * GIB)
    impossible = changed(trial, memory=memory, facts={"device_total_bytes": 80 * GIB})
    assert impossible.values["peak_allocated_gib"].reason == "withheld: memory above the card: 90.0 GiB, the card has 80.0 GiB"


def test_phases_above_the_lap_are_withheld() -> None:
    trial = trial_of(make_cell("ppo"))
    laps = [dataclasses.replace(lap, phases={"reward": lap.seconds * 1.1}) for lap in trial.record.parts[0].laps]
    assert "withheld" in str(changed(trial, laps=laps).values["learn_seconds"].reason)


def test_more_useful_tokens_than_tokens_are_withheld() -> None:
    trial = trial_of(make_cell("sft"))
    laps = [dataclasses.replace(lap, counts={"loss_tokens": 11, "padded_tokens": 10}) for lap in trial.record.parts[0].laps]
    assert str(changed(trial, laps=laps).values["loss_tokens_per_second"].reason).startswith("withheld")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"emulated": True}, "emulated"),
        ({"simulated_nodes": True}, "simulated"),
        ({"launcher": "fork"}, "fork"),
    ],
)
def test_clocks_of_emulated_simulated_and_forked_runs_do_not_count(changes: dict[str, Any], words: str) -> None:
    cell = make_cell("sft", **GPU)
    record = dataclasses.replace(make_record(cell), **changes)
    assert words in str(Trial(Row(record, cell, "a.json")).clock_problem)
    assert Trial(Row(make_record(cell), cell, "a.json")).clock_problem is None


def test_every_metric_explains_itself() -> None:
    for item in METRICS.values():
        assert len(item.explanation) > 20, item.name
        assert item.unit
        assert item.source
        assert item.direction in ("higher", "lower", "none")


def test_every_time_and_memory_is_clocked() -> None:
    unclocked = {item.unit for item in METRICS.values() if not item.clocked}
    assert not [unit for unit in unclocked if unit.endswith("/s") or unit in ("s", "J", "x")]
    assert {item.name for item in METRICS.values() if item.unit == "GiB" and not item.clocked} <= {"theory_state_gib", "theory_peak_gib"}


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_every_stage_has_its_primary_metric(stage: str) -> None:
    assert stage in METRICS[primary_metric(stage)].stages
