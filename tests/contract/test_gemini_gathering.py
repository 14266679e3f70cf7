"""Gemini's full state is that of the masters also where working chunks in host memory have not taken their last update over."""

from __future__ import annotations

from typing import Any

from tests.contract.rank_harness import run_ranks
from tests.contract.strategy_work import make_cell, make_engine, one_step


def distances(cell: Any) -> tuple[float, float]:
    """Largest distance from the rounded masters after a step: of what ColossalAI gathers, and of the engine's full state."""
    _, engine, _ = make_engine(cell)
    one_step(engine, cell)
    model: Any = engine.module
    gathered, full = model.state_dict(only_rank_0=True), engine.full_state()
    masters = model._get_param_to_save_data(model.fp32_params, True)
    of = {model.param2name[working]: masters[master] for working, master in zip(model.fp16_params, model.fp32_params, strict=True)}
    return tuple(max((state[name].float() - master.bfloat16().float()).abs().max().item() for name, master in of.items())
                 for state in (gathered, full))  # type: ignore[return-value]  # fmt: skip


def test_late_updates_are_in_the_full_state_though_colossalai_gathers_without_them() -> None:
    gathered, full = run_ranks(distances, 1, make_cell("gemini_cpu", 1, precision="bf16-master", lora_rank=4))[0]
    assert gathered > 0
    assert full == 0
