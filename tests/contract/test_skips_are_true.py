"""A lie detector for skips: what strategies call unsupported is tried once for real, and must fail as they say.

Cells are found by asking every strategy about many combinations; of those with the same reason the one is tried that differs least from
an ordinary cell. The words in backquotes of a reason must be among what the ranks say, but for settings that would be right. Where nothing
fails, the trial must not have been what was asked for: evidence refutes it, losses or norms are other than naive's, or nothing of a model
was split.
"""

from __future__ import annotations

import itertools
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest

from bench.cell import Cell, Precision, cell_from_json, cell_to_json
from bench.measure.evidence.walk import local
from bench.models.build import build_policy
from bench.record import Part, load_part
from bench.strategies.base import all_strategies
from bench.strategies.training_state import innermost
from bench.worker import run_rank
from tests.contract.rank_harness import NoAnswer, run_ranks
from tests.contract.strategy_work import device_of, make_engine, trial_of
from tests.trials import tiny_cell, tiny_trial

ORDINARY: dict[str, Any] = {"stage": "sft", "lora_rank": 0, "ranks": 1, "precision": "fp32", "model": "bloom-tiny", "micro_batch": 2,
                            "optimizer": "adamw", "save_every": None, "degrees": (1, 1), "base_weights": "stored"}  # fmt: skip
CHOICES: dict[str, tuple[Any, ...]] = {
    "stage": ("sft", "rm", "ppo"),
    "lora_rank": (0, 8),
    "ranks": (1, 2, 3),
    "precision": get_args(Precision),
    "model": ("bloom-tiny", "llama-tiny", "gpt2-tiny", "opt-tiny", "qwen2-tiny", "mistral-tiny"),
    "micro_batch": (2, 6),
    "optimizer": ("adamw", "foreach", "fused", "hybrid"),
    "save_every": (None, 1),
    "degrees": ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3)),
    "base_weights": ("stored", "int8", "nf4"),
}
FARTHEST = 4
"""Most choices in which a combination differs from the ordinary cell."""
FARTHEST_SMALL = 2
"""The same where weights are in 8 or 4 bits, which depends on adapters alone."""
FROZEN: tuple[dict[str, Any], ...] = (
    {"frozen_weights": "int8"}, {"frozen_placement": "host"}, {"frozen_weights": "int8", "frozen_placement": "host"},
)  # fmt: skip
"""What PPO's frozen models may be; asked of PPO, on two ranks first: on one a shard is all."""
SIZES: dict[str, dict[str, Any]] = {
    "sft": {"steps": 3, "learning_rate": 1e-2},
    "rm": {"steps": 3, "learning_rate": 5e-3},
    "ppo": {"iterations": 2, "prompts_per_iteration": 6, "prompt_length": 8, "response_length": 4, "lap_steps": 1, "learning_rate": 1e-3},
}
FAITHFUL = 1e-3
"""Largest relative deviation (below 1: absolute) from naive of a trial that was what was asked for."""


def combinations() -> list[dict[str, Any]]:
    """Nearest to the ordinary cell first; as many ranks as the degrees need."""
    found: list[dict[str, Any]] = []
    for distance in range(FARTHEST + 1):
        for names in itertools.combinations(CHOICES, distance):
            if "base_weights" in names and distance > FARTHEST_SMALL:
                continue
            others = [[choice for choice in CHOICES[name] if choice != ORDINARY[name]] for name in names]
            found += [{**ORDINARY, **dict(zip(names, values, strict=True))} for values in itertools.product(*others)]
    frozen = [{**ORDINARY, "stage": "ppo", "ranks": ranks, "precision": precision, **changes}
              for ranks in (2, 1) for precision in ("fp32", "bf16-master") for changes in FROZEN]  # fmt: skip
    return [one for one in found + frozen if one["ranks"] % (one["degrees"][0] * one["degrees"][1]) == 0]


def cell_of(strategy: str, combination: dict[str, Any]) -> Cell:
    tensor, pipeline = combination["degrees"]
    stage = combination["stage"]
    changes = {key: value for key, value in combination.items() if key not in ("stage", "ranks", "degrees")}
    return tiny_cell(
        stage, **SIZES[stage], **changes, strategy=strategy, processes_per_node=combination["ranks"], tensor_parallel=tensor,
        pipeline_parallel=pipeline, global_batch=6, held_out_rows=6, sequence_length=64,
    )  # fmt: skip


@cache
def refusals() -> dict[tuple[str, str], tuple[Cell, str]]:
    """(Strategy, reason without numbers and models) -> the cell to try, and the reason."""
    found: dict[tuple[str, str], tuple[Cell, str]] = {}
    installed = [name for name, kind in all_strategies().items() if kind.missing() is None]
    for combination in combinations():
        for strategy in installed:
            cell = cell_of(strategy, combination)
            reason = all_strategies()[strategy].unsupported(cell)
            if reason is not None:
                found.setdefault((strategy, re.sub(r"[\w-]*\d[\w-]*|\w+-tiny", "#", reason)), (cell, reason))
    return found


def tried(cell: Cell, folder: Path) -> list[Part]:
    """The parts of the cell's trial, run whatever its strategy says of it; a rank that hangs has none."""
    trial = tiny_trial(cell, folder)
    with suppress(NoAnswer):
        run_ranks(run_rank, cell.world_size, trial, seconds=60.0, join=False)
    return [load_part(path) for rank in range(cell.world_size) if (path := trial.part_path(rank)).exists()]


def naive_of(cell: Cell) -> Cell:
    changes = {"strategy": "naive", "processes_per_node": 1, "tensor_parallel": 1, "pipeline_parallel": 1, "save_every": None}
    return cell_from_json({**cell_to_json(cell), **changes})


def deviation(part: Part, other: Part) -> float:
    pairs = [pair for name in ("loss", "gradient_norm") for pair in zip(part.series[name], other.series[name], strict=True)]
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)


def whole_parameters(cell: Cell) -> tuple[int, int]:
    """Parameters that this rank's module has, and those that it was made from."""
    module = build_policy(trial_of(cell))
    whole = sum(parameter.numel() for parameter in module.parameters())
    _, engine, _ = make_engine(cell, module)
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters()), whole


def floats(cell: Cell) -> list[bool]:
    """Of each parameter, whether it is floating after all: 8 and 4 bits have no gradients."""
    _, engine, _ = make_engine(cell)
    return [parameter.is_floating_point() for parameter in engine.module.parameters()]


def frozen_otherwise(cell: Cell) -> bool:
    """Whether a frozen model is not laid out as the cell says: not in 8 bits, or not whole, as what waits in host memory is."""
    strategy, module = all_strategies()[cell.strategy], build_policy(trial_of(cell))
    strategy.start(cell, device_of(cell))
    placed = [vars(one).get("ds_tensor", one) for one in strategy.place_frozen(module, cell, device_of(cell)).parameters()]
    if cell.settings.frozen_weights == "int8":
        return all(one.is_floating_point() for one in placed)
    return sum(local(one).numel() for one in placed) < 0.9 * sum(one.numel() for one in module.parameters())


def updates_in_place(cell: Cell) -> bool:
    """Whether the optimizer updates the memory of the model's own parameters, so that nothing lies anywhere else."""
    _, engine, module = make_engine(cell)
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    updated = [parameter for group in innermost(engine._optimizer).param_groups for parameter in group["params"]]
    return bool(updated) and all(parameter.untyped_storage().data_ptr() in own for parameter in updated)


@pytest.mark.parametrize(("strategy", "about"), list(refusals()))
def test_what_is_called_unsupported_fails_as_stated(strategy: str, about: str, tmp_path: Path) -> None:
    cell, reason = refusals()[strategy, about]
    if "splits no model" in reason:
        assert all(own >= whole for own, whole in run_ranks(whole_parameters, cell.world_size, cell))
        return
    if "weights cannot train" in reason:
        assert {all(kinds) for kinds in run_ranks(floats, cell.world_size, cell)} == {True}
        return
    if "frozen models" in reason:
        assert all(run_ranks(frozen_otherwise, cell.world_size, cell))
        return
    if "moves masters only" in reason:
        assert all(run_ranks(updates_in_place, cell.world_size, cell))
        return
    parts = tried(cell, tmp_path / "refused")
    said = " ".join(part.reason or "" for part in parts)
    stated = re.findall("`([^`]+)`(?!,? (?:would be|is) right)", reason)
    if all(part.outcome == "ok" for part in parts) and not stated:
        (naive,) = tried(naive_of(cell), tmp_path / "naive")
        assert deviation(parts[0], naive) > FAITHFUL, f"it works: {reason}"
    else:
        assert {part.outcome for part in parts} & {"error", "invalid"}, f"it works: {reason}"
        assert all(words in said for words in stated), (stated, said)


def test_all_kinds_of_refusals_are_found() -> None:
    """Else the detector would be silent because it asks nothing."""
    reasons = " ".join(reason for _, reason in refusals().values())
    for words in (
        "one rank only", "does not offer precision", "takes no LoRA", "KV cache", "cuts through the heads", "splits no model",
        "lays out no int8", "weights cannot train", "keeps frozen models in shards",
    ):  # fmt: skip
        assert words in reasons
