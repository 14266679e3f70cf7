"""Parity of losses with `naive`: the gate in front of every ranking. Rules: docs/metrics.md, "Parity".

A strategy computes the same as `naive` or it is struck: shown with the reason, never ranked. Where `naive` cannot run, strategies are held
to each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from bench.cell import Cell, canonical_json, cell_to_json
from bench.record import Record
from bench.report.inventory import BASELINE, Row

FP32_FIRST, FP32_CURVE = 1e-5, 1e-4
HALF_FIRST, HALF_CURVE, HALF_PEERS = 2e-2, 5e-2, 1e-3
HALF_STEPS = 10
"""Steps whose mean loss is compared in 16 bits: rounding is amplified from step to step, their mean is not moved by it much."""
NOTHING_TRAINED = "no token carried loss, so nothing was trained"
PPO_SCALE = 1.0
"""The policy's loss begins near 0 (whitened advantages), so deviations of PPO are relative to at least the advantages' own scale."""
PPO_FIRST = {"reward": PPO_SCALE, "value_loss": 0.0, "gradient_norm": 0.0, "critic_gradient_norm": 0.0}
"""What else the first iteration of PPO must share, each with the least scale of its deviation.

Beside the ptx loss the policy's own is next to nothing, and the critic's is no part of it."""
PPO_FIRST_FP32, PPO_FIRST_HALF = 1e-3, 0.1
"""How far: in 16 bits a token that rounding flips moves a short rollout's figures (8 % seen, of a critic's gradient norm)."""
SAME_SPEED = ("global_batch", "scaling", "tensor_parallel", "pipeline_parallel")
"""Settings that a partner may have otherwise; the batch of a whole step stands for the first ones."""
SAME_LOSS = (*SAME_SPEED, "precision", "launcher", "micro_batch", "lap_steps", "activation_checkpointing", "optimizer")
"""Settings that a parity partner may have otherwise; every optimizer is AdamW, in another implementation."""
ROLES = ("tokenizer", "policy", "reward")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Verdict on one trial's losses."""

    state: str
    """`reference` (naive itself), `agrees`, `struck`, `no partner`; `peers agree` where others stand in for naive."""
    reason: str = ""
    first: float | None = None
    """Relative deviation of the first loss from the partner's; of `peers agree` the largest from those that agree, of the curve too."""
    curve: float | None = None
    """fp32: largest relative deviation over the compared steps; 16 bits: relative deviation of their mean."""
    steps: int = 0
    """How many steps were compared."""
    partner: str | None = None
    """File of the partner's record."""
    partner_precision: str | None = None
    single: bool = False
    """Whether both ran in fp32, so that the tight tolerances hold."""

    @property
    def largest(self) -> float | None:
        """The larger of the two deviations that are held against a tolerance."""
        return None if self.curve is None else max(self.first or 0.0, self.curve)

    @property
    def text(self) -> str:
        """One line."""
        return f"{self.state}: {self.reason}" if self.reason else self.state


def comparison_key(cell: Cell, free: Sequence[str] = SAME_SPEED) -> str:
    """What a cell shares with its `naive` partner, as a text that can be compared."""
    return canonical_json(compared(cell, free))


def compared(cell: Cell, free: Sequence[str] = SAME_SPEED) -> dict[str, Any]:
    """Stage, model, LoRA rank, step batch and all settings but `free`: what partners share."""
    content = {key: value for key, value in cell_to_json(cell).items() if key not in (*free, "strategy", "nodes", "processes_per_node")}
    if "prompts_per_iteration" in content:
        content["prompts_per_iteration"] *= cell.step_batch // cell.settings.global_batch
    return {**content, "step_batch": cell.step_batch}


def precision_of(row: Row) -> str:
    """The precision in force: what the ranks say, else what the cell asks for."""
    return str(_fact(row.record, "precision") or row.cell.settings.precision)


def _parity_key(row: Row) -> tuple[str, int, str]:
    data = sorted((item.name, item.sha256) for item in row.record.inputs if item.name not in ROLES)
    return comparison_key(row.cell, SAME_LOSS), row.record.seed, canonical_json(data)


def trained_nothing(record: Record) -> bool:
    """Whether no rank ever saw a token (PPO: of a response) that carries loss: equal losses of 0 agree about nothing."""
    laps = [lap for part in record.parts for lap in part.laps]
    counts = [lap.counts[unit] for lap in laps for unit in ("loss_tokens", "learned_tokens") if unit in lap.counts]
    return bool(counts) and sum(counts) == 0


def losses(record: Record) -> list[float]:
    """The job's loss of each step; empty if it left none."""
    return record.lead.series.get("loss", []) if record.lead else []


def judge(rows: Iterable[Row]) -> dict[str, Parity]:
    """The verdict on every record that has losses, by file."""
    groups: dict[tuple[str, int, str], list[Row]] = defaultdict(list)
    for row in rows:
        if losses(row.record) and row.record.outcome == "ok":
            groups[_parity_key(row)].append(row)
    found: dict[str, Parity] = {}
    for members in groups.values():
        baselines = [row for row in members if row.cell.strategy == BASELINE]
        verdicts = {row.file: _against_naive(row, baselines) for row in members}
        found |= _without_naive(members, _against_peers(members, verdicts))
    return found


# -- against naive -----------------------------------------------------------------------------------------------


def _against_naive(row: Row, baselines: Sequence[Row]) -> Parity:
    if trained_nothing(row.record):
        return Parity(state="struck", reason=NOTHING_TRAINED)
    if row.cell.strategy == BASELINE:
        return Parity(state="reference")
    precision = precision_of(row)
    same = [item for item in baselines if precision_of(item) == precision]
    full = [item for item in baselines if precision_of(item) == "fp32"]
    partners = same or full
    if not partners:
        return Parity(
            state="no partner", reason=f"no ok trial of naive with this seed in {' or '.join(dict.fromkeys((precision, 'fp32')))}"
        )
    return _compare(row, min(partners, key=lambda item: item.cell.settings.optimizer != row.cell.settings.optimizer), HALF_FIRST)


def _compare(row: Row, partner: Row, half_first: float) -> Parity:
    """`half_first`: by how much the first losses may differ in 16 bits."""
    whose = f"{partner.cell.strategy}'s"
    known: dict[str, Any] = {"partner": partner.file, "partner_precision": precision_of(partner)}
    other = _other_start(row.record, partner.record)
    if other:
        chained = row.cell.settings.warm_start == "chain"
        why = "a chain continues each cell's own weights" if chained else "the runs began from different warm starts"
        return Parity(state="no partner", reason=f"other {other} than {whose}: {why}", **known)
    hashes = [_fact(item.record, "initial_weights_sha256") for item in (row, partner)]
    if None not in hashes and hashes[0] != hashes[1]:
        return Parity(state="struck", reason=f"initial weights differ from {whose} (sha256)", **known)
    return _compare_curves(row, partner, half_first, known)


def _other_start(record: Record, partner: Record) -> str | None:
    mine, theirs = ({item.name: item.sha256 for item in it.inputs if item.name in ROLES} for it in (record, partner))
    return next((role for role in ROLES if mine.get(role) != theirs.get(role)), None)


def _fact(record: Record, name: str) -> Any:
    return record.lead.facts.get(name) if record.lead else None


def _compare_curves(row: Row, partner: Row, half_first: float, known: dict[str, Any]) -> Parity:
    mine, theirs = losses(row.record), losses(partner.record)
    single = precision_of(row) == precision_of(partner) == "fp32"
    first_allowed, curve_allowed = (FP32_FIRST, FP32_CURVE) if single else (half_first, HALF_CURVE)
    steps = compared_steps(row.cell.stage, row.record, exact=single)
    gaps = deviations(mine[:steps], theirs[:steps], row.cell.stage)
    means = deviations([fmean(mine[:steps])], [fmean(theirs[:steps])], row.cell.stage)
    result = Parity(state="agrees", first=gaps[0], curve=max(gaps if single else means), steps=len(gaps), single=single, **known)
    if len(mine) != len(theirs):
        return replace(result, state="struck", reason=f"{len(mine)} steps against {partner.cell.strategy}'s {len(theirs)}")
    if gaps[0] > first_allowed:
        return replace(result, state="struck", reason=f"first loss deviates by {gaps[0]:.1e}; allowed {first_allowed:.0e}")
    if result.curve is not None and result.curve > curve_allowed:
        where = (
            f"curve deviates by {max(gaps):.1e} at step {gaps.index(max(gaps))}"
            if single
            else f"mean of {steps} steps deviates by {means[0]:.1e}"
        )
        return replace(result, state="struck", reason=f"{where}; allowed {curve_allowed:.0e}")
    if other := next((text for text, gap, allowed in first_of_ppo(row, partner) if gap > allowed), None):
        return replace(result, state="struck", reason=other)
    return result


def first_of_ppo(row: Row, partner: Row) -> list[tuple[str, float, float]]:
    """Of both trials' first iteration of PPO, each figure that both have: in words, its relative deviation, and how much is allowed."""
    if row.cell.stage != "ppo" or row.record.lead is None or partner.record.lead is None:
        return []
    allowed = PPO_FIRST_FP32 if precision_of(row) == precision_of(partner) == "fp32" else PPO_FIRST_HALF
    mine, theirs = row.record.lead.series, partner.record.lead.series
    found = []
    for name, least in PPO_FIRST.items():
        if mine.get(name) and theirs.get(name):
            gap = abs(mine[name][0] - theirs[name][0]) / max(abs(theirs[name][0]), least, 1e-12)
            found.append((f"first {name.replace('_', ' ')} deviates by {gap:.1e}; allowed {allowed:.0e}", gap, allowed))
    return found


def compared_steps(stage: str, record: Record, *, exact: bool) -> int:
    """Steps of the curve that parity compares.

    PPO: those of the first iteration, since later ones learn from sampled tokens, of which rounding may flip one. 16 bits: a short curve.
    """
    total = len(losses(record))
    if stage == "ppo" and record.lead and record.lead.series.get("reward"):
        total = max(1, total // len(record.lead.series["reward"]))
    return total if exact else min(total, HALF_STEPS)


def deviations(values: Sequence[float], reference: Sequence[float], stage: str) -> list[float]:
    """Relative deviation of each step.

    >>> deviations([2.0, 1.1], [2.0, 1.0], "sft")[0]
    0.0
    """
    least = PPO_SCALE if stage == "ppo" else 1e-12
    return [abs(a - b) / max(abs(b), least) for a, b in zip(values, reference, strict=False)]


# -- against each other ------------------------------------------------------------------------------------------


def _against_peers(members: Sequence[Row], verdicts: dict[str, Parity]) -> dict[str, Parity]:
    """Strike what disagrees with most other strategies of the same 16-bit mode; two that disagree are both struck."""
    result = dict(verdicts)
    for row in members:
        if row.cell.strategy == BASELINE or precision_of(row) == "fp32" or verdicts[row.file].state != "agrees":
            continue
        peers = [it for it in members if _is_peer(row, it) and verdicts[it.file].state == "agrees"]
        gaps = [deviations(losses(row.record)[:1], losses(it.record)[:1], row.cell.stage)[0] for it in peers]
        apart = [it.cell.strategy for it, gap in zip(peers, gaps, strict=True) if gap > HALF_PEERS]
        if len(apart) * 2 > len(peers):
            reason = (
                f"first loss is up to {max(gaps):.1e} from {', '.join(sorted(set(apart)))} in the same precision; allowed {HALF_PEERS:.0e}"
            )
            result[row.file] = replace(verdicts[row.file], state="struck", reason=reason)
    return result


def _without_naive(members: Sequence[Row], verdicts: dict[str, Parity]) -> dict[str, Parity]:
    """A model that one rank cannot train has no `naive`: its strategies are held to each other. What most of them contradict is struck."""
    alone = [row for row in members if verdicts[row.file].state == "no partner" and verdicts[row.file].partner is None]
    return verdicts | {row.file: _among_peers(row, alone, verdicts[row.file]) for row in alone}


def _among_peers(row: Row, alone: Sequence[Row], verdict: Parity) -> Parity:
    found = [_compare(row, other, HALF_PEERS) for other in alone if _is_peer(row, other)]
    found = [item for item in found if item.state != "no partner"]
    if not found:
        return verdict
    apart = [item for item in found if item.state == "struck"]
    if len(apart) * 2 > len(found):
        who = "the only other strategy" if len(found) == 1 else f"{len(apart)} of {len(found)} other strategies' trials"
        return replace(verdict, state="struck", reason=f"no naive to compare with, and other losses than {who}: {apart[0].reason}")
    near = [item for item in found if item.state == "agrees"]
    first, curve = max(item.first or 0.0 for item in near), max(item.curve or 0.0 for item in near)
    return replace(verdict, state="peers agree", first=first, curve=curve, steps=near[0].steps, single=near[0].single)


def _is_peer(row: Row, other: Row) -> bool:
    strategies = {BASELINE, row.cell.strategy}
    return other.cell.strategy not in strategies and precision_of(other) == precision_of(row)
