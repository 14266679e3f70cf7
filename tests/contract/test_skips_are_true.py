"""A lie detector for skips: what strategies call unsupported is tried once for real, and must fail as they say.

Cells are found by asking every strategy about many combinations; of those with the same reason the one is tried that differs least from
an ordinary cell. `KINDS` says of each kind of reason what shows that it is true: words that the trial must fail with, or that what the
cell asks for is not there. What is a choice and no impossibility is called one, and what needs a GPU is tried in tests/gpu.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from bench.cell import Cell, Precision, cell_from_json, cell_to_json
from bench.measure.evidence.walk import local
from bench.models.build import build_policy, build_scorer
from bench.record import Part, load_part
from bench.strategies.base import PipelinedEngine, all_strategies
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
    "micro_batch": (2, 12),
    "optimizer": ("adamw", "foreach", "fused", "hybrid"),
    "save_every": (None, 1),
    "degrees": ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3)),
}
GLOBAL_BATCH = 12
FARTHEST = 4
"""Most choices in which a combination differs from the ordinary cell."""
SMALL = ("int8", "nf4")
"""What `base_weights` may be; asked with and without adapters in every precision mode."""
FROZEN: tuple[dict[str, Any], ...] = (
    {"frozen_weights": "int8"}, {"frozen_placement": "host"}, {"frozen_weights": "int8", "frozen_placement": "host"},
)  # fmt: skip
"""What PPO's frozen models may be; asked of PPO, on two ranks first: on one a shard is all."""
SIZES: dict[str, dict[str, Any]] = {
    "sft": {"steps": 3, "learning_rate": 1e-2},
    "rm": {"steps": 3, "learning_rate": 5e-3},
    "ppo": {"iterations": 2, "prompts_per_iteration": 12, "prompt_length": 8, "response_length": 4, "lap_steps": 1, "learning_rate": 1e-3},
}


def combinations() -> list[dict[str, Any]]:
    """Nearest to the ordinary cell first; as many ranks as the degrees need."""
    found: list[dict[str, Any]] = []
    for distance in range(FARTHEST + 1):
        for names in itertools.combinations(CHOICES, distance):
            others = [[choice for choice in CHOICES[name] if choice != ORDINARY[name]] for name in names]
            found += [{**ORDINARY, **dict(zip(names, values, strict=True))} for values in itertools.product(*others)]
    small = [{**ORDINARY, "lora_rank": rank, "precision": precision, "base_weights": kind}
             for rank in CHOICES["lora_rank"] for precision in CHOICES["precision"] for kind in SMALL]  # fmt: skip
    frozen = [{**ORDINARY, "stage": "ppo", "ranks": ranks, "precision": precision, **changes}
              for ranks in (2, 1) for precision in ("fp32", "bf16-master") for changes in FROZEN]  # fmt: skip
    return [one for one in found + small + frozen if divides(one)]


def divides(combination: dict[str, Any]) -> bool:
    """Whether ranks and sequences can be shared out; else a trial would fail of that."""
    tensor, pipeline = combination["degrees"]
    models, rest = divmod(combination["ranks"], tensor * pipeline)
    return rest == 0 and GLOBAL_BATCH % (combination["micro_batch"] * max(models, 1)) == 0


def cell_of(strategy: str, combination: dict[str, Any]) -> Cell:
    tensor, pipeline = combination["degrees"]
    stage = combination["stage"]
    changes = {key: value for key, value in combination.items() if key not in ("stage", "ranks", "degrees")}
    return tiny_cell(
        stage, **SIZES[stage], **changes, strategy=strategy, processes_per_node=combination["ranks"], tensor_parallel=tensor,
        pipeline_parallel=pipeline, global_batch=GLOBAL_BATCH, held_out_rows=6, sequence_length=64,
    )  # fmt: skip


@cache
def refusals() -> dict[tuple[str, str], tuple[Cell, str]]:
    """(Strategy, reason without counts and models) -> the cell to try, and the reason."""
    found: dict[tuple[str, str], tuple[Cell, str]] = {}
    installed = [name for name, kind in all_strategies().items() if kind.missing() is None]
    for combination in combinations():
        for strategy in installed:
            cell = cell_of(strategy, combination)
            reason = all_strategies()[strategy].unsupported(cell)
            if reason is not None:
                found.setdefault((strategy, re.sub(r"\b\d+\b|\w+-tiny", "#", reason)), (cell, reason))
    return found


def tried(cell: Cell, folder: Path) -> list[Part]:
    """The parts of the cell's trial, run whatever its strategy says of it; a rank that hangs has none."""
    trial = tiny_trial(cell, folder)
    with suppress(NoAnswer):
        run_ranks(run_rank, cell.world_size, trial, seconds=60.0, join=False)
    return [load_part(path) for rank in range(cell.world_size) if (path := trial.part_path(rank)).exists()]


def changed(cell: Cell, **changes: Any) -> Cell:
    return cell_from_json({**cell_to_json(cell), **changes})


# -- what ranks find out ---------------------------------------------------------------------------------------------


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


def plugin_precisions(cell: Cell) -> set[str]:
    """What ColossalAI's plugin under the strategy says that it supports."""
    _, engine, _ = make_engine(cell)
    return set(engine._booster.plugin.supported_precisions())


def fabric_precisions(cell: Cell) -> str:
    """What Fabric says that it takes, asked for the cell's."""
    from lightning_fabric import Fabric

    with pytest.raises(ValueError, match="Allowed precision values") as refusal:
        Fabric(accelerator="cpu", precision=cell.settings.precision)
    return str(refusal.value).partition("Allowed precision values")[2]


def said_of_a_cache(cell: Cell) -> str:
    """What ColossalAI logs where stages of a pipeline are asked for a KV cache."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("colossalai").addHandler(handler)
    _, engine, _ = make_engine(cell)
    ids_BT = torch.ones(4, 8, dtype=torch.long)
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "use_cache": True}
    with torch.no_grad():
        engine.run(inputs, 2, lambda output, _: output.logits.sum().reshape(1))  # type: ignore[attr-defined]
    return " ".join(said)


# -- what shows that a reason is true --------------------------------------------------------------------------------

Check = Callable[[Cell, str, Path], None]
"""Of the cell to try, its reason and a folder."""


def fails(*words: str) -> Check:
    """The trial fails and says these words, or without any those that the reason has in backquotes."""

    def check(cell: Cell, reason: str, folder: Path) -> None:
        parts = tried(cell, folder / "refused")
        assert {part.outcome for part in parts} & {"error", "invalid"}, f"it works: {reason}"
        said, stated = " ".join(part.reason or "" for part in parts), words or re.findall("`([^`]+)`", reason)
        assert stated
        assert all(one in said for one in stated), (stated, said)

    return check


def every_rank(work: Callable[[Cell], Any], answer: Any = True) -> Check:
    """All ranks answer so."""

    def check(cell: Cell, reason: str, folder: Path) -> None:  # noqa: ARG001
        assert run_ranks(work, cell.world_size, cell) == [answer] * cell.world_size, reason

    return check


def stays_whole(cell: Cell, reason: str, folder: Path) -> None:  # noqa: ARG001
    assert all(own >= whole for own, whole in run_ranks(whole_parameters, cell.world_size, cell))


def has_no_gradients(cell: Cell, reason: str, folder: Path) -> None:  # noqa: ARG001
    """Integers have none, so that without adapters all parameters are floating after all."""
    with pytest.raises(RuntimeError, match="floating point"):
        torch.zeros(1, dtype={"int8": torch.int8, "nf4": torch.uint8}[cell.settings.base_weights], requires_grad=True)
    assert {all(kinds) for kinds in run_ranks(floats, cell.world_size, cell)} == {True}


def knows_no_autocast(cell: Cell, reason: str, folder: Path) -> None:  # noqa: ARG001
    """ColossalAI's plugins know types of storage only."""
    (words,) = run_ranks(plugin_precisions, 1, changed(cell, precision="bf16-master"))
    assert words <= {"fp32", "bf16", "fp16"}


def knows_no_masters(cell: Cell, reason: str, folder: Path) -> None:  # noqa: ARG001
    """Fabric stores and updates in one type (`-true`), or computes under autocast (`-mixed`)."""
    (words,) = run_ranks(fabric_precisions, 1, cell)
    assert "bf16-true" in words
    assert "master" not in words


def has_no_cache(cell: Cell, reason: str, folder: Path) -> None:  # noqa: ARG001
    for said in run_ranks(said_of_a_cache, cell.world_size, cell):
        assert "use_cache=True is not supported for pipeline models" in said


def scores_of_two(cell: Cell) -> float:
    """How far the last token moves the scores in front of it, on the last stage; elsewhere 0."""
    strategy, device = all_strategies()[cell.strategy], device_of(cell)
    strategy.start(cell, device)
    engine = strategy.prepare(build_scorer(trial_of(cell), fresh_head=True, source="policy"), cell, device, learning_rate=1e-3)
    assert isinstance(engine, PipelinedEngine)
    ids_BT = torch.arange(3, 51).view(4, 12)
    scores = []
    for last in (3, 4):
        ids_BT[:, -1] = last
        places = torch.arange(12).expand(8, 12).contiguous()
        inputs = {"input_ids": ids_BT.repeat(2, 1), "attention_mask": torch.ones(8, 12, dtype=torch.long), "position_ids": places}
        with torch.no_grad():
            engine.run(inputs, 4, lambda scores_BT, _: scores.append(scores_BT) or scores_BT.sum().reshape(1))
    return (scores[0] - scores[-1])[:, :-1].abs().max().item() if scores else 0.0


def sees_what_comes(cell: Cell, reason: str, folder: Path) -> None:  # noqa: ARG001
    """The last token moves the scores in front of it; of a model whose mask is causal it does not."""
    assert max(run_ranks(scores_of_two, cell.world_size, cell)) > 1e-3
    causal = changed(cell, model="llama-tiny")
    assert max(run_ranks(scores_of_two, causal.world_size, causal)) == 0.0


def is_a_choice(cell: Cell, reason: str, folder: Path) -> None:  # noqa: ARG001
    """Nothing can prove it; what the reason calls right must be."""
    named = re.findall("adamw|foreach|fused", reason)
    assert named
    for optimizer in named:
        assert all_strategies()[cell.strategy].unsupported(changed(cell, optimizer=optimizer)) is None


def needs_a_gpu(cell: Cell, reason: str, folder: Path) -> None:  # noqa: ARG001
    pytest.skip(f"tried on a GPU, in tests/gpu/test_skips_gpu.py: {reason}")


KINDS: dict[str, Check] = {
    "runs on one rank only": fails("weights have the same bits on all ranks"),
    "does not offer precision fp32": fails("precision fp32 is not supported"),
    "does not offer precision bf16-pure": fails("of optimizer state on this rank"),
    "does not offer precision bf16-autocast": knows_no_autocast,
    "fabric does not offer": knows_no_masters,
    "moves masters only": every_rank(updates_in_place),
    "has kernels for cuda only": fails("No usable kernel found for CPUAdamLoader"),
    "takes no DTensors": needs_a_gpu,
    "optimizer hybrid is ColossalAI's": is_a_choice,
    "weights cannot train": has_no_gradients,
    "lays out no": fails("of frozen parameters on this rank"),
    "frozen models": every_rank(frozen_otherwise),
    "splits no model": stays_whole,
    "no policy for OPT": fails(),
    "needs labels": fails(),
    "makes no causal mask": sees_what_comes,
    "takes no LoRA": fails("any parameter that requires a gradient"),
    "cuts through the heads": fails(),
    "KV cache": has_no_cache,
    "do not fill": fails(),
}
"""Words of a reason -> what shows that it is true. hybrid has masters in any 16-bit mode, which more optimizer state shows."""
OF_EXTRAS = {"fabric does not offer", "optimizer hybrid is ColossalAI's"}
"""Those of strategies that may not be installed."""


@pytest.mark.parametrize(("strategy", "about"), list(refusals()))
def test_what_is_called_unsupported_fails_as_stated(strategy: str, about: str, tmp_path: Path) -> None:
    cell, reason = refusals()[strategy, about]
    (check,) = [check for words, check in KINDS.items() if words in reason]
    check(cell, reason, tmp_path)


def test_all_kinds_of_refusals_are_found() -> None:
    """Else the detector would be silent because it asks nothing."""
    reasons = " ".join(reason for _, reason in refusals().values())
    assert {words for words in KINDS if words not in reasons} <= OF_EXTRAS


def test_every_precision_and_every_kind_of_weights_that_is_refused_is_tried() -> None:
    tried_cells = [(strategy, cell.settings) for (strategy, _), (cell, _) in refusals().items()]
    precisions = {(strategy, settings.precision) for strategy, settings in tried_cells}
    weights = {(strategy, settings.base_weights) for strategy, settings in tried_cells}
    for strategy in {strategy for strategy, _ in tried_cells}:
        kind = all_strategies()[strategy]
        assert {(strategy, precision) for precision in get_args(Precision) if precision not in kind.precisions} <= precisions
        assert {(strategy, small) for small in SMALL} <= weights
