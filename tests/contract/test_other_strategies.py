"""Whole stages under the strategies that are not ColossalAI's: they come out as under naive, and say what they cannot."""

from __future__ import annotations

import os
from functools import cache

import pytest

from bench.launch.command import Agents
from bench.launch.supervise import run_trial
from bench.record import Part
from bench.strategies.base import all_strategies
from tests.trials import SIZES, only, run_forked, tiny_cell, tiny_trial

STRATEGIES = [name for name, kind in all_strategies().items() if not kind.uses_colossalai and name not in ("naive", "ddp")]
"""Found by listing; naive is what they are compared with, ddp is tested beside ColossalAI's."""
SERIES = dict.fromkeys(SIZES, ("loss", "gradient_norm")) | {
    "ppo": ("loss", "gradient_norm", "critic_gradient_norm", "reward", "kl", "entropy", "value_loss", "policy_loss", "ptx_loss")
}
FIRST, LATER = 1e-5, 1e-4
"""Largest relative deviation from naive in fp32, of the first loss and of a whole series (below 1: absolute)."""


@pytest.mark.skipif("COATI_BENCH_EXTRAS" not in os.environ, reason="make test-extras asks for the extras")
def test_deepspeed_and_fabric_are_there_where_extras_are_asked_for():
    """Else all of their tests would skip themselves, and nobody would notice."""
    assert [problem for kind in all_strategies().values() if (problem := kind.missing())] == []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run a tiny trial of a stage; every one once."""
    root = tmp_path_factory.mktemp("others")

    @cache
    def run(stage: str, strategy: str, ranks: int, **changes) -> Part:
        cell = tiny_cell(stage, **{**SIZES[stage], "strategy": strategy, "processes_per_node": ranks, "held_out_rows": 12, **changes})
        reason = all_strategies()[strategy].unsupported(cell)
        if reason:
            pytest.skip(reason)
        return only(run_forked(tiny_trial(cell, root / cell.cell_id)))

    return run


def deviation(part: Part, other: Part, names: tuple[str, ...]) -> float:
    pairs = [pair for name in names for pair in zip(part.series[name], other.series[name], strict=True)]
    pairs += [(part.held_out[name], other.held_out[name]) for name in other.held_out]
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)


@pytest.mark.parametrize("lora_rank", [0, 8])
@pytest.mark.parametrize("stage", SIZES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stage_on_two_ranks_is_that_of_naive(run, strategy, stage, lora_rank):
    seen = run(stage, strategy, 2, micro_batch=2, lora_rank=lora_rank)
    naive = run(stage, "naive", 1, micro_batch=8, lora_rank=lora_rank)
    assert seen.series["loss"][0] == pytest.approx(naive.series["loss"][0], rel=FIRST, abs=FIRST)
    assert deviation(seen, naive, SERIES[stage]) < LATER
    assert seen.facts["initial_weights_sha256"] == naive.facts["initial_weights_sha256"]


@pytest.mark.parametrize("stage", SIZES)
def test_adapters_so_small_that_deepspeed_keeps_them_gathered_are_in_shares_all_the_same(run, stage):
    """As those of every larger model are: below `stage3_param_persistence_threshold`."""
    checks = run(stage, "deepspeed_zero3", 2, micro_batch=2, lora_rank=1).evidence.checks
    found = {(check.model, check.what): check.state for check in checks}
    assert {state for (_, what), state in found.items() if what == "parameters"} == {"shown"}
    assert "refuted" not in found.values()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lora_rank", [0, 8])
@pytest.mark.parametrize("ranks", [1, 4])
def test_sft_on_one_and_four_ranks_is_that_of_naive(run, strategy, lora_rank, ranks):
    seen = run("sft", strategy, ranks, micro_batch=2, lora_rank=lora_rank)
    assert deviation(seen, run("sft", "naive", 1, micro_batch=8, lora_rank=lora_rank), SERIES["sft"]) < LATER


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("stage", SIZES)
def test_a_stage_trains_in_16_bits_with_fp32_masters(run, strategy, stage):
    seen, naive = (run(stage, kind, ranks, micro_batch=2, precision="bf16-master") for kind, ranks in ((strategy, 2), ("naive", 1)))
    assert seen.series["loss"][0] == pytest.approx(naive.series["loss"][0], rel=2e-2, abs=2e-2)
    assert seen.facts["precision"] == "bf16-master"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_torchrun_agents_give_the_losses_of_forked_ranks_and_evidence_refutes_nothing(run, strategy, tmp_path):
    forked = run("sft", strategy, 2, micro_batch=2)
    cell = tiny_cell(
        "sft", **{**SIZES["sft"], "strategy": strategy, "nodes": 2, "micro_batch": 2, "launcher": "torchrun", "held_out_rows": 12}
    )
    record = run_trial(tiny_trial(cell, tmp_path / "trial"), tmp_path / "record.json", agents=Agents())
    assert (record.outcome, record.reason) == ("ok", None)
    assert record.parts[0].series["loss"] == pytest.approx(forked.series["loss"], rel=FIRST)
