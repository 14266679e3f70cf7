"""What a plan will take, judged by earlier trials on the same kind of device. Torch-free.

The seconds of a trial are those that its supervisor saw, start and evaluation included: the median over earlier ok trials of
the same cell; else those of the nearest cell, with the measured loop scaled by the work in it; else unknown, with a reason.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.cell import Cell, cell_to_json, identity
from bench.matrix import Plan
from bench.report.past_trials import Past
from bench.report.text import counted

JOULES_PER_KWH = 3.6e6
WORK = ("steps", "epochs", "iterations", "prompts_per_iteration", "global_batch", "sequence_length", "prompt_length", "response_length")
"""Settings that the seconds of the loop are scaled by, so that they tell no cells apart."""
NO_MATTER = (*WORK, "base_seed", "lap_steps", "held_out_rows", "learning_rate", "schedule", "warmup_share", "kl_coef", "save_every")
SAME = ("stage", "model", "nodes", "processes_per_node", "device", "launcher")
"""What an earlier cell must share to say anything."""
MOST_REASONS = 4
"""Reasons that are printed; the JSON form has all."""
KINDS = ("the same cell", "the nearest cell", "unknown")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one trial of a planned cell will take."""

    cell: Cell
    trials: int
    kind: str
    """`the same cell`, `the nearest cell` or `unknown`."""
    seconds: float | None = None
    joules: float | None = None

    @property
    def device_seconds(self) -> float:
        """Seconds of all its trials times devices; 0 where unknown."""
        return (self.seconds or 0.0) * self.trials * self.cell.world_size


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCost:
    """What the plan takes on one kind of device."""

    device: str
    estimates: tuple[Estimate, ...]

    @property
    def device_hours(self) -> float:
        """Hours times devices of all trials that are known."""
        return sum(item.device_seconds for item in self.estimates) / 3600

    @property
    def hours(self) -> float:
        """Hours if one trial runs after another."""
        return sum((item.seconds or 0.0) * item.trials for item in self.estimates) / 3600

    @property
    def joules(self) -> float | None:
        """Energy of the trials of which it is known; None where it is of none."""
        known = [item.joules * item.trials for item in self.estimates if item.joules is not None]
        return sum(known) if known else None

    def trials(self, *kinds: str) -> int:
        """How many trials are known in one of these ways (all kinds if none is named)."""
        return sum(item.trials for item in self.estimates if not kinds or item.kind in kinds)

    @property
    def unknown(self) -> dict[str, int]:
        """Why trials are unknown, and how many."""
        found: Counter[str] = Counter()
        for item in self.estimates:
            if item.kind == "unknown":
                found[_why_unknown(item.cell)] += item.trials
        return dict(found)


def planned_costs(plan: Plan, pasts: Iterable[Past]) -> tuple[PlannedCost, ...]:
    """The cost on each kind of device that there are earlier trials of, that with most known trials first."""
    groups: dict[str, list[Past]] = defaultdict(list)
    for past in pasts:
        groups[past.device].append(past)
    found = [PlannedCost(device=device, estimates=tuple(_estimates(plan, group))) for device, group in groups.items()]
    known = [cost for cost in found if cost.trials() > cost.trials("unknown")]
    return tuple(sorted(known, key=lambda cost: (cost.trials("unknown"), cost.device)))


def cost_lines(plan: Plan, costs: Sequence[PlannedCost], price: float | None = None) -> list[str]:
    """The costs in words, with money if a device-hour has a price."""
    if not costs:
        what = sorted({f"{cell.stage} of {cell.model}" for cell in plan.cells.values()})
        more = f" and {len(what) - 3} more" if len(what) > 3 else ""
        where = "on these ranks in results/references or this suite's results"
        return [f"Cost: unknown; no earlier ok trial of {', '.join(what[:3])}{more} {where}."]
    return [line for cost in costs for line in _lines(cost, price)]


def _lines(cost: PlannedCost, price: float | None) -> Iterator[str]:
    unit = "device-hours" if any(item.cell.settings.device == "cuda" for item in cost.estimates) else "rank-hours"
    total, parts = cost.trials(), [f"{cost.device_hours:.2f} {unit} ({cost.hours:.2f} h one trial after another)"]
    if cost.joules is not None:
        known = sum(item.trials for item in cost.estimates if item.joules is not None)
        parts.append(f"{cost.joules / JOULES_PER_KWH:.3f} kWh{'' if known == total else f' for {known} of the trials'}")
    if price is not None:
        parts.append(f"{cost.device_hours * price:.2f} at {price:g} each")
    ways = ", ".join(f"{count} by {kind}" for kind in KINDS[:2] if (count := cost.trials(kind)))
    yield f"Cost on {cost.device}: {', '.join(parts)}; {counted(total, 'trial')}: {ways} in earlier records."
    for reason, count in list(cost.unknown.items())[:MOST_REASONS]:
        yield f"  not in it: {counted(count, 'trial')}; {reason}"
    if rest := list(cost.unknown.values())[MOST_REASONS:]:
        yield f"  not in it: {counted(sum(rest), 'trial')} for {len(rest)} more reasons of that kind"


def costs_to_json(costs: Iterable[PlannedCost], price: float | None = None) -> list[dict[str, Any]]:
    """The costs for programs; seconds, joules and how they are known by cell."""
    return [
        {
            "device": cost.device, "device_hours": cost.device_hours, "hours": cost.hours, "energy_joules": cost.joules,
            "price": None if price is None else cost.device_hours * price, "trials": {kind: cost.trials(kind) for kind in KINDS},
            "unknown": cost.unknown,
            "cells": {item.cell.cell_id: _estimate_to_json(item) for item in cost.estimates},
        }
        for cost in costs
    ]  # fmt: skip


def _estimate_to_json(item: Estimate) -> dict[str, Any]:
    return {"trials": item.trials, "by": item.kind, "seconds": item.seconds, "joules": item.joules}


# -- planned trials ----------------------------------------------------------------------------------------------


def _estimates(plan: Plan, pasts: Sequence[Past]) -> Iterator[Estimate]:
    groups: dict[tuple[Any, ...], dict[frozenset[tuple[str, str]], list[Past]]] = defaultdict(lambda: defaultdict(list))
    for past in pasts:
        groups[_same(past.cell)][_content(past.cell)].append(past)
    planned = [(cell, plan.trials) for cell in plan.cells.values()] + [(warm.cell, 1) for warm in plan.warm if warm.cell]
    for cell, trials in planned:
        yield _estimate(cell, trials, groups.get(_same(cell), {}))


def _same(cell: Cell) -> tuple[Any, ...]:
    content = cell_to_json(cell)
    return (*(content[name] for name in SAME), content.get("steps") is None)


def _estimate(cell: Cell, trials: int, pasts: Mapping[frozenset[tuple[str, str]], list[Past]]) -> Estimate:
    """From the cells with the fewest other settings, and of these those with the nearest work."""
    if not pasts:
        return Estimate(cell=cell, trials=trials, kind="unknown")
    content = _content(cell)
    apart = {key: len(key ^ content) for key in pasts}
    least = min(apart.values())
    near = [past for key, found in pasts.items() if apart[key] == least for past in found]
    if same := [past for past in near if past.cell == cell]:
        return _from(same, cell, trials, KINDS[0])
    gaps = [abs(_work(past.cell) / _work(cell) - 1) for past in near]
    return _from([past for past, gap in zip(near, gaps, strict=True) if gap == min(gaps)], cell, trials, KINDS[1])


def _from(pasts: Sequence[Past], cell: Cell, trials: int, kind: str) -> Estimate:
    ratios = [_work(cell) / _work(past.cell) for past in pasts]
    seconds = [past.seconds + past.loop_seconds * (ratio - 1) for past, ratio in zip(pasts, ratios, strict=True)]
    known = [past.joules * new / past.seconds for past, new in zip(pasts, seconds, strict=True) if past.joules is not None]
    return Estimate(cell=cell, trials=trials, kind=kind, seconds=median(seconds), joules=median(known) if known else None)


def _content(cell: Cell) -> frozenset[tuple[str, str]]:
    """What tells the cell from others, without the work in it and what costs no time."""
    return frozenset((name, str(value)) for name, value in identity(cell).items() if name not in NO_MATTER)


def _work(cell: Cell) -> float:
    """Tokens of the whole loop, padding included, up to a constant factor that cells of one stage share."""
    settings = cell.settings
    if cell.stage == "ppo":
        tokens = settings.prompt_length + settings.response_length
        return float(settings.iterations * settings.prompts_per_iteration * cell.step_batch / settings.global_batch * tokens)
    if settings.steps is None:
        return float(settings.epochs * settings.sequence_length)
    return float(settings.steps * cell.step_batch * settings.sequence_length)


def _why_unknown(cell: Cell) -> str:
    shape = f"{cell.nodes} x {cell.processes_per_node}"
    return f"no earlier ok trial of {cell.stage}, {cell.model}, {shape} by {cell.settings.launcher} on this device"
