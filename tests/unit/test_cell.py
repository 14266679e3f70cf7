"""A cell is a value: what makes two cells the same, and what tells them apart."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from bench.cell import SETTINGS, canonical_json, cell_from_json, cell_to_json, digest, fingerprint, identity

SFT = {
    "stage": "sft", "model": "bloom-tiny", "strategy": "ddp", "lora_rank": 8, "nodes": 2, "processes_per_node": 1,
    "steps": 30, "global_batch": 8, "micro_batch": 2,
}  # fmt: skip
SHA = "0" * 64


def defaults_of(kind: type) -> dict[str, object]:
    return {field.name: list(field.default) if isinstance(field.default, tuple) else field.default for field in dataclasses.fields(kind)}


FLAT_SPLIT = {
    "stage": "sft", "model": "bloom-tiny", "strategy": "hybrid", "processes_per_node": 8, "steps": 1, "global_batch": 16, "micro_batch": 2,
    "tensor_parallel": 2, "pipeline_parallel": 2,
}  # fmt: skip


def test_a_cell_survives_the_round_trip_through_json() -> None:
    cell = cell_from_json(SFT)
    assert cell_from_json(json.loads(json.dumps(cell_to_json(cell)))) == cell


def test_the_flat_form_names_every_axis_and_setting() -> None:
    flat = cell_to_json(cell_from_json(SFT))
    assert flat["strategy"] == "ddp"
    assert flat["clip_norm"] == 1.0
    assert flat["data"] == "synthetic-instruct"


def test_the_id_is_a_readable_slug_and_eight_hex_digits_of_the_identity() -> None:
    cell = cell_from_json(SFT)
    slug, _, end = cell.cell_id.rpartition("-")
    assert slug == "sft-bloom-tiny-ddp-lora8-2x1"
    assert end == digest(identity(cell))[:8]


def test_a_setting_at_its_default_is_not_part_of_the_identity() -> None:
    assert cell_from_json({**SFT, "clip_norm": 1.0}).cell_id == cell_from_json(SFT).cell_id
    assert "clip_norm" not in identity(cell_from_json(SFT))


@pytest.mark.parametrize("change", [{"lora_rank": 4}, {"steps": 31}, {"precision": "fp32"}, {"nodes": 1}, {"clip_norm": None}])
def test_any_changed_field_changes_id_and_fingerprint(change: dict[str, object]) -> None:
    one, other = cell_from_json(SFT), cell_from_json({**SFT, **change})
    assert one.cell_id != other.cell_id
    assert fingerprint(one, {}, {}) != fingerprint(other, {}, {})


def test_the_content_of_data_and_starting_weights_is_part_of_the_fingerprint() -> None:
    cell, other = cell_from_json(SFT), "1" * 64
    data = cell.settings.data
    prints = {fingerprint(cell, {data: SHA}, {}), fingerprint(cell, {data: other}, {}), fingerprint(cell, {data: SHA}, {"policy": SHA})}
    assert len(prints) == 3


def test_the_same_rows_under_another_path_have_the_same_fingerprint() -> None:
    here, there = (cell_from_json({**SFT, "data": f"file:/{folder}/rows.json"}) for folder in ("here", "there"))
    assert fingerprint(here, {here.settings.data: SHA}, {}) == fingerprint(there, {there.settings.data: SHA}, {})


def test_defaults_stay_as_they_are_within_one_schema_major() -> None:
    """A changed default silently changes what old cell ids mean: raise SCHEMA_MAJOR instead of this file. New settings may come in."""
    golden = json.loads((Path(__file__).parents[1] / "golden" / "defaults.json").read_text(encoding="utf-8"))
    now = {stage: defaults_of(kind) for stage, kind in SETTINGS.items()}
    assert {stage: {key: now[stage].get(key, "gone") for key in kept} for stage, kept in golden.items()} == golden
    assert {stage: sorted(defaults) for stage, defaults in now.items()} == {stage: sorted(kept) for stage, kept in golden.items()}


def test_canonical_json_refuses_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"loss": float("nan")})


@pytest.mark.parametrize(
    "bad",
    [
        {"lora_rank": -1},
        {"steps": 0},
        {"precision": "fp8"},
        {"learning_rate": float("inf")},
        {"global_batch": "8"},
        {"unknown": 1},
        {"micro_batch": True},
    ],
)
def test_a_bad_value_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        cell_from_json({**SFT, **bad})


def test_accumulation_fills_the_global_batch() -> None:
    assert cell_from_json(SFT).accumulation == 2
    weak = cell_from_json({**SFT, "scaling": "weak"})
    assert (weak.step_batch, weak.accumulation) == (16, 4)


def test_ranks_that_hold_one_model_between_them_count_once_in_batches() -> None:
    split = cell_from_json({**FLAT_SPLIT, "scaling": "weak"})
    assert (split.world_size, split.model_parallel_size, split.data_parallel_size) == (8, 4, 2)
    assert (split.step_batch, split.accumulation) == (32, 8)


def test_lora_alpha_is_twice_the_rank_unless_given_and_one_under_the_old_semantics() -> None:
    assert cell_from_json(SFT).lora_alpha == 16
    assert cell_from_json({**SFT, "lora_alpha": 32}).lora_alpha == 32
    old = cell_from_json({**SFT, "semantics": "coati-0.2.8"})
    assert old.lora_alpha == 1
    assert old.semantics_switches == ("lora-alpha-1", "loss-mean-per-micro-batch")
