"""What the ruler makes of real trials: `python benchmarks/ruler.py [--device cuda --model bloom-560m --trials 7 --steps 60 --more 0.05]`.

Interleaved in a seeded order, each in a new process under the supervisor: trials of one cell (A), of the same cell again (A'), and with
matrix products planted after each step for a share of the step's own time (B). Shown are the coefficient of variation between trials,
each ratio to A, and the verdicts that `compare` would print: A' should be equal, B slower. On a busy machine neither need be:
then the verdict is inconclusive, and what the noise was is in the output. Nothing is claimed about strategies.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import statistics
import sys
import tempfile
from pathlib import Path

from bench.launch.command import Agents
from bench.launch.supervise import run_trial
from bench.record import Record
from bench.report.inventory import Row
from bench.report.metrics import METRICS, Trial, primary_metric
from bench.report.statistics import compare, verdicts

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.trials import tiny_cell, tiny_trial  # noqa: E402

PROGRAM = "tests.paced_rank"


def main() -> int:
    """Run the trials and print the verdicts; 0 if they are equal and slower, else 1."""
    options = parsed()
    batch = {"micro_batch": options.micro_batch, "global_batch": options.micro_batch, "sequence_length": 128}
    cell = tiny_cell(
        "sft", model=options.model, device=options.device, launcher="torchrun", precision=options.precision, steps=options.steps, **batch
    )
    planted = {"A": 0.0, "A'": 0.0, "B": options.more}
    speeds: dict[str, list[float]] = {name: [] for name in planted}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.trials):
            for name in random.Random(number).sample(list(planted), len(planted)):
                trial = tiny_trial(cell, Path(folder) / f"{name}-{number}", trial=number)
                data = [dataclasses.replace(item, facts={"more_work": planted[name]}) for item in trial.data]
                agents = Agents(program=PROGRAM, search_path=(str(ROOT),))
                record = run_trial(dataclasses.replace(trial, data=data), Path(folder) / f"{name}-{number}.json", agents=agents)
                speeds[name].append(speed(record))
                print(f"trial {number} {name}: {speeds[name][-1]:,.0f} loss tokens/s", flush=True)
    return show(speeds)


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="bloom-tiny")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--trials", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--more", type=float, default=0.05)
    return parser.parse_args()


def speed(record: Record) -> float:
    """The primary metric of a record that went well."""
    if record.outcome != "ok":
        raise SystemExit(f"a trial ended as {record.outcome}: {record.reason}")
    return METRICS[primary_metric(record.parsed_cell.stage)].compute(Trial(Row(record, record.parsed_cell, "")))


def show(speeds: dict[str, list[float]]) -> int:
    """Print what the statistics say; 0 if that is what was planted."""
    found = {}
    for name, values in speeds.items():
        cv = statistics.stdev(values) / statistics.fmean(values) if len(values) > 1 else math.nan
        print(f"{name}: median {statistics.median(values):,.0f} loss tokens/s, CV {cv:.2%} over {len(values)} trials")
        if name != "A":
            compared = compare([mine / other for mine, other in zip(values, speeds["A"], strict=True)])
            [found[name]] = verdicts([compared])
            interval = compared.interval
            around = f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
            print(f"   against A: {compared.middle:.4f}{around}, p = {compared.p_value:.4f}: {found[name]}")
    return 0 if found == {"A'": "equal", "B": "slower"} else 1


if __name__ == "__main__":
    sys.exit(main())
