"""What strategies call unsupported and a CPU cannot try: tried once for real on a GPU, it must fail as stated."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.record import load_part
from bench.strategies.base import all_strategies
from tests.gpu.lone_rank import SIZES, run_cell
from tests.trials import tiny_cell, tiny_trial

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("group")]


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_grad_op"])
def test_hybrid_adam_takes_no_dtensors(strategy: str, tmp_path: Path) -> None:
    """Its kernel reads addresses, and a DTensor, which only wraps its shard, has none: it reads at 0."""
    cell = tiny_cell("sft", **SIZES["sft"], strategy=strategy, optimizer="hybrid", device="cuda", launcher="torchrun", held_out_rows=12)
    assert "takes no DTensors" in str(all_strategies()[strategy].unsupported(cell))
    with pytest.raises(AssertionError):
        run_cell(tmp_path, cell)
    part = load_part(tiny_trial(cell, tmp_path / cell.cell_id).part_path(0))
    assert part.outcome == "error"
    assert "illegal memory access" in str(part.reason)
    run_cell(tmp_path, tiny_cell("sft", **SIZES["sft"], strategy="naive", optimizer="hybrid", device="cuda", launcher="torchrun"))
