"""`benchmarks/container_start.py` with a real image: it runs, and says what it promises. No time is judged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "container_start.py"


def test_one_pair_of_blocks_outside_and_inside(runtime: str, image: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--image", str(image), "--runtime", runtime, "--pairs", "1"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    dropped, pair, summary = done.stdout.splitlines()
    assert dropped.endswith("(dropped)")
    assert pair.startswith("  outside ")
    assert summary.startswith("block to first rank: outside ")
    assert "; 1 pairs; " in summary
