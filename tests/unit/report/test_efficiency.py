from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bench.cell import Cell
from bench.errors import UserError
from bench.measure.flops import step_flops, total
from bench.measure.shape import shape_of
from bench.record import SIDE_BY_SIDE
from bench.report.ceilings import ceilings_beside, read_ceilings
from bench.report.inventory import Row
from bench.report.metrics import Trial
from bench.report.registry import Given
from tests.unit.report.trial_factory import make_cell, make_record

GPU: dict[str, Any] = {"device": "cuda", "model": "bloom-560m", "precision": "bf16-master"}
SFT = make_cell("sft", steps=50, **GPU)
PPO = make_cell("ppo", iterations=8, **GPU)
H100 = "NVIDIA H100 80GB HBM3"
PEAK, BANDWIDTH = 989.4e12, 3.35e12
LAYERS, HEAD, CACHE = 24 * 12 * 1024**2, 1024 * 250_880, 2 * 24 * 1024 * 2
"""BLOOM-560m: parameters of 24 layers x (3 + 1 + 4 + 4) x 1024^2, those of the head; bytes of keys and values of one position."""


def trial_of(cell: Cell, *, given: Given | None = None, facts: dict[str, Any] | None = None, machine: Any = None, **rest: Any) -> Trial:
    record = make_record(cell, **rest)
    parts = [dataclasses.replace(part, facts={**part.facts, **(facts or {})}) for part in record.parts]
    provenance = {**record.provenance, **({"machines": [machine]} if machine else {})}
    return Trial(Row(dataclasses.replace(record, parts=parts, provenance=provenance), cell, "a.json"), given or Given())


def number(trial: Trial, name: str) -> float:
    value = trial.values[name]
    assert value.number is not None, value.reason
    return value.number


def test_the_last_stage_of_a_pipeline_computes_the_whole_head() -> None:
    """60 of 120 padded positions carry loss."""
    shape, counts = shape_of("bloom-560m"), {"sequences": 8, "tokens": 8 * 90, "padded_tokens": 8 * 120, "loss_tokens": 8 * 60}
    assert shape is not None
    cells = (make_cell("sft", "hybrid", processes_per_node=2, pipeline_parallel=stages, steps=50, **GPU) for stages in (1, 2))
    windowed, whole = (total(step_flops(cell, shape, counts).values()) for cell in cells)
    assert windowed.model == whole.model
    assert whole.hardware - windowed.hardware == pytest.approx(8 * 6 * HEAD * (120 - 60))


def test_mfu_by_hand() -> None:
    """8 rows a step, each of 90 tokens, 60 with loss, padded to 120; 0.5 s a step. BLOOM attends to the whole square."""
    real, padded = (8 * (6 * LAYERS * length + 6 * HEAD * 60 + 3 * 4 * 24 * 1024 * length**2) for length in (90, 120))
    trial = trial_of(SFT, seconds=0.5)
    assert number(trial, "model_tflop_per_step") == pytest.approx(real / 1e12)
    assert number(trial, "model_tflops_per_second_per_device") == pytest.approx(real / 0.5 / 1e12)
    assert number(trial, "mfu") == pytest.approx(real / 0.5 / PEAK)
    assert number(trial, "hfu") == pytest.approx(padded / 0.5 / PEAK)
    assert trial.impossible == ()


def test_every_device_of_the_job_is_in_the_divisor() -> None:
    """Two ranks share the same work, and the slower takes 1 % longer."""
    one, two = trial_of(SFT, seconds=0.5), trial_of(make_cell("sft", "ddp", nodes=2, steps=50, **GPU), seconds=0.5)
    assert number(two, "mfu") == pytest.approx(number(one, "mfu") / 2 / 1.01)


def test_fp32_is_held_to_the_peak_of_fp32() -> None:
    single = trial_of(make_cell("sft", steps=50, device="cuda", model="bloom-560m", precision="fp32"), seconds=0.5)
    assert number(single, "mfu") == pytest.approx(number(trial_of(SFT, seconds=0.5), "mfu") * 989.4 / 67.0)


def test_lora_needs_no_gradients_of_frozen_weights() -> None:
    full, adapters = trial_of(SFT), trial_of(make_cell("sft", steps=50, lora_rank=8, **GPU))
    assert 0.6 < number(adapters, "model_tflop_per_step") / number(full, "model_tflop_per_step") < 0.72


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"facts": {"device_name": "cpu"}, "emulated": True}, "ColossalAI was emulated on a CPU"),
        ({"launcher": "fork"}, "ranks were started by fork, which makes no timing claims"),
        ({"flags": [SIDE_BY_SIDE]}, "trials ran side by side on the same devices"),
        ({"facts": {"device_name": "NVIDIA X1"}}, "NVIDIA X1: no row in bench/measure/devices.py; one with its source would be right"),
        ({"facts": {"device_name": None}}, "the record names no device"),
        ({"facts": {"device_name": "Tesla T4"}}, "Tesla T4 has no matrix units for bf16; it has fp32, fp16"),
    ],
)
def test_no_peak_no_share_and_a_reason(changes: dict[str, Any], reason: str) -> None:
    trial = trial_of(SFT, **changes)
    for name in ("mfu", "hfu"):
        assert trial.values[name].number is None
        assert trial.values[name].reason == reason


def test_a_cpu_has_no_mfu_but_its_flops_are_counted() -> None:
    trial = trial_of(make_cell("sft"))
    assert trial.values["mfu"].reason == "a CPU has no dense peak that a data sheet states"
    assert number(trial, "model_tflop_per_step") > 0


def test_ranks_on_different_devices_have_no_common_peak() -> None:
    record = make_record(make_cell("sft", "ddp", nodes=2, steps=50, **GPU))
    other = dataclasses.replace(record.parts[1], facts={**record.parts[1].facts, "device_name": "NVIDIA H200"})
    trial = Trial(Row(dataclasses.replace(record, parts=[record.parts[0], other]), record.parsed_cell, "a.json"))
    assert trial.values["mfu"].reason == f"ranks ran on different devices: {H100}, NVIDIA H200"


def test_a_model_of_unknown_sizes_says_so() -> None:
    cell = make_cell("sft", steps=50, **{**GPU, "model": "/models/mine"})
    reason = "the sizes of /models/mine are not known: the record does not tell them, and it is no preset"
    assert trial_of(cell).values["mfu"].reason == reason


def test_a_record_tells_the_sizes_of_its_model() -> None:
    cell = make_cell("sft", steps=50, **{**GPU, "model": "/models/mine"})
    sizes = {"model_type": "bloom", "hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250_880}
    told = trial_of(cell, seconds=0.5, facts={"model_config": sizes})
    for name in ("mfu", "theory_state_gib", "theory_peak_gib"):
        assert number(told, name) == pytest.approx(number(trial_of(SFT, seconds=0.5), name))


def test_laps_that_do_not_count_what_is_needed_say_so() -> None:
    record = make_record(SFT)
    laps = [dataclasses.replace(lap, counts={"tokens": 90, "padded_tokens": 120}) for lap in record.parts[0].laps]
    parts = [dataclasses.replace(record.parts[0], laps=laps)]
    assert Trial(Row(dataclasses.replace(record, parts=parts), SFT, "a")).values["mfu"].reason == "the laps do not count sequences"


# -- attainable --------------------------------------------------------------------------------------------------


def test_attainable_is_what_the_node_measured() -> None:
    machine = {"devices": [], "ceilings": {"device": H100, "matrix_flops_per_second": {"bf16": 700e12, "fp32": 50e12}}}
    trial = trial_of(SFT, seconds=0.5, machine=machine)
    assert number(trial, "vs_attainable") == pytest.approx(number(trial, "mfu") * PEAK / 700e12)


def test_a_file_of_ceilings_stands_in_and_the_node_itself_comes_first() -> None:
    given = Given(ceilings={H100: {"bf16": 600e12}})
    machine = {"ceilings": {"device": H100, "matrix_flops_per_second": {"bf16": 700e12}}}
    from_file, from_node = trial_of(SFT, seconds=0.5, given=given), trial_of(SFT, seconds=0.5, given=given, machine=machine)
    assert number(from_file, "vs_attainable") == pytest.approx(number(from_file, "mfu") * PEAK / 600e12)
    assert number(from_node, "vs_attainable") == pytest.approx(number(from_file, "mfu") * PEAK / 700e12)


def test_nothing_attained_was_measured() -> None:
    assert str(trial_of(SFT).values["vs_attainable"].reason).startswith(f"no matrix-product rate of {H100} in bf16 was measured")


def test_a_cpu_is_held_to_nothing_that_other_threads_attained() -> None:
    machine = {"ceilings": {"device": "cpu", "matrix_flops_per_second": {"fp32": 1.0}}}
    trial = trial_of(make_cell("sft"), machine=machine)
    assert trial.values["vs_attainable"].reason == "what a CPU attains depends on the threads of each rank"
    assert trial.impossible == ()


def test_files_of_ceilings(tmp_path: Path) -> None:
    own = {"device": H100, "matrix_flops_per_second": {"bf16": 7e14, "tf32": None}}
    other = [{"ceilings": {"device": "NVIDIA L4", "matrix_flops_per_second": {"bf16": 9e13}}}, {**own, "device": H100}]
    (tmp_path / "suite").mkdir()
    (tmp_path / "references" / "l4").mkdir(parents=True)
    (tmp_path / "suite" / "ceilings.json").write_text(json.dumps(own))
    (tmp_path / "references" / "l4" / "ceilings.json").write_text(json.dumps(other))
    files = ceilings_beside(tmp_path / "suite")
    assert [file.parent.name for file in files] == ["suite", "l4"]
    assert read_ceilings(files) == {H100: {"bf16": 7e14}, "NVIDIA L4": {"bf16": 9e13}}


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("{", "no JSON"),
        ("{}", "no device with its matrix_flops_per_second"),
        ("[1]", "no device"),
        ("[" * 100_000, "no JSON; seen: nested too deeply"),
    ],
)
def test_a_file_that_has_no_ceilings_is_the_users_mistake(tmp_path: Path, text: str, seen: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=f"{seen}.*doctor --bench --format json. prints would be right"):
        read_ceilings([tmp_path / "x.json"])


@pytest.mark.parametrize("rate", ['"x"', "[1]", "1e999", "NaN", "-1", "true", "{}"])
def test_a_ceiling_that_is_no_rate_is_the_users_mistake(tmp_path: Path, rate: str) -> None:
    (tmp_path / "x.json").write_text(f'{{"device": "x", "matrix_flops_per_second": {{"bf16": {rate}}}}}')
    with pytest.raises(UserError, match=r"x\.json: no ceiling; seen: bf16 .*; FLOP/s of at most 1e\+18, or null, would be right"):
        read_ceilings([tmp_path / "x.json"])


# -- PPO ---------------------------------------------------------------------------------------------------------


def test_each_phase_of_ppo_has_its_own_numerator() -> None:
    """32 prompts of 64 tokens and responses of 64 an iteration of 20 s; shares of the phases as the factory has them."""
    trial = trial_of(PPO, seconds=20.0)
    assert number(trial, "prompts_per_second") == pytest.approx(32 / 20)
    assert number(trial, "prefill_tokens_per_second") == pytest.approx(32 * 64 / (0.04 * 20))
    assert number(trial, "decode_tokens_per_second") == pytest.approx(32 * 64 / (0.38 * 20))
    assert number(trial, "learning_tokens_per_second") == pytest.approx(32 * 64 / (0.34 * 20))
    assert number(trial, "other_share") == pytest.approx(0.04)


def test_mbu_of_decoding_by_hand() -> None:
    """63 decode steps read all weights in matrix products, and the keys and values before the position, of 32 rows."""
    weights = 2 * (LAYERS + HEAD)
    read = 63 * weights + 32 * CACHE * sum(64 + step for step in range(1, 64))
    assert number(trial_of(PPO, seconds=20.0), "decode_mbu") == pytest.approx(read / (0.38 * 20) / BANDWIDTH)


def test_of_small_weights_nobody_knows_what_decoding_reads() -> None:
    value = trial_of(make_cell("ppo", base_weights="int8", lora_rank=8, iterations=8, **GPU), seconds=20.0).values["decode_mbu"]
    assert value.reason == "what is read of weights in 8 or 4 bits, and written to unpack them, is not counted"


def test_learning_has_an_mfu_of_its_own() -> None:
    trial = trial_of(PPO, seconds=20.0)
    assert number(trial, "mfu") < number(trial, "learning_mfu") < 1


def test_phases_that_took_no_time_give_no_rate() -> None:
    record = make_record(PPO)
    laps = [dataclasses.replace(lap, phases={"reward": 0.01}) for lap in record.parts[0].laps]
    trial = Trial(Row(dataclasses.replace(record, parts=[dataclasses.replace(record.parts[0], laps=laps)]), PPO, "a"))
    assert trial.values["decode_tokens_per_second"].reason == "no time in rollout_decode"
    assert trial.values["decode_mbu"].reason == "no time in rollout_decode"
