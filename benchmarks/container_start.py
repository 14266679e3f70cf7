"""What an image costs at a block's start: the same block inside and outside, in turns, until its first rank exists.

    python benchmarks/container_start.py                                  # the cpu image of the cache, by the runtime that is taken
    python benchmarks/container_start.py --image PATH --runtime podman

A block is one cell of SFT under the fork launcher, from the start of `coati-bench block` to the first rank's process, imports of torch
included: seconds of this machine's clock, for which a quiet machine is needed, and processor seconds of the block and all below it until
then, for which it is not (of docker's containers, which are below no process of ours, they lack what runs inside).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

TREE = Path(__file__).resolve().parents[1]
SUITE = """
suite: start
axes: {stage: [sft], model: [bloom-tiny], strategy: [naive]}
settings: {device: cpu, launcher: fork, precision: fp32, tokenizer_vocabulary: 1024}
stages: {sft: {data: synthetic-instruct, steps: 2, micro_batch: 4, global_batch: 8, sequence_length: 128}}
"""
LONGEST_SECONDS = 300.0
MOST_SECONDS = 1.0
"""Target: what the image adds to a block's start."""


def bench(folder: Path, *words: str) -> str:
    """Run `coati-bench` in `folder`; what it printed."""
    return subprocess.run(
        [sys.executable, "-m", "bench", *words], cwd=folder, env=environment(), check=True, capture_output=True, text=True
    ).stdout


def environment() -> dict[str, str]:
    """Of every call."""
    return {**os.environ, "PYTHONPATH": str(TREE), "OMP_NUM_THREADS": "1"}


def prepare(folder: Path, *options: str) -> Path:
    """Plan the suite in `folder` and make what its cell begins from; the block's file."""
    folder.mkdir()
    (folder / "start.yaml").write_text(SUITE, encoding="utf-8")
    bench(folder, "plan", "start.yaml", "--write", *options)
    for line in bench(folder, "plan", "start.yaml", "--commands", *options).splitlines():
        if line.startswith(("coati-bench data ", "coati-bench warm ")):
            bench(folder, *line.split()[1:])
    (plan,) = folder.glob("results/*/plan.json")
    sys.path.insert(0, str(TREE))
    from bench.matrix import load_plan

    (block,) = load_plan(plan).blocks
    return plan.parent / "blocks" / f"{block.block_id}.json"


def to_first_rank(block: Path) -> tuple[float, float]:
    """Run a block; seconds and processor seconds from its start to the note of its first rank's process."""
    for old in [*block.parent.glob("*.json"), *block.parents[1].glob("records/*/*.json"), *block.parents[1].glob("logs/*/*/process0.json")]:
        old.unlink()
    begin = time.monotonic()
    running = subprocess.Popen(
        [sys.executable, "-m", "bench", "block", str(block)], cwd=block.parents[3], env=environment(), stdout=subprocess.DEVNULL
    )
    while not any(block.parents[1].glob("logs/*/*/process0.json")):
        if running.poll() or time.monotonic() > begin + LONGEST_SECONDS:
            raise SystemExit(f"no rank was started; see {block.parents[1] / 'logs'}")
        time.sleep(0.005)
    found = (time.monotonic() - begin, processor_seconds(running.pid))
    running.wait()
    return found


def processor_seconds(root: int) -> float:
    """Used so far by a process, all below it that run, and the children of theirs that have ended."""
    from bench.launch.processes import descendants

    ticks = 0
    for pid in [root, *descendants([root])]:
        with suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default="cpu")
    parser.add_argument("--runtime")
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    if options.runtime:
        os.environ["COATI_BENCH_RUNTIME"] = options.runtime
    with tempfile.TemporaryDirectory() as scratch:
        outside, inside = prepare(Path(scratch) / "outside"), prepare(Path(scratch) / "inside", "--container", options.image)
        pairs = []
        for number in range(options.pairs + 1):  # the first one warms up the disk's cache and is dropped
            pair = (*to_first_rank(outside), *to_first_rank(inside))
            dropped = " (dropped)" if number == 0 else ""
            print("  outside {:.2f} s, processor {:.2f} s; inside {:.2f} s, processor {:.2f} s".format(*pair) + dropped, flush=True)
            pairs += [pair] if number else []
    clock, processor = (statistics.median(pair[place + 2] - pair[place] for pair in pairs) for place in (0, 1))
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    print(f"block to first rank: outside {medians[0]:.2f} s, inside {medians[2]:.2f} s; median of differences {clock:+.2f} s, "
          f"of the processor {processor:+.2f} s (target: below {MOST_SECONDS:g} s); {len(pairs)} pairs; load of this machine at the end "
          f"{os.getloadavg()[0]:.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
