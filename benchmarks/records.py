"""How long reports and comparisons of many records take, and how much memory: `python benchmarks/records.py [RECORDS ...]`.

Records of 100 laps are written into a temporary folder, ten trials a cell, strategies against naive. `report` reads all of them;
`compare` reads half of them against as many that are 2 % slower. Each runs in a process of its own; on a busy machine the
processor seconds say more than those of the clock. For the first size it is also shown where the time goes: functions of this
package with the share of the time that passes in them and below (profiled).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bench.cell import Cell, cell_from_json, cell_to_json, fingerprint
from bench.record import Input, Lap, Memory, Part, Record

SIZES = (1_000, 3_000, 10_000)
TRIALS, LAPS, LAP_STEPS = 10, 100, 5
STRATEGIES = ("naive", "ddp", "zero1", "zero2", "gemini")
PROGRAM = """
import json, resource, sys, time
from pathlib import Path
start = time.perf_counter()
{work}
seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))
"""
REPORT = """
from bench.report.commands import report
paths = report(Path(sys.argv[1]), Path(sys.argv[3]))
assert len(paths.csv.read_text().splitlines()) == 1 + len(list(Path(sys.argv[1]).rglob("records/*/*.json"))), "a record was not read"
"""
COMPARE = """
import contextlib, io
from bench.report.compare import compare
with contextlib.redirect_stdout(io.StringIO()):
    compare(Path(sys.argv[1]), Path(sys.argv[2]))
"""
PROFILE = """
import cProfile, contextlib, io, pstats, sys
from pathlib import Path
profile = cProfile.Profile()
with profile:
{work}
rows = [(total, own, place) for place, (_, _, own, total, _) in pstats.Stats(profile).stats.items()]
whole = max(total for total, _, _ in rows)
ours = [(total, f"{{Path(place[0]).name}}:{{place[2]}}") for total, _, place in rows if "/bench/" in place[0]]
print(", ".join(f"{{name}} {{total / whole:.0%}}" for total, name in sorted(ours, reverse=True)[:14]))
"""


def cells(count: int) -> list[Cell]:
    """So many cells in families of five strategies."""
    content = {"stage": "sft", "model": "bloom-560m", "precision": "bf16-master", "steps": LAPS * LAP_STEPS, "lap_steps": LAP_STEPS}
    pairs = ((strategy, rank) for rank in range(count) for strategy in STRATEGIES)
    return [
        cell_from_json({**content, "strategy": strategy, "lora_rank": rank})
        for (strategy, rank), _ in zip(pairs, range(count), strict=False)
    ]


def a_record(cell: Cell, trial: int) -> dict[str, Any]:
    """The content of a record as a GPU would leave it, a second a lap; equal losses for all strategies of a seed."""
    draw, steps = random.Random(trial), range(LAPS * LAP_STEPS)
    counts = {"sequences": 40, "loss_tokens": 12_000, "tokens": 18_000, "padded_tokens": 20_480}
    losses = [8 - step * 0.004 + draw.gauss(0, 0.01) for step in steps]
    data = Input(name=cell.settings.data, path="/data/x.json", sha256="b" * 64, facts={"rows": 500})
    part = Part(
        rank=0, local_rank=0, node=0, world_size=1, hostname="node0", pid=1, outcome="ok", phase="done", step=len(steps),
        laps=[Lap(first_step=k * LAP_STEPS, steps=LAP_STEPS, seconds=draw.gauss(1, 0.01), counts=counts) for k in range(LAPS)],
        series={"loss": losses, "gradient_norm": [1.0 + loss for loss in losses], "learning_rate": [1e-5 * loss for loss in losses]},
        held_out={"loss_before": 8.0, "loss_after": 6.0}, seconds={"start": 1.0, "time_to_first_step": 5.0},
        memory=Memory(peak_allocated_bytes=9 << 30, peak_reserved_bytes=10 << 30, host_peak_bytes=3 << 30),
        facts={"initial_weights_sha256": "a" * 64, "device_name": "NVIDIA H100 80GB HBM3"},
    )  # fmt: skip
    record = Record(
        cell=cell_to_json(cell), cell_id=cell.cell_id, fingerprint=fingerprint(cell, {data.name: data.sha256}, {}), trial=trial,
        seed=42 + trial, launcher="torchrun", emulated=False, simulated_nodes=False, outcome="ok", inputs=[data], parts=[part],
        observed={"seconds": 300.0, "device_memory_peak_bytes": {"GPU-0": 12 << 30}},
        provenance={"versions": {"python": "3.11", "torch": "2.11.0"}, "source": {"commit": "0" * 40, "locks": {"cuda.lock": "c" * 64}}},
    )  # fmt: skip
    return dict(TypeAdapter(Record).dump_python(record, mode="json"))


def write_set(folder: Path, records: int, factor: float) -> None:
    """`records` records below `folder`/records; times with 1 % noise. One is made for each seed, the others are changed copies."""
    made: dict[int, dict[str, Any]] = {}
    for cell in cells(records // TRIALS):
        (folder / "records" / cell.cell_id).mkdir(parents=True)
        for trial in range(TRIALS):
            content = made.setdefault(trial, a_record(cell, trial)) if trial not in made else made[trial]
            noise = random.Random(f"{cell.cell_id}{trial}{factor}").gauss(1, 0.01)
            seconds = factor * (1 + 0.1 * STRATEGIES.index(cell.strategy)) * noise
            part = content["parts"][0]
            laps = [{**lap, "seconds": lap["seconds"] * seconds} for lap in part["laps"]]
            changed = {**content, "cell": cell_to_json(cell), "cell_id": cell.cell_id, "parts": [{**part, "laps": laps}]}
            (folder / "records" / cell.cell_id / f"{trial}.json").write_text(json.dumps(changed), encoding="utf-8")


def run(program: str, folder: Path) -> str:
    """What `program` prints, given the folders of both sets and one for output."""
    command = [sys.executable, "-c", program, *(str(folder / name) for name in ("baseline", "candidate", "out"))]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def measure(work: str, folder: Path) -> tuple[float, float, float]:
    """(seconds with imports, processor seconds, peak memory in bytes) of one fresh process."""
    seconds, processor, memory = json.loads(run(PROGRAM.format(work=work), folder))
    return seconds, processor, memory


def profiled(work: str, folder: Path) -> str:
    """The functions of ours in which most of the time passes, what they call included."""
    indented: Any = "\n".join(f"    {line}" for line in work.strip().splitlines())
    return run(PROFILE.format(work=indented), folder).strip()


def measured_row(size: int, verb: str, work: str, folder: Path) -> str:
    """A line of the table."""
    seconds, processor, memory = measure(work, folder)
    each = f"{1000 * processor / size:>12.2f} {memory / 1e3 / size:>12.1f}"
    return f"{size:>8} {verb:>8} {seconds:>8.1f} {processor:>8.1f} {memory / 1e6:>6.0f} {each}"


def main(sizes: list[int]) -> None:
    """Print the table, and after the first size where the time goes."""
    print(f"{'records':>8} {'verb':>8} {'seconds':>8} {'CPU s':>8} {'MB':>6} {'ms a record':>12} {'kB a record':>12}")
    for size in sizes:
        with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as halves:
            write_set(Path(whole) / "baseline", size, 1.0)
            for name, factor in (("baseline", 1.0), ("candidate", 1.02)):
                write_set(Path(halves) / name, size // 2, factor)
            for verb, work, folder in (("report", REPORT, Path(whole)), ("compare", COMPARE, Path(halves))):
                print(measured_row(size, verb, work, folder), flush=True)
                if size == sizes[0]:
                    print(f"    {profiled(work, folder)}", flush=True)


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or list(SIZES))
