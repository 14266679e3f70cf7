"""Whole stages under ColossalAI's strategies, ddp, and both ways to split a model are those of naive, as forked ranks and by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bench.matrix import impossible
from bench.record import Part, load_part
from bench.report.windows import counting_parts
from bench.strategies.base import all_strategies
from bench.trial import save_trial
from tests.contract.strategy_work import comparable, kind_of, variants
from tests.trials import OF_A_GROUP, only, run_forked, tiny_cell, tiny_trial

STRATEGIES = [name for name, kind in all_strategies().items() if kind.uses_colossalai or name == "ddp"]
VARIANTS = [name for name, settings in variants().items() if settings["strategy"] in STRATEGIES]
SIZES = {
    "sft": {"steps": 4, "global_batch": 8, "sequence_length": 64, "learning_rate": 1e-2},
    "rm": {"steps": 4, "global_batch": 8, "sequence_length": 64, "learning_rate": 5e-3},
    "ppo": {
        "iterations": 2, "prompts_per_iteration": 8, "global_batch": 8, "prompt_length": 8, "response_length": 4, "sequence_length": 64,
        "learning_rate": 1e-3, "ptx": "synthetic-instruct", "ptx_coef": 0.2, "lap_steps": 1,
    },
}  # fmt: skip
SERIES = dict.fromkeys(SIZES, ("loss", "gradient_norm")) | {
    "ppo": ("loss", "gradient_norm", "critic_gradient_norm", "reward", "kl", "entropy", "value_loss", "policy_loss", "ptx_loss")
}
SPREAD = {"fp32": 1e-4, "bf16-master": 2e-2}
"""Largest relative deviation from naive of a series (below 1: absolute), by precision."""
REWARD_NORM_SPREAD = SPREAD | {"bf16-master": 5e-2}
"""Of a reward model's gradient norm, of which little is left near a loss of ln 2: it moved by 0.026 where another processor rounds bf16."""
WIDE = {f"hybrid-{tensor}x{pipeline}": {"strategy": "hybrid", "tensor_parallel": tensor, "pipeline_parallel": pipeline}
        for tensor, pipeline in ((2, 1), (1, 2), (2, 2), (4, 1))}  # fmt: skip
"""Ways to split a model over four ranks, with data parallelism where ranks are left."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def run(root):
    """The parts of a tiny trial of a stage; equal ones run once."""

    @cache
    def run(stage: str, ranks: int, **changes: Any) -> list[Part]:
        cell = cell_of(stage, ranks, **changes)
        if reason := impossible(cell):
            pytest.skip(reason)
        return run_forked(tiny_trial(cell, root / cell.cell_id))

    return run


def cell_of(stage: str, ranks: int, **changes: Any):
    settings = {**SIZES[stage], "processes_per_node": ranks, "held_out_rows": 10, "micro_batch": 2, **changes}
    return tiny_cell(stage, **settings)


def deviation(part: Part, other: Part, names: tuple[str, ...]) -> float:
    pairs = [pair for name in names for pair in zip(part.series[name], other.series[name], strict=True)]
    pairs += [(part.held_out[name], other.held_out[name]) for name in other.held_out if "accuracy" not in name]
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)


def work(parts: list[Part], unit: str) -> int:
    """Units of all ranks together, those that see the same sequences once."""
    return sum(lap.counts[unit] for part in counting_parts(parts) for lap in part.laps)


@pytest.mark.parametrize("lora_rank", [0, 8])
@pytest.mark.parametrize("stage", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stage_on_two_ranks_is_that_of_naive(run, variant, stage, lora_rank):
    precision = comparable(variant)
    seen = run(stage, 2, **variants()[variant], precision=precision, lora_rank=lora_rank)
    naive = run(stage, 1, precision=precision, lora_rank=lora_rank)
    assert only(seen).facts["initial_weights_sha256"] == only(naive).facts["initial_weights_sha256"]
    own = {"gradient_norm": REWARD_NORM_SPREAD[precision]} if stage == "rm" else {}
    for name in SERIES[stage]:
        assert deviation(seen[0], naive[0], (name,)) < own.get(name, SPREAD[precision])
    assert seen[1].series["loss"] == seen[0].series["loss"]
    assert work(seen, "sequences") == work(naive, "sequences")
    for unit in ("learned_tokens",) if stage == "ppo" else ("loss_tokens", "tokens"):
        assert work(seen, unit) == work(naive, unit)


@pytest.mark.parametrize("variant", [*STRATEGIES, *WIDE])
def test_sft_on_four_ranks_is_that_of_naive(run, variant):
    settings = WIDE.get(variant, {"strategy": variant})
    precision = comparable(settings["strategy"])
    seen, naive = run("sft", 4, **settings, precision=precision), run("sft", 1, precision=precision)
    assert deviation(only(seen), only(naive), SERIES["sft"]) < SPREAD[precision]
    assert work(seen, "loss_tokens") == work(naive, "loss_tokens")


@pytest.mark.parametrize("stage", ["rm", "ppo"])
def test_slices_and_data_parallel_ranks_together_are_naive(run, stage):
    seen, naive = run(stage, 4, strategy="hybrid", tensor_parallel=2), run(stage, 1)
    assert deviation(only(seen), only(naive), SERIES[stage]) < SPREAD["fp32"]
    assert work(seen, "sequences") == work(naive, "sequences")


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("hybrid")])
def test_weak_scaling_multiplies_the_batch_by_data_parallel_ranks(run, variant):
    parts = run("sft", 4, **variants()[variant], scaling="weak", steps=2)
    ranks = 4 if variant == "hybrid" else 2
    assert only(parts).facts["optimizer"] == "adamw"
    assert work(parts, "sequences") == 2 * 8 * ranks


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_torchrun_gives_the_losses_of_forked_ranks(run, root, strategy):
    changes = {"strategy": strategy, "precision": comparable(strategy), "lora_rank": 8}
    forked = only(run("sft", 2, **changes))
    cell = cell_of("sft", 2, **changes, launcher="torchrun")
    trial = tiny_trial(cell, root / cell.cell_id)
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bench.launch.rank"]
    launch([sys.executable, *ranks], trial, ["bench.worker"])
    assert only([load_part(trial.part_path(rank)) for rank in (0, 1)]).series["loss"] == pytest.approx(forked.series["loss"], rel=1e-6)


@pytest.mark.parametrize("strategy", ["naive", "fabric", "deepspeed_zero2"])
def test_a_rank_that_nobody_launched_is_alone(run, root, strategy, monkeypatch):
    """Fabric and DeepSpeed read torchrun's variables themselves."""
    if reason := kind_of(strategy).missing():
        pytest.skip(reason)
    changes = {"strategy": strategy, "precision": comparable(strategy)}
    for name in OF_A_GROUP:
        monkeypatch.delenv(name, raising=False)
    forked, cell = only(run("sft", 1, **changes)), cell_of("sft", 1, **changes, launcher="torchrun")
    trial = tiny_trial(cell, root / cell.cell_id)
    launch([sys.executable, "-m", "bench.worker"], trial)
    assert only([load_part(trial.part_path(0))]).series["loss"] == pytest.approx(forked.series["loss"], rel=1e-6)


def launch(line: list[str], trial: Any, program: list[str] | None = None) -> None:
    """Run the line with the file of the trial, and of torchrun's ranks their program, as the product does."""
    file = Path(trial.work) / "trial.json"
    save_trial(trial, file)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    done = subprocess.run([*line, str(file), *(program or [])], check=False, capture_output=True, text=True, timeout=150, env=environment)
    logs = "".join(f"\n{log.name}:\n{log.read_text()[-2000:]}" for log in sorted(file.parent.glob("rank*.log")))
    assert done.returncode == 0, done.stderr[-2000:] + logs


def test_every_strategy_of_colossalai_is_emulated_here() -> None:
    assert all(kind_of(name).emulated(cell_of("sft", 1, strategy=variants()[name]["strategy"])) == (name != "ddp") for name in VARIANTS)
