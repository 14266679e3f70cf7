"""Cells that need HybridAdam's kernels are planned where an image holds them, and skipped with the reason where it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.cell import Cell, Overlay, Settings
from bench.strategies.base import all_strategies
from bench.strategies.kernels import _without_compiler


def cell(strategy: str, **settings: object) -> Cell:
    return Cell(
        stage="sft",
        model="bloom-560m",
        strategy=strategy,
        lora_rank=0,
        nodes=1,
        processes_per_node=1,
        settings=Settings(**{"data": "synthetic-instruct", **settings}),
    )


@pytest.mark.parametrize(
    ("strategy", "optimizer", "device", "skipped"),
    [
        ("gemini", "adamw", "cuda", True),  # it forces HybridAdam
        ("zero2_cpu", "adamw", "cuda", True),
        ("ddp", "hybrid", "cuda", True),
        ("ddp", "adamw", "cuda", False),
        ("zero2", "fused", "cuda", False),  # torch's own
        ("gemini", "adamw", "cpu", False),  # a stand-in
    ],
)
def test_what_needs_them_is_skipped_in_an_image_without(strategy: str, optimizer: str, device: str, skipped: bool) -> None:
    it = cell(strategy, optimizer=optimizer, device=device, container="upstream", precision="bf16-master")
    reason = all_strategies()[strategy].unsupported(it)
    assert ("the image upstream holds none and no compiler" in (reason or "")) is skipped
    for container in ("current", "none"):
        assert all_strategies()[strategy].unsupported(replace(it, settings=replace(it.settings, container=container))) is None


def test_an_overlay_without_built_kernels_hides_the_images(tmp_path: Path) -> None:
    (tmp_path / "colossalai" / "_C").mkdir(parents=True)
    settings = {"device": "cuda", "precision": "bf16-master", "container": "current", "overlay": Overlay(colossalai=str(tmp_path))}
    assert "the overlay hides those of the image current" in (all_strategies()["gemini"].unsupported(cell("gemini", **settings)) or "")
    assert all_strategies()["ddp"].unsupported(cell("ddp", **settings)) is None
    (tmp_path / "colossalai" / "_C" / "cpu_adam_x86.so").touch()
    assert all_strategies()["gemini"].unsupported(cell("gemini", **settings)) is None


class Extension:
    """As ColossalAI's are: it wants nvcc before it looks for what is prebuilt."""

    prebuilt_import_path = "colossalai._C.not_there"

    def assert_compatible(self) -> None:
        raise AssertionError("CUDA_HOME is not found")


class Prebuilt(Extension):
    prebuilt_import_path = "json.decoder"


def test_prebuilt_kernels_load_without_a_compiler_and_others_still_ask_for_one() -> None:
    _without_compiler(Prebuilt)().assert_compatible()
    assert isinstance(_without_compiler(Prebuilt)(), Prebuilt)
    with pytest.raises(AssertionError, match="CUDA_HOME"):
        _without_compiler(Extension)().assert_compatible()
