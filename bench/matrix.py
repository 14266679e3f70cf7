"""From a suite to a plan: cells, blocks, warm starts, and what is skipped with its reason. Torch-free."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bench.cell import AXES, SETTINGS, Cell, Settings, cell_from_json, cell_to_json, digest, identity, validate_settings
from bench.errors import Mistake, SuiteError
from bench.models.presets import model_problem
from bench.data.sources import data_problem
from bench.record import write_json
from bench.stages.base import SPECS
from bench.strategies.base import all_strategies
from bench.suite import Known, Limits, Suite, matches, read_suite, set_of_mistakes, settings_for

PLAN_SCHEMA = "coati-bench/plan/1"


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
    """Cell id -> role -> what it begins from: a warm start's key, or `cell:<cell id>` for that cell's weights of the same trial."""
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
