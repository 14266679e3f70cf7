"""Records as trials leave them, computed and not measured: a small factory for the tests of the report."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from pathlib import Path
from typing import Any

from bench.cell import Cell, cell_from_json, cell_to_json, digest, fingerprint
from bench.matrix import Plan, Skipped
from bench.record import Input, Lap, Memory, Part, Record, save_record
from bench.report.inventory import Row
from bench.suite import Limits

GIB = 2**30
PHASES = {"rollout_prefill": 0.04, "rollout_decode": 0.38, "reward": 0.05, "reference": 0.05, "policy_logprob": 0.05, "value": 0.04,
          "advantage": 0.01, "policy_learn": 0.22, "critic_learn": 0.12}  # fmt: skip
SPEED = {"naive": 1.0, "ddp": 0.97, "zero1": 0.9, "zero2": 0.86, "zero2_cpu": 0.12, "gemini": 0.55, "gemini_cpu": 0.3, "hybrid": 0.93}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_cell(stage: str = "sft", strategy: str = "naive", **changes: Any) -> Cell:
    content: dict[str, Any] = {
        "stage": stage, "model": "bloom-tiny", "strategy": strategy, "precision": "fp32", "device": "cpu", "global_batch": 8,
        "micro_batch": 2, "lap_steps": 1 if stage == "ppo" else 5,
    }  # fmt: skip
    content |= {"iterations": 4} if stage == "ppo" else {"steps": 30}
    return cell_from_json(content | changes)


def loss_curve(cell: Cell, trial: int, noise: float) -> list[float]:
    draw, jitter = random.Random(f"{cell.stage}{cell.lora_rank}{trial}"), random.Random(f"{cell.cell_id}{trial}")  # noqa: S311
    steps = cell.settings.iterations * 2 if cell.stage == "ppo" else cell.settings.steps
    start, drop = {"sft": (8.3, 1.6), "rm": (0.6931, 0.25), "ppo": (0.02, 0.04)}[cell.stage]
    speed = 1.0 if cell.lora_rank == 0 else 0.3
    values = [start - drop * speed * (1 - math.exp(-step / 12)) + draw.uniform(-0.02, 0.02) * start for step in range(steps)]
    if cell.stage == "ppo":
        values = [0.01 * math.sin(step) + 0.002 for step in range(steps)]
    return [value * (1 + (noise * jitter.uniform(0.3, 1) if cell.strategy != "naive" else 0)) for value in values]


def make_laps(cell: Cell, rank: int, seconds: float) -> list[Lap]:
    settings, ranks = cell.settings, cell.world_size
    total = settings.iterations if cell.stage == "ppo" else settings.steps
    laps = []
    for first in range(0, total, settings.lap_steps):
        steps = min(settings.lap_steps, total - first)
        share = seconds * steps * (1.6 if first == 0 else 1.0) * (1 + 0.01 * rank)
        if cell.stage == "ppo":
            rollouts = settings.prompts_per_iteration // ranks * steps
            given, written = rollouts * settings.prompt_length, rollouts * settings.response_length
            counts = {"sequences": rollouts, "prompt_tokens": given, "response_tokens": written, "learned_tokens": written}
        else:
            rows = cell.step_batch // ranks * steps
            counts = {
                "sequences": rows * (2 if cell.stage == "rm" else 1),
                "loss_tokens": rows * 60,
                "tokens": rows * 90,
                "padded_tokens": rows * 120,
            }
        phases = {name: part * share for name, part in PHASES.items()} if cell.stage == "ppo" else {}
        if phases:
            phases["other"] = share - sum(phases.values())
        laps.append(Lap(first_step=first, steps=steps, seconds=share, counts=counts, phases=phases))
    return laps


def held_out(cell: Cell) -> dict[str, float]:
    moved = 1.0 if cell.lora_rank == 0 else 0.3
    if cell.stage == "sft":
        return {"loss_before": 8.31, "loss_after": 8.31 - 1.5 * moved}
    if cell.stage == "rm":
        return {"loss_before": 0.694, "loss_after": 0.694 - 0.2 * moved, "accuracy_before": 0.484, "accuracy_after": 0.484 + 0.4 * moved,
                "margin_before": 0.001, "margin_after": 0.001 + 0.9 * moved}  # fmt: skip
    return {"reward_before": -0.12, "reward_after": -0.12 + 0.3 * moved, "kl_before": 0.0, "kl_after": 0.02 * moved,
            "response_tokens_before": 64.0, "response_tokens_after": 64.0}  # fmt: skip


def make_series(cell: Cell, trial: int, noise: float) -> dict[str, list[float]]:
    loss = loss_curve(cell, trial, noise)
    series = {"loss": loss, "gradient_norm": [1.0 + 0.1 * i for i in range(len(loss))], "learning_rate": [1e-3] * len(loss)}
    if cell.stage == "rm":
        series |= {"accuracy": [min(1.0, 0.5 + 0.01 * i) for i in range(len(loss))], "margin": [0.02 * i for i in range(len(loss))]}
    if cell.stage == "ppo":
        total = cell.settings.iterations
        series |= {"value_loss": [0.5 / (i + 1) for i in range(len(loss))], "reward": [-0.12 + 0.07 * i for i in range(total)],
                   "kl": [0.004 * i for i in range(total)], "entropy": [8.0 - 0.1 * i for i in range(total)],
                   "first_ratio_error": [1e-7] * total, "rollout_logprob_error": [2e-7] * total}  # fmt: skip
    return series


def make_part(cell: Cell, rank: int, trial: int, *, seconds: float, noise: float, outcome: str = "ok", reason: str | None = None) -> Part:
    cuda = cell.settings.device == "cuda"
    share = 1.0 if cell.strategy in ("naive", "ddp") else 0.7
    memory = Memory(
        peak_allocated_bytes=int((4 + 0.1 * rank) * share * GIB) if cuda else None,
        peak_reserved_bytes=int(5 * share * GIB) if cuda else None,
        host_peak_bytes=int(1.2 * GIB) + rank,
        notes=[] if cuda else ["no torch allocator statistics on a CPU"],
    )
    facts = {
        "parameters": {"total": 599_000, "trainable": 599_000 if cell.lora_rank == 0 else 4096 * cell.lora_rank},
        "initial_weights_sha256": sha(f"{cell.stage} {cell.model} {cell.lora_rank} {trial}"),
        "optimizer": "HybridAdam" if cell.strategy.startswith("gemini") else "AdamW",
        "device_name": "NVIDIA H100 80GB HBM3" if cuda else "cpu",
    }
    return Part(
        rank=rank, local_rank=rank % cell.processes_per_node, node=rank // cell.processes_per_node, world_size=cell.world_size,
        hostname="node0", pid=1000 + rank, outcome=outcome, reason=reason, phase="done" if outcome == "ok" else "train",
        step=len(make_laps(cell, rank, seconds)), laps=make_laps(cell, rank, seconds), series=make_series(cell, trial, noise),
        held_out=held_out(cell) if outcome == "ok" else {}, memory=memory, facts=facts,
        seconds={"start": 1.0, "load": 2.0, "time_to_first_step": 4.5 + 0.1 * rank, "evaluate": 0.4, "save": 0.2},
    )  # fmt: skip


def provenance(cell: Cell) -> dict[str, Any]:
    return {
        "versions": {
            "python": "3.11.2",
            "torch": "2.13.0",
            "colossalai": "0.5.0",
            "a-long-name-that-nothing-breaks-on-a-phone-of-390-pixels": "1",
            "triton": None,
        },
        "source": {
            "commit": "0123abcd" * 5,
            "dirty_diff_sha256": None,
            "package_sha256": sha("package"),
            "locks": {"cpu.lock": sha("lock")},
        },
        "machines": [{"hostname": f"node{node}", "cpu": "a CPU", "cores": 2, "memory_bytes": 24 * GIB} for node in range(cell.nodes)],
        "command": ["/opt/venv/bin/coati-bench", "trial", f"/home/somebody/results/cells/{cell.cell_id}.json"],
        "environment": {"OMP_NUM_THREADS": "1"},
        "started": "2026-11-24T04:00:00.000Z",
        "ended": "2026-11-24T04:00:12.500Z",
    }


def make_record(
    cell: Cell, trial: int = 0, *, seconds: float | None = None, noise: float = 2e-7, outcome: str = "ok", reason: str | None = None,
    launcher: str | None = None, emulated: bool | None = None, ranks: range | None = None, **changes: Any
) -> Record:  # fmt: skip
    if seconds is None:
        seconds = 0.1 / SPEED.get(cell.strategy, 1.0)
    data = {cell.settings.data: sha(cell.settings.data)}
    starts = {"tokenizer": sha("tokenizer")} | {
        role: sha(role) for role in {"rm": ["policy"], "ppo": ["policy", "reward"]}.get(cell.stage, [])
    }
    facts = {"rows": 512, "bytes": 70_112, "licence": "Apache-2.0 (generated)", "source": "generated", "revision": "1"}
    parts = [
        make_part(cell, rank, trial, seconds=seconds, noise=noise, outcome=outcome, reason=reason)
        for rank in (range(cell.world_size) if ranks is None else ranks)
    ]
    record = Record(
        cell=cell_to_json(cell), cell_id=cell.cell_id, fingerprint=fingerprint(cell, data, starts), trial=trial, seed=42 + trial,
        launcher=launcher or cell.settings.launcher, simulated_nodes=False, outcome=outcome, reason=reason,
        emulated=cell.strategy not in ("naive", "ddp") and cell.settings.device == "cpu" if emulated is None else emulated,
        inputs=[Input(name=name, path=f"/data/{name}", sha256=value, facts=facts) for name, value in data.items()]
        + [Input(name=name, path=f"/starts/{name}", sha256=value, facts={"stage": "sft"}) for name, value in starts.items()],
        parts=parts,
        observed={"seconds": 12.5 + sum(lap.seconds for part in parts for lap in part.laps), "host_peak_bytes": int(1.5 * GIB)}
        | ({"device_memory_peak_bytes": {"GPU-0": int(6.5 * GIB)}} if cell.settings.device == "cuda" else {}),
        provenance=provenance(cell),
    )  # fmt: skip
    return dataclasses.replace(record, **changes)


def make_row(cell: Cell, trial: int = 0, **rest: Any) -> Row:
    return Row(make_record(cell, trial, **rest), cell, f"{cell.cell_id}/{trial}.json")


def write(folder: Path, *records: Record) -> Path:
    for record in records:
        save_record(record, folder / record.cell_id / f"{record.trial}.json")
    return folder


def quick_suite(launcher: str = "fork") -> list[Record]:
    """What an emulated quick start leaves: all stages, several strategies, LoRA off and on, one and two ranks."""
    records = []
    for stage in ("sft", "rm", "ppo"):
        for strategy in ("naive", "ddp", "zero2", "gemini"):
            for rank in (0, 8):
                for nodes in (1,) if strategy == "naive" else (1, 2):
                    precision = "bf16-master" if strategy == "gemini" else "fp32"
                    cell = make_cell(stage, strategy, lora_rank=rank, nodes=nodes, precision=precision, launcher=launcher)
                    records.append(make_record(cell, noise=3e-4 if precision != "fp32" else 2e-7, simulated_nodes=nodes > 1))
    return records


def measured_suite(trials: int = 1, model: str = "bloom-560m") -> list[Record]:
    """What a GPU leaves: one device, measured, with a failure of each kind in the last strategies."""
    records = []
    for stage in ("sft", "rm", "ppo"):
        for strategy in ("naive", "ddp", "zero2", "gemini", "zero2_cpu"):
            for rank in (0, 8):
                cell = make_cell(stage, strategy, lora_rank=rank, model=model, device="cuda", precision="bf16-master",
                                 **({"iterations": 8} if stage == "ppo" else {"steps": 100}))  # fmt: skip
                seconds = (20.0 if stage == "ppo" else 0.8) / SPEED[strategy]
                records += [make_record(cell, trial, seconds=seconds * (1 + 0.004 * trial), noise=2e-4) for trial in range(trials)]
    return records


def failures() -> list[Record]:
    """One record of every outcome that is not ok."""
    reasons = {
        "diverged": "rank 0, train, step 7: the loss is not finite",
        "oom": "rank 0, train, step 0: CUDA out of memory; requested 2147483648 bytes",
        "timeout": "no end after 3600 s; rank 1 last beat in train at step 12",
        "busy": "no idle device within 600 s",
        "cancelled": "interrupted (SIGINT)",
        "invalid": "evidence refuted: gradients are not sharded (8.0 MiB, expected 4.0 MiB)",
        "error": "rank 1 exited with 1 in load\nTraceback:\n  File \"/opt/app/train.py\", line 3, in build\nKeyError: 'lm_head.weight'",
    }
    cells = {outcome: make_cell("sft", "hybrid", lora_rank=2 + i, device="cuda", model="bloom-560m") for i, outcome in enumerate(reasons)}
    return [make_record(cells[outcome], outcome=outcome, reason=reason, ranks=range(1)) for outcome, reason in reasons.items()]


def make_plan(records: list[Record], *, trials: int = 1, extra: tuple[Cell, ...] = (), skipped: tuple[tuple[Cell, str], ...] = ()) -> Plan:
    cells = {record.cell_id: record.parsed_cell for record in records} | {cell.cell_id: cell for cell in extra}
    return Plan(
        suite="quickstart", trials=trials, cells=cells, blocks=(), warm=(), data=("synthetic-instruct",), limits=Limits(),
        skipped=tuple(Skipped(cell=cell, reason=reason) for cell, reason in skipped),
    )  # fmt: skip


def content_of(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every file in a folder."""
    return {path.name: digest(path.read_bytes().hex()) for path in sorted(folder.iterdir())}
