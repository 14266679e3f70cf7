"""From a suite to a plan: cells, blocks, warm starts, and what is skipped with its reason. Torch-free."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError, with_config

from bench.cell import (
    AXES,
    SETTINGS,
    STRICT,
    Cell,
    Count,
    Name,
    Settings,
    canonical_json,
    cell_from_json,
    cell_to_json,
    digest,
    identity,
    validate_settings,
)
from bench.data.sources import data_problem
from bench.errors import Mistake, SuiteError, UserError
from bench.models.named_weights import reward_weights_problem
from bench.models.presets import model_problem, vocabulary_size
from bench.record import first_problem, write_json
from bench.stages.base import SPECS
from bench.strategies.base import all_strategies
from bench.suite import MOST_LETTERS, Known, Limits, Suite, matches, place_of_setting, read_suite, set_of_mistakes, settings_for

PLAN_SCHEMA = "coati-bench/plan/1"
MOST_TRIALS = 1_000_000
"""Of one plan, all cells together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A point of the matrix that can never run, and why."""

    cell: Cell
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm:
    """Something that is made once, before the cells that start from it.

    Without a cell it is a tokenizer; with one it is that cell's trained weights (`naive`, full, one rank).
    """

    key: str
    tokenizer: dict[str, Any] | None = None
    """{data: [names], vocabulary: size}."""
    cell: Cell | None = None
    starts: dict[str, str] = field(default_factory=dict)
    """Role -> key of the warm start that it begins from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The scheduling unit: one repetition of a comparison set, in seeded random order, on one allocation."""

    block_id: str
    stage: str
    trial: int
    nodes: int
    processes_per_node: int
    cells: tuple[str, ...]
    """Cell ids in the order in which they run."""
    starts: dict[str, dict[str, str]]
    """Cell id -> role -> what it begins from: a warm start's key, `cell:<cell id>` for the weights that this cell left in the
    same trial, or `path:<folder>` for a checkpoint folder of the user's."""
    after: tuple[str, ...] = ()
    """Blocks that must be done before (`warm_start: chain`)."""
    saves: tuple[str, ...] = ()
    """Cells whose weights a later stage continues."""
    data: tuple[str, ...] = ()
    """Names of the data that its cells read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The expanded suite."""

    suite: str
    trials: int
    cells: dict[str, Cell]
    blocks: tuple[Block, ...]
    warm: tuple[Warm, ...]
    skipped: tuple[Skipped, ...]
    data: tuple[str, ...]
    """Names of all data, those of the warm starts included."""
    limits: Limits


def known_names() -> Known:
    """The strategies, models and data that a suite may name."""
    return Known(strategies=tuple(all_strategies()), model_problem=model_problem, data_problem=data_problem)


def make_plan(path: Path, *, container: str | None = None) -> Plan:
    """Read a suite file and expand it. Raises UserError or SuiteError with every mistake.

    `container` runs all of its cells there; the suite is then called `<suite>-in-<container>`, with results of its own.
    """
    suite = read_suite(path, known_names())
    if container is not None:
        name = f"{suite.suite}-in-{re.sub(r'[^a-z0-9._-]', '-', Path(container).name.removesuffix('.sqfs').lower())}"
        if len(name) > MOST_LETTERS:
            raise UserError(
                f"--container {container}: a suite's name has at most {MOST_LETTERS} letters; seen: {len(name)} in {name}; a shorter name "
                "of the image's file, or of the suite, would be right"
            )
        suite = dataclasses.replace(suite, suite=name, settings={**suite.settings, "container": container})
    return expand(suite, str(path))


def expand(suite: Suite, source: str) -> Plan:
    """Expand a checked suite into its plan. Raises SuiteError where settings contradict each other or no cell can run."""
    return _Expansion(suite, source).plan()


class _Expansion:
    """The state of one expansion: what was planned so far, and the mistakes seen on the way."""

    def __init__(self, suite: Suite, source: str) -> None:
        self.suite, self.source = suite, source
        self.mistakes: list[Mistake] = []
        self.cells: dict[str, Cell] = {}
        self.skipped: list[Skipped] = []
        self.warm: dict[str, Warm] = {}
        self.starts: dict[str, dict[str, str]] = {}
        self._settings: dict[str, Settings | None] = {}
        self._ids: dict[tuple[Any, ...], str] = {}
        self._problems: dict[tuple[str, str], str | None] = {}

    def plan(self) -> Plan:
        for path, axes, extra in _points(self.suite):
            self._add(path, axes, extra)
        for cell_id, cell in self.cells.items() if not self.mistakes else ():
            self.starts[cell_id] = self._starts_of(cell)
        if not self.cells and not self.mistakes:
            reasons = sorted({skipped.reason for skipped in self.skipped})
            problem = "no cell of this matrix can run: " + "; ".join(reasons or ["all are excluded"])
            self.mistakes.append(Mistake("axes", problem, asdict(self.suite.axes)))
        if (count := len(self.cells) * self.suite.trials) > MOST_TRIALS:
            problem = f"{count:,} trials of {len(self.cells):,} cells; a plan has at most {MOST_TRIALS:,}"
            self.mistakes.append(Mistake("trials", problem, self.suite.trials))
        if self.mistakes:
            raise SuiteError(self.source, sorted(set_of_mistakes(self.mistakes)))
        blocks = self._blocks()
        data = {name for block in blocks for name in block.data} | {name for warm in self.warm.values() for name in _warm_data(warm)}
        return Plan(
            suite=self.suite.suite, trials=self.suite.trials, cells=self.cells, blocks=blocks, warm=tuple(self.warm.values()),
            skipped=tuple(self.skipped), data=tuple(sorted(data)), limits=self.suite.limits,
        )  # fmt: skip

    def _add(self, path: str, axes: dict[str, Any], extra: dict[str, Any] | None) -> None:
        settings = self._settings_of(axes, extra, path if extra is not None else f"stages.{axes['stage']}")
        if settings is None:
            return
        self._check_vocabulary(axes, extra, path, settings)
        cell = Cell(**axes, settings=settings)
        reason = impossible(cell)
        if reason and extra is not None and not all_strategies()[cell.strategy].missing(cell.settings.container):
            self.mistakes.append(Mistake(path, f"this cell cannot run: {reason}", axes))
        elif reason:
            self.skipped.append(Skipped(cell=cell, reason=reason))
        else:
            cell_id = cell.cell_id
            self.cells[cell_id] = cell
            self._ids[_axes_key(axes)] = cell_id

    def _settings_of(self, axes: dict[str, Any], extra: dict[str, Any] | None, path: str) -> Settings | None:
        """The validated settings at a point of the matrix, or None after noting the mistake; made once for equal ones."""
        merged = settings_for(self.suite, axes, extra)
        if merged.get("weights", "random") == "random" and not merged.get("tokenizer_data"):
            merged["tokenizer_data"] = [self._tokenizer_data(axes, merged)]
        if merged.get("device", "cuda") == "cuda":
            merged.setdefault("optimizer", "foreach")
        key = axes["stage"] + canonical_json(merged)
        if key not in self._settings:
            self._settings[key] = self._validated(axes["stage"], merged, path)
        return self._settings[key]

    def _validated(self, stage: str, merged: dict[str, Any], path: str) -> Settings | None:
        try:
            settings = validate_settings(stage, merged)
        except ValidationError as error:
            self.mistakes += [Mistake(f"{path}.{'.'.join(map(str, item['loc']))}", item["msg"], item["input"]) for item in error.errors()]
            return None
        if problem := _contradiction(stage, settings):
            self.mistakes.append(Mistake(path, *problem))
            return None
        return settings

    def _check_vocabulary(self, axes: dict[str, Any], extra: dict[str, Any] | None, path: str, settings: Settings) -> None:
        """Note a `tokenizer_vocabulary` that the suite names and that has more tokens than the model has embeddings."""
        if settings.weights != "random":
            return
        key, wanted, room = "tokenizer_vocabulary", settings.tokenizer_vocabulary, vocabulary_size(axes["model"])
        if room is None or wanted <= room:
            return
        place = f"{path}.settings.{key}" if key in (extra or {}) else place_of_setting(self.suite, axes, key)
        if place:
            self.mistakes.append(Mistake(place, f"more tokens than the {room} embeddings of {axes['model']}; {room} or less", wanted))

    def _tokenizer_data(self, axes: dict[str, Any], merged: dict[str, Any]) -> str:
        """Whose texts the tokenizer is trained on: those of the chain's first stage, so that all of its stages share it."""
        if axes["stage"] != "sft" and merged.get("warm_start", "shared") != "none":
            merged = settings_for(self.suite, {**axes, "stage": "sft"})
            return str(merged.get("data", "synthetic-instruct"))
        return str(merged.get("data") or validate_settings(axes["stage"], {}).data)

    def _starts_of(self, cell: Cell) -> dict[str, str]:
        """Role -> what the cell begins from; plans the warm starts on the way."""
        settings, starts = cell.settings, {}
        if settings.weights == "random":
            starts["tokenizer"] = self._tokenizer(cell.model, settings)
        for role, stage in SPECS[cell.stage].starts.items():
            named = settings.reward_model if role == "reward" else "trained"
            if named not in ("trained", "fresh-head"):
                self._check_weights(cell, named)
                starts[role] = f"path:{named}"
            elif named == "trained" and settings.warm_start == "chain":
                starts[role] = self._chained(cell, stage)
            elif named == "trained" and settings.warm_start == "shared":
                starts[role] = self._shared(cell, stage)
        return starts

    def _check_weights(self, cell: Cell, named: str) -> None:
        """Note a `reward_model` folder that does not fit; each is looked at once."""
        key = (named, cell.model)
        if key not in self._problems:
            self._problems[key] = reward_weights_problem(Path(named), cell.model)
        if problem := self._problems[key]:
            axes = {axis: getattr(cell, axis) for axis in AXES}
            own = [i for i, item in enumerate(self.suite.include) if (item.get("settings") or {}).get("reward_model") == named]
            place = f"include[{own[0]}].settings.reward_model" if own else place_of_setting(self.suite, axes, "reward_model")
            self.mistakes.append(Mistake(str(place), problem, named))

    def _tokenizer(self, model: str, settings: Settings) -> str:
        vocabulary = min(settings.tokenizer_vocabulary, vocabulary_size(model) or settings.tokenizer_vocabulary)
        tokenizer = {"data": list(settings.tokenizer_data), "vocabulary": vocabulary}
        key = f"tokenizer-{digest(tokenizer)[:8]}"
        self.warm.setdefault(key, Warm(key=key, tokenizer=tokenizer))
        return key

    def _chained(self, cell: Cell, stage: str) -> str:
        axes = {axis: getattr(cell, axis) for axis in AXES} | {"stage": stage}
        if (cell_id := self._ids.get(_axes_key(axes))) is None:
            problem = f"warm_start: chain continues the {stage} cell of the same axes, which is not in the matrix"
            self.mistakes.append(Mistake(f"stages.{cell.stage}.warm_start", problem, axes))
            return ""
        return f"cell:{cell_id}"

    def _shared(self, cell: Cell, stage: str) -> str:
        """Key of the naive, full, one-rank run of `stage` that every cell of this model starts from."""
        axes: dict[str, Any] = {
            "stage": stage,
            "model": cell.model,
            "strategy": "naive",
            "lora_rank": 0,
            "nodes": 1,
            "processes_per_node": 1,
        }
        settings = self._settings_of(axes, None, f"stages.{stage}")
        if settings is None:
            return ""
        self._check_vocabulary(axes, None, f"stages.{stage}", settings)
        warm_cell = Cell(**axes, settings=settings)
        if reason := impossible(warm_cell):
            self.mistakes.append(Mistake(f"stages.{stage}", f"the shared warm start of {cell.stage} cannot run: {reason}", axes))
            return ""
        starts = self._starts_of(warm_cell)
        key = f"{stage}-{file_slug(cell.model)}-{digest({'cell': identity(warm_cell), 'starts': starts})[:8]}"
        self.warm.setdefault(key, Warm(key=key, cell=warm_cell, starts=starts))
        return key

    def _blocks(self) -> tuple[Block, ...]:
        sets: dict[tuple[Any, ...], list[str]] = {}
        for cell_id, cell in self.cells.items():
            sets.setdefault((cell.stage, cell.model, cell.nodes, cell.processes_per_node), []).append(cell_id)
        saves = {start[5:] for starts in self.starts.values() for start in starts.values() if start.startswith("cell:")}
        block_of = {cell_id: key for key, cell_ids in sets.items() for cell_id in cell_ids}
        return tuple(
            self._block(key, trial, cell_ids, saves, block_of) for trial in range(self.suite.trials) for key, cell_ids in sets.items()
        )

    def _block(self, key: tuple[Any, ...], trial: int, cell_ids: list[str], saves: set[str], block_of: dict[str, Any]) -> Block:
        block_id = _block_id(key, trial)
        order = sorted(cell_ids)
        random.Random(f"{self.suite.suite}/{block_id}").shuffle(order)
        starts = {cell_id: self.starts[cell_id] for cell_id in order}
        before = {start[5:] for roles in starts.values() for start in roles.values() if start.startswith("cell:")}
        return Block(
            block_id=block_id, stage=key[0], trial=trial, nodes=key[2], processes_per_node=key[3], cells=tuple(order), starts=starts,
            after=tuple(sorted({_block_id(block_of[cell_id], trial) for cell_id in before})),
            saves=tuple(cell_id for cell_id in order if cell_id in saves),
            data=tuple(sorted({name for cell_id in order for name in cell_data(self.cells[cell_id])})),
        )  # fmt: skip


def _points(suite: Suite) -> Iterator[tuple[str, dict[str, Any], dict[str, Any] | None]]:
    """Yield (path in the file, axes, own settings or None) of every point that is not excluded."""
    product = itertools.product(*(getattr(suite.axes, axis) for axis in AXES))
    for values in product:
        axes = dict(zip(AXES, values, strict=True))
        if not any(matches(axes, pattern) for pattern in suite.exclude):
            yield "axes", axes, None
    for number, item in enumerate(suite.include):
        rest = {"lora_rank": 0, "nodes": 1, "processes_per_node": 1}
        axes = {axis: item.get(axis, rest.get(axis)) for axis in AXES}
        yield f"include[{number}]", axes, item.get("settings") or {}


def _axes_key(axes: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(axes[axis] for axis in AXES)


def _contradiction(stage: str, settings: Any) -> tuple[str, object] | None:
    """Settings that contradict each other whatever the axes: (problem, value seen)."""
    if stage in ("sft", "rm") and (settings.steps is None) == (settings.epochs is None):
        return "give exactly one of steps and epochs", {"steps": settings.steps, "epochs": settings.epochs}
    if settings.launcher == "fork" and settings.device != "cpu":
        return "launcher: fork is for device: cpu; use torchrun", {"launcher": settings.launcher, "device": settings.device}
    if stage == "ppo" and settings.prompts_per_iteration % settings.global_batch:
        return "prompts_per_iteration is a multiple of global_batch", settings.prompts_per_iteration
    if stage == "ppo" and (settings.ptx == "none") != (settings.ptx_coef == 0):
        return "ptx and ptx_coef go together: data and a share above 0, or none and 0", {"ptx": settings.ptx, "ptx_coef": settings.ptx_coef}
    return None


def impossible(cell: Cell) -> str | None:
    """Why `cell` can never run, or None."""
    settings, ranks = cell.settings, cell.data_parallel_size
    if cell.world_size % cell.model_parallel_size:
        return (
            f"{cell.world_size} ranks are no multiple of tensor_parallel x pipeline_parallel = "
            f"{settings.tensor_parallel} x {settings.pipeline_parallel} = {cell.model_parallel_size}"
        )
    if cell.step_batch % (settings.micro_batch * ranks):
        kind = "ranks" if cell.model_parallel_size == 1 else "data-parallel ranks"
        parallel = settings.micro_batch * ranks
        return f"global batch {cell.step_batch} is no multiple of micro_batch x {kind} = {settings.micro_batch} x {ranks} = {parallel}"
    if cell.stage == "ppo" and settings.prompts_per_iteration % ranks:
        return f"prompts_per_iteration {settings.prompts_per_iteration} is no multiple of {ranks} ranks"
    return all_strategies()[cell.strategy].unsupported(cell)


def cell_data(cell: Cell) -> tuple[str, ...]:
    """Names of the data that a cell reads."""
    ptx = getattr(cell.settings, "ptx", "none")
    return (cell.settings.data,) if ptx in ("none", cell.settings.data) else (cell.settings.data, ptx)


def _warm_data(warm: Warm) -> tuple[str, ...]:
    return cell_data(warm.cell) if warm.cell else tuple(warm.tokenizer["data"] if warm.tokenizer else ())


def _block_id(key: tuple[Any, ...], trial: int) -> str:
    stage, model, nodes, processes = key
    return f"{stage}-{file_slug(model)}-{nodes}x{processes}-trial{trial}"


def file_slug(name: str) -> str:
    """A model name as part of a file name; names that differ only in odd letters stay apart."""
    slug = "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in name).strip("-")
    return slug if slug == name else f"{slug[-40:]}-{digest(name)[:6]}"


# -- the plan as a file ---------------------------------------------------------------------------------------------


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan as it stands in plan.json and in `plan --format json`."""
    return {
        "schema": PLAN_SCHEMA,
        "suite": plan.suite,
        "trials": plan.trials,
        "cells": {cell_id: cell_to_json(cell) for cell_id, cell in plan.cells.items()},
        "blocks": [asdict(block) for block in plan.blocks],
        "warm": [{**asdict(warm), "cell": cell_to_json(warm.cell) if warm.cell else None} for warm in plan.warm],
        "skipped": [{"cell": cell_to_json(skipped.cell), "reason": skipped.reason} for skipped in plan.skipped],
        "data": list(plan.data),
        "limits": asdict(plan.limits),
    }


def save_plan(plan: Plan, path: Path) -> None:
    """Write the plan, atomically; an equal one is left alone."""
    content = plan_to_json(plan)
    if not _holds(path, content):
        write_json(content, path)


def _holds(path: Path, content: dict[str, Any]) -> bool:
    """Whether the file has this content; what cannot be read has not."""
    try:
        return bool(json.loads(path.read_bytes()) == json.loads(json.dumps(content)))
    except (OSError, ValueError, RecursionError):
        return False


def load_plan(path: Path) -> Plan:
    """Return the plan in `path`. Raises UserError if there is none, or if it does not fit together."""
    try:
        return _plan_from_file(_file_adapter.validate_json(path.read_bytes()))
    except OSError as error:
        raise UserError(f"{path}: no plan to be read: {error.strerror}; `coati-bench plan SUITE --write` makes it") from None
    except ValueError as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else error
        raise UserError(f"{path}: not a plan: {problem}; `coati-bench plan SUITE --write` makes it anew") from None


def read_cell(content: dict[str, Any]) -> Cell:
    """The cell with this flat form. Raises ValueError, of one line, if there is no such stage, strategy or setting here."""
    for axis, known in (("stage", tuple(SETTINGS)), ("strategy", tuple(all_strategies()))):
        if content.get(axis) not in known:
            raise ValueError(f"unknown {axis}; seen: {content.get(axis)!r:.200}; one of {', '.join(known)} would be right")
    try:
        return cell_from_json(content)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None


@with_config(STRICT)
@dataclass(frozen=True, slots=True, kw_only=True)
class _TokenizerInFile:
    """What a tokenizer is made of."""

    data: list[Name]
    vocabulary: Count


@with_config(STRICT)
@dataclass(frozen=True, slots=True, kw_only=True)
class _WarmInFile:
    """`Warm`, its cell flat."""

    key: Name
    tokenizer: _TokenizerInFile | None
    cell: dict[str, Any] | None
    starts: dict[str, str]


@with_config(STRICT)
@dataclass(frozen=True, slots=True, kw_only=True)
class _SkippedInFile:
    """`Skipped`, its cell flat."""

    cell: dict[str, Any]
    reason: str


@with_config(STRICT)
@dataclass(frozen=True, slots=True, kw_only=True)
class _PlanInFile:
    """plan.json, as far as its shape goes."""

    schema: Literal["coati-bench/plan/1"]
    suite: Name
    trials: Count
    cells: dict[str, dict[str, Any]]
    blocks: list[Block]
    warm: list[_WarmInFile]
    skipped: list[_SkippedInFile]
    data: list[Name]
    limits: Limits


_file_adapter = TypeAdapter(_PlanInFile)


def _plan_from_file(file: _PlanInFile) -> Plan:
    plan = Plan(
        suite=file.suite, trials=file.trials, cells={cell_id: _cell_at(f"cells.{cell_id}", cell) for cell_id, cell in file.cells.items()},
        blocks=tuple(file.blocks), warm=tuple(_warm_from_file(warm) for warm in file.warm),
        skipped=tuple(Skipped(cell=_cell_at(f"skipped.{i}", item.cell), reason=item.reason) for i, item in enumerate(file.skipped)),
        data=tuple(file.data), limits=file.limits,
    )  # fmt: skip
    if problem := next(_loose_ends(plan), None):
        raise ValueError(problem)
    return plan


def _warm_from_file(warm: _WarmInFile) -> Warm:
    cell = None if warm.cell is None else _cell_at(f"warm.{warm.key}", warm.cell)
    if (cell is None) == (warm.tokenizer is None):
        raise ValueError(f"at warm.{warm.key}: exactly one of tokenizer and cell would be right")
    return Warm(key=warm.key, tokenizer=asdict(warm.tokenizer) if warm.tokenizer else None, cell=cell, starts=warm.starts)


def _cell_at(place: str, content: dict[str, Any]) -> Cell:
    try:
        return read_cell(content)
    except ValueError as error:
        raise ValueError(f"at {place}: {error}") from None


def _loose_ends(plan: Plan) -> Iterator[str]:
    """Yield what is named in the plan and is not in it."""
    keys = {warm.key for warm in plan.warm}
    blocks = {block.block_id for block in plan.blocks}
    data = set(plan.data)
    for warm in plan.warm:
        yield from _absent(f"warm.{warm.key}.starts", warm.starts.values(), keys)
        yield from _absent(f"warm.{warm.key}", _warm_data(warm), data)
    for block in plan.blocks:
        place = f"blocks.{block.block_id}"
        yield from _absent(f"{place}.cells", block.cells, plan.cells)
        yield from _absent(f"{place}.starts", block.starts, block.cells)
        yield from _absent(f"{place}.saves", block.saves, block.cells)
        yield from _absent(f"{place}.after", block.after, blocks)
        yield from _absent(f"{place}.data", block.data, data)
        begun = [start for starts in block.starts.values() for start in starts.values() if not start.startswith("path:")]
        yield from _absent(f"{place}.starts", begun, {*keys, *(f"cell:{cell_id}" for cell_id in plan.cells)})


def _absent(place: str, names: Iterable[str], known: Container[str]) -> Iterator[str]:
    return (f"at {place}: {name!r:.200} is not in the plan" for name in names if name not in known)
