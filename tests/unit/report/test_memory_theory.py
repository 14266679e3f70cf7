from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench.cell import Cell
from bench.measure.shape import shape_of
from bench.needs import needs
from bench.peak_memory import moments, peak_moment
from bench.report.bands import read_references
from bench.report.inventory import Row
from bench.report.metrics import Trial
from tests.unit.report.trial_factory import GIB, make_cell, make_record

REFERENCES = Path(__file__).parents[3] / "results" / "references"
WITHIN = {"sft": 0.15, "rm": 0.15, "ppo": 0.25}
"""How far the theory may be from the measured peak of a stage."""
GATHERED_TWICE = "sft-llama-1b-deepspeed_zero3-lora16-1x2-4259c44a"
"""The one record, made when ZeRO-3 let weights go after their forward pass, in which that is the largest moment (docs/flops.md)."""
GPU: dict[str, Any] = {"device": "cuda", "model": "bloom-560m", "precision": "bf16-master"}
PARAMETERS = 559_214_592
ROOTS = 2 * 4 * 250_880 * 1024
"""Two fp32 tensors of the size of BLOOM-560m's embedding, of which torch's plain AdamW takes roots."""
ROOM_FOR_FROZEN = "f952ad0f22b775e5e28093925c8c939a57c7a46c314045140d59e1650bf3f873"
"""package_sha256 of code in which DeepSpeed's buckets had room for frozen weights too: up to 1 GiB that the theory does not have."""


def measured_peaks() -> list[Row]:
    """Every stored trial whose allocator was read."""
    rows = read_references(REFERENCES)
    there = (row for row in rows if row.record.outcome == "ok" and Trial(row).values["peak_allocated_gib"].number)
    return [row for row in there if not has_room_for_frozen(row) and row.record.cell_id != GATHERED_TWICE]


def has_room_for_frozen(row: Row) -> bool:
    of_that_code = row.record.provenance["source"]["package_sha256"] == ROOM_FOR_FROZEN
    return of_that_code and row.cell.lora_rank > 0 and row.cell.strategy.startswith("deepspeed")


@pytest.mark.parametrize("row", measured_peaks(), ids=lambda row: f"{row.record.cell_id}-{row.record.trial}")
def test_theory_is_near_every_stored_peak(row: Row) -> None:
    values = Trial(row).values
    measured, theory = values["peak_allocated_gib"].number, values["theory_peak_gib"].number
    assert measured is not None
    assert theory is not None
    assert theory == pytest.approx(measured, rel=WITHIN[row.cell.stage])
    assert values["unexplained_memory_gib"].number == pytest.approx(measured - theory)


def bytes_of(cell: Cell, **rest: Any) -> tuple[str, float]:
    shape = shape_of(cell.model)
    assert shape is not None
    moment = peak_moment(cell, shape, **rest)
    assert moment is not None
    return moment.name, moment.bytes


def test_a_full_step_of_adamw_by_hand() -> None:
    """16 bytes of states a parameter, 4 of the gradients' fp32 copies, two square roots of the embedding; short sequences keep little."""
    cell = make_cell("sft", **GPU)
    assert bytes_of(cell, length=8, heads=8) == ("step of the policy", 20 * PARAMETERS + ROOTS)


@pytest.mark.parametrize(("optimizer", "roots"), [("adamw", ROOTS), ("foreach", 4 * PARAMETERS), ("fused", 0), ("hybrid", 0)])
def test_the_optimizer_decides_what_its_step_makes(optimizer: str, roots: int) -> None:
    assert bytes_of(make_cell("sft", optimizer=optimizer, **GPU), length=8, heads=8)[1] == 20 * PARAMETERS + roots


def test_deepspeed_updates_all_that_a_rank_holds_at_once_and_zero2_gives_back_the_gradients_that_it_has_copied() -> None:
    shared = {**GPU, "processes_per_node": 2, "global_batch": 8}
    _, two = bytes_of(make_cell("sft", "deepspeed_zero2", **shared), length=8, heads=8)
    _, three = bytes_of(make_cell("sft", "deepspeed_zero3", **shared), length=8, heads=8)
    assert two == (2 + (12 + 4 + 8) / 2) * PARAMETERS
    assert three == (2 + 2 + 12 + 4 + 8) / 2 * PARAMETERS + 2 * 500_000_000


def test_the_buckets_of_ddp_are_there_all_the_time_and_gradients_that_accumulate_lie_beside_them() -> None:
    shape = shape_of("bloom-560m")
    assert shape is not None
    for batch, times in ((8, 1), (16, 2)):
        cells = (make_cell("sft", name, **{**GPU, "micro_batch": 8, "global_batch": batch}) for name in ("ddp", "naive"))
        (ddp_loss, ddp_step), (loss, step) = (list(moments(cell, shape)) for cell in cells)
        assert ddp_loss.state_bytes - (loss.state_bytes - 2 * PARAMETERS * (times - 1)) == 2 * PARAMETERS * times
        assert ddp_step == step
    ppo = {name: {it.name: it.state_bytes for it in moments(make_cell("ppo", name, **GPU), shape)} for name in ("ddp", "naive")}
    assert ppo["ddp"]["step of the policy"] - ppo["naive"]["step of the policy"] == 2 * (PARAMETERS + 1024)


def test_the_loss_by_hand() -> None:
    """BLOOM-560m, 4 x 256 positions, LoRA 8, one micro-step: what 24 layers keep, logits and their gradient, three chunks of 2^26."""
    cell = make_cell("sft", lora_rank=8, sequence_length=256, **{**GPU, "micro_batch": 4, "global_batch": 4})
    layer = 4 * (256 * 2 * (16 * 1024 + 4 * 8) + 6 * 16 * 256**2)
    adapters = 3_145_728
    states = 2 * PARAMETERS + 2 * adapters + 12 * adapters
    chunk = 2**26 // 250_880 * 250_880
    loss = 2 * 2 * 1000 * 250_880 + 3 * 4 * chunk
    assert bytes_of(cell, heads=1000) == ("loss of the policy", states + 24 * layer + loss)


@pytest.mark.parametrize(("checkpointing", "layers"), [(False, 24), (True, 1)])
def test_autocast_keeps_the_matrices_in_bf16_beside_their_fp32(monkeypatch: pytest.MonkeyPatch, checkpointing: bool, layers: int) -> None:
    cell = make_cell("sft", **{**GPU, "precision": "bf16-autocast", "lora_rank": 8, "activation_checkpointing": checkpointing})
    name, with_them = bytes_of(cell)
    monkeypatch.setattr("bench.peak_memory._Plan.cast_bytes", lambda *_: 0.0)
    assert bytes_of(cell) == (name, with_them - layers * 12 * 1024**2 * 2)


def test_gradients_are_there_during_the_loss_only_if_they_accumulate() -> None:
    once, often = (
        make_cell("sft", sequence_length=512, optimizer="fused", **{**GPU, "micro_batch": 8, "global_batch": batch}) for batch in (8, 16)
    )
    assert bytes_of(often)[0] == bytes_of(once)[0] == "loss of the policy"
    assert bytes_of(often)[1] - bytes_of(once)[1] == 2 * PARAMETERS


def test_activation_checkpointing_keeps_one_layer_and_the_inputs() -> None:
    plain, saved = (
        make_cell("rm", sequence_length=512, activation_checkpointing=on, lora_rank=8, **{**GPU, "micro_batch": 16, "global_batch": 16})
        for on in (False, True)
    )
    assert bytes_of(saved)[1] < bytes_of(plain)[1] / 4


def test_states_in_host_memory_take_nothing_of_the_device() -> None:
    on_device, off = (make_cell("sft", name, **GPU) for name in ("zero2", "zero2_cpu"))
    assert bytes_of(on_device, length=8, heads=8)[1] - bytes_of(off, length=8, heads=8)[1] >= 12 * PARAMETERS


def test_of_weights_in_host_memory_the_frozen_base_stays_on_the_device_and_the_head_is_fetched() -> None:
    """As seen on an H100: gemini moves only what trains, and the tied head is there while logits are computed."""
    shape = shape_of("bloom-560m")
    assert shape is not None
    loss = {
        (name, rank): next(iter(moments(make_cell("sft", name, lora_rank=rank, **GPU), shape)))
        for name in ("gemini_cpu", "zero2_cpu") for rank in (0, 8)
    }  # fmt: skip
    assert loss["gemini_cpu", 0].state_bytes == 0
    assert loss["gemini_cpu", 8].state_bytes == 2 * PARAMETERS
    assert loss["gemini_cpu", 0].work_bytes - loss["zero2_cpu", 0].work_bytes == 2 * VOCABULARY_ROWS
    assert loss["gemini_cpu", 8].work_bytes == loss["zero2_cpu", 8].work_bytes


def test_shards_are_shared_by_the_ranks() -> None:
    one, two = (make_cell("sft", "zero2", nodes=nodes, **{**GPU, "global_batch": 8 * nodes}) for nodes in (1, 2))
    assert bytes_of(two, length=8, heads=8)[1] == pytest.approx((2 + (2 + 12 + 4) / 2) * PARAMETERS + ROOTS / 2, rel=0.01)
    assert bytes_of(one, length=8, heads=8)[1] == pytest.approx(20 * PARAMETERS + ROOTS)


def test_ppo_holds_four_models_and_the_largest_of_its_moments() -> None:
    """Policy and critic train, reference and reward model only lie there: 14 bytes without gradients and 2, of each parameter."""
    cell = make_cell("ppo", lora_rank=0, **{**GPU, "micro_batch": 8, "global_batch": 32})
    name, peak = bytes_of(cell)
    assert name == "step of the critic"  # of as many parameters as the policy, and its scalar head
    assert peak > (2 * 14 + 2 * 2) * PARAMETERS
    many = make_cell("ppo", lora_rank=8, prompts_per_iteration=4096, **{**GPU, "micro_batch": 1, "global_batch": 32})
    assert bytes_of(many)[0] == "rollout"


LAYERS, VOCABULARY_ROWS = 24 * (12 * 1024**2 + 13 * 1024), 250_880 * 1024
WHOLE_UNDER_SLICES = 24 * 6 * 1024 + 4 * 1024
"""Of BLOOM-560m: norms, and biases of the matrices that write a layer's output."""


def test_slices_by_hand() -> None:
    """BLOOM-560m over two ranks, 4 x 256 positions: inputs of norms (4 h) whole, the rest (12 h, squares) halved, whole logits."""
    cell = make_cell(
        "sft", "hybrid", processes_per_node=2, tensor_parallel=2, sequence_length=256, **{**GPU, "micro_batch": 4, "global_batch": 4}
    )
    held = (PARAMETERS - WHOLE_UNDER_SLICES) // 2 + WHOLE_UNDER_SLICES
    layer = 4 * (256 * 2 * (4 + 12 / 2) * 1024 + 6 * 16 / 2 * 256**2)
    loss = 2 * 2 * 1000 * 250_880 + 3 * 4 * (2**26 // 250_880 * 250_880)
    shape = shape_of("bloom-560m")
    assert shape is not None
    found = {moment.name: moment.bytes for moment in moments(cell, shape, heads=1000)}
    assert found == {"loss of the policy": 16 * held + 24 * layer + loss, "step of the policy": 20 * held + ROOTS / 2}


def test_stages_of_a_pipeline_by_hand() -> None:
    """Two stages of 12 layers: the first keeps two micro-batches and no logits, the last one micro-batch and the head's work."""
    cell = make_cell(
        "sft", "hybrid", processes_per_node=2, pipeline_parallel=2, sequence_length=256, **{**GPU, "micro_batch": 4, "global_batch": 16}
    )
    shape = shape_of("bloom-560m")
    assert shape is not None
    held = LAYERS // 2 + VOCABULARY_ROWS + 2 * 1024
    layer = 4 * (256 * 2 * 16 * 1024 + 6 * 16 * 256**2)
    loss = 2 * 2 * 1000 * 250_880 + 3 * 4 * (2**26 // 250_880 * 250_880)
    found = [(moment.name, moment.bytes) for moment in moments(cell, shape, heads=1000)]
    assert found == [
        ("loss of the policy", 18 * held + 2 * 12 * layer + layer), ("step of the policy", 20 * held + ROOTS),
        ("loss of the policy", 18 * held + 12 * layer + loss), ("step of the policy", 20 * held + ROOTS),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_base_in_few_bits_saves_its_bytes_and_unpacks_one_matrix_at_a_time(kind: str) -> None:
    shared = {**GPU, "micro_batch": 4, "global_batch": 4, "lora_rank": 8, "sequence_length": 256}
    stored, small = (make_cell("sft", base_weights=weights, **shared) for weights in ("stored", kind))
    saved = needs(stored).weight_bytes - needs(small).weight_bytes  # type: ignore[union-attr]
    assert bytes_of(stored)[0] == bytes_of(small)[0] == "loss of the policy"
    assert bytes_of(stored)[1] - bytes_of(small)[1] == saved - 2 * 4 * 1024**2


def test_what_stays_gathered_is_there_beside_the_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLOOM-560m in bf16 over two ranks; PPO scores with all four models, of which two train. fsdp gathers the embedding as it is."""
    shape = shape_of("bloom-560m")
    assert shape is not None
    shared = {**GPU, "micro_batch": 8, "global_batch": 16, "processes_per_node": 2}

    def work(name: str) -> dict[str, float]:
        return {moment.name: moment.work_bytes for moment in moments(make_cell("ppo", name, **shared), shape)}

    policy, critic, root = 2 * PARAMETERS, 2 * (PARAMETERS + 1024), 2 * VOCABULARY_ROWS
    fsdp, grad_op = work("fsdp"), work("fsdp_grad_op")
    assert {name: grad_op[name] - fsdp[name] for name in fsdp} == {
        "loss of the policy": policy - root, "step of the policy": 0, "loss of the critic": critic - root, "step of the critic": 0,
        "scoring": critic - root, "rollout": policy - root,
    }  # fmt: skip
    whole = work("deepspeed_zero3")
    monkeypatch.setattr("bench.strategies.deepspeed_zero3.LIVE", 0)
    none = work("deepspeed_zero3")
    assert {name: whole[name] - none[name] for name in whole} == {
        "loss of the policy": policy + critic, "step of the policy": critic, "loss of the critic": critic + policy,
        "step of the critic": policy, "scoring": policy + critic, "rollout": policy + critic,
    }  # fmt: skip


def test_as_many_parameters_of_a_large_model_are_whole_as_deepspeed_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shape_of("llama-7b")
    assert shape is not None
    cell = make_cell("sft", "deepspeed_zero3", **{**GPU, "model": "llama-7b", "processes_per_node": 2, "global_batch": 8})
    loss = next(moments(cell, shape)).work_bytes
    monkeypatch.setattr("bench.strategies.deepspeed_zero3.LIVE", 0)
    assert loss - next(moments(cell, shape)).work_bytes == pytest.approx(2 * 10**9)


def test_what_is_not_known_has_a_reason() -> None:
    cell = make_cell("sft", **{**GPU, "model": "/models/mine"})
    trial = Trial(Row(make_record(cell), cell, "a"))
    for name in ("theory_state_gib", "theory_peak_gib", "unexplained_memory_gib"):
        assert trial.values[name].reason == "the sizes of /models/mine are not known: the record does not tell them, and it is no preset"


def theory_of(cell: Cell, **facts: Any) -> float:
    record = make_record(cell)
    told = dataclasses.replace(record.parts[0], facts={**record.parts[0].facts, **facts})
    value = Trial(Row(dataclasses.replace(record, parts=[told]), cell, "a")).values["theory_peak_gib"].number
    assert value is not None
    return value


@pytest.mark.parametrize(("limit", "facts", "taken"), [(200, {}, 200), (200, {"longest_sequence": 128}, 128), (1000, {}, 120)])
def test_the_longest_sequence_is_told_or_the_limit_or_at_least_the_mean(limit: int, facts: dict[str, Any], taken: int) -> None:
    """The factory's micro-batches are padded to 120 tokens; a limit far above that says nothing."""
    cell = make_cell("sft", lora_rank=8, sequence_length=limit, **{**GPU, "micro_batch": 8, "global_batch": 8})
    assert theory_of(cell, **facts) == pytest.approx(bytes_of(cell, length=taken, heads=8 * 60)[1] / GIB)


def test_the_ptx_loss_comes_on_top_of_ppos_own_layers_and_logits() -> None:
    """BLOOM-560m, LoRA 16, 8 x 128 positions of PPO, of which half are responses, and 8 x 200 of ptx."""
    shared = {**GPU, "micro_batch": 8, "global_batch": 8, "lora_rank": 16, "sequence_length": 256}
    mixed, alone = make_cell("ppo", ptx_coef=0.1, ptx="synthetic-instruct", **shared), make_cell("ppo", **shared)
    layers = 24 * 8 * (128 * 2 * (16 * 1024 + 4 * 16) + 6 * 16 * 128**2)
    logits = 2 * 8 * 64 * 250_880
    sft = bytes_of(make_cell("sft", **shared), length=200, heads=500)[1] - 2 * PARAMETERS - 14 * 6_291_456
    found, without = bytes_of(mixed, length=200, heads=500), bytes_of(alone)
    assert found[0] == without[0] == "loss of the policy"
    four_models = found[1] - sft - layers - logits
    assert four_models == pytest.approx(without[1] - layers - 2 * logits - 3 * 4 * (267 * 250_880))


def test_chunks_of_accumulated_gradients_stay() -> None:
    once, often = (make_cell("ppo", "gemini", **{**GPU, "micro_batch": 8, "global_batch": batch}) for batch in (8, 16))
    shape = shape_of("bloom-560m")
    assert shape is not None
    state = {cell.settings.global_batch: {it.name: it.state_bytes for it in moments(cell, shape)} for cell in (once, often)}
    assert state[16]["scoring"] - state[8]["scoring"] == pytest.approx(2 * 2 * PARAMETERS, rel=1e-5)
