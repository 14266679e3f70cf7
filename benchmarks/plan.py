"""How long planning takes and how much memory, for growing suites: `python benchmarks/plan.py [CELLS ...]`.

Each size runs in a process of its own, three times, sizes interleaved; the medians are printed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = (1_000, 2_000, 5_000, 10_000)
PROGRAM = """
import json, resource, sys, time
from pathlib import Path
start = time.perf_counter()
from bench.matrix import make_plan, save_plan
plan = make_plan(Path(sys.argv[1]))
save_plan(plan, Path(sys.argv[1]).with_suffix(".json"))
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([len(plan.cells), time.perf_counter() - start, memory * 1024, "torch" in sys.modules]))
"""


def suite_text(cells: int) -> str:
    """A suite of so many cells, a multiple of 40: ddp and zero2 over LoRA ranks and 20 node counts."""
    ranks, nodes = list(range(cells // 40)), list(range(1, 21))
    return (
        f"suite: big\naxes: {{stage: [sft], model: [bloom-tiny], strategy: [ddp, zero2], lora_rank: {ranks}, nodes: {nodes}}}\n"
        "settings: {device: cpu, launcher: fork, scaling: weak}\nstages: {sft: {steps: 10}}\n"
    )


def measure(cells: int, folder: Path) -> tuple[int, float, int, bool]:
    """(cells, seconds with the imports, peak memory in bytes, whether torch was loaded) of one fresh process."""
    suite = folder / f"{cells}.yaml"
    suite.write_text(suite_text(cells), encoding="utf-8")
    (folder / f"{cells}.json").unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(suite)], capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout))


def main(sizes: list[int]) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        rounds = [[measure(size, Path(name)) for size in sizes] for _ in range(3)]
    print(f"{'cells':>7} {'seconds':>8} {'MB':>6} {'ms a cell':>10}  torch loaded")
    for column in zip(*rounds, strict=True):
        seconds = statistics.median(run[1] for run in column)
        print(f"{column[0][0]:>7} {seconds:>8.2f} {column[0][2] / 1e6:>6.0f} {1000 * seconds / column[0][0]:>10.3f}  {column[0][3]}")


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or list(SIZES))
