"""Evidence on one GPU: what lies where, collectives seen from the autograd thread, and a lie that is found out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.measure.evidence.holdings import Holdings
from bench.measure.evidence.trace import ModelTrace, tracing
from bench.measure.evidence.walk import amount, digests
from bench.record import Part, Traffic
from bench.strategies.base import all_strategies
from tests.contract.strategy_work import make_cell, make_engine, one_step
from tests.gpu.device_memory import allocated
from tests.gpu.lone_rank import run_cell
from tests.trials import tiny_cell

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

GPU = torch.device("cuda", 0)
PARAMETERS = 362_368


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("evidence-gpu")


def run(root: Path, strategy: str, stage: str = "sft", **changes: Any) -> Part:
    """What the only rank of a cell saw, which took some steps of this stage."""
    sizes: dict[str, Any] = {"steps": 6, "lap_steps": 2, "learning_rate": 1e-2, "sequence_length": 64}
    if stage == "ppo":
        sizes = {
            "iterations": 2,
            "lap_steps": 1,
            "prompts_per_iteration": 8,
            "prompt_length": 8,
            "response_length": 6,
            "learning_rate": 1e-3,
        }
    cell = tiny_cell(
        stage, strategy=strategy, device="cuda", launcher="torchrun", global_batch=8, micro_batch=4, held_out_rows=4,
        **{**sizes, "precision": "bf16-master", **changes},
    )  # fmt: skip
    if reason := all_strategies()[strategy].unsupported(cell):
        pytest.skip(reason)
    return run_cell(root, cell)


@pytest.mark.parametrize("strategy", sorted(all_strategies()))
@pytest.mark.parametrize("lora_rank", [0, 8])
def test_every_strategy_shows_that_it_is_active_on_a_gpu(root, strategy, lora_rank):
    part = run(root, strategy, lora_rank=lora_rank)
    assert part.outcome == "ok", part.reason
    assert part.evidence is not None
    states = {check.what: check.state for check in part.evidence.checks}
    assert {states[what] for what in ("trainable", "optimizer", "placement", "gradient norm", "moved", "micro-steps")} == {"shown"}
    assert part.seconds["evidence"] < 5.0


def test_ppo_shows_both_models_on_a_gpu(root):
    part = run(root, "zero2", "ppo", lora_rank=8)
    assert part.outcome == "ok", part.reason
    assert part.evidence is not None
    assert {check.model for check in part.evidence.checks if check.state == "shown"} == {"policy", "critic", "reference", "reward"}


def test_the_bytes_are_those_of_the_allocator(group):
    before = allocated()
    _, engine, _ = make_engine(make_cell("naive", 1, device="cuda", precision="bf16-master"))
    holdings = Holdings(engine, "bf16-master", GPU)
    assert holdings.parameters().bytes == 2 * PARAMETERS
    assert holdings.optimizer().bytes == 4 * PARAMETERS
    assert torch.cuda.memory_allocated() - before == pytest.approx(6 * PARAMETERS, rel=0.05)


def test_collectives_are_seen_that_ddp_starts_from_the_autograd_thread(group):
    cell = make_cell("ddp", 1, device="cuda", precision="fp32")
    _, engine, _ = make_engine(cell)
    trace = ModelTrace(engine, Holdings(engine, "fp32", GPU))
    with tracing([trace]):
        one_step(engine, cell)
    assert trace.done
    assert trace.collectives == {"all-reduce": Traffic(count=1, bytes=4 * PARAMETERS)}
    assert trace.gradients is not None
    assert trace.gradients.bytes == pytest.approx(4 * PARAMETERS, rel=0.05)


def test_digests_on_a_gpu_are_those_on_the_cpu_and_take_no_memory(group):
    tensor = torch.randn(1 << 24, device=GPU).bfloat16()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    assert digests([tensor, tensor[1:]]) == digests([tensor.cpu(), tensor[1:].cpu()])
    assert torch.cuda.max_memory_allocated() - before < 1 << 25
    assert amount([tensor.cpu()], GPU).host_bytes == 1 << 25
