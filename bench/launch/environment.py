"""The environment that ranks get: named variables of the user's, and what a repeatable run needs. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from bench.measure.provenance import is_recorded
from bench.trial import Trial

SOURCE_TREE = Path(__file__).resolve().parents[2]

PASSED_ON = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD", "CUDA_HOME", "XDG_CACHE_HOME",
        "HF_HOME", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "COATI_BENCH_CACHE", "VIRTUAL_ENV",
        "CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "MAX_JOBS",
        "CUDA_PATH", "CUDACXX", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS",
    }
)  # fmt: skip
"""Passed on beside the recorded ones, and not recorded, since they name places of one user.

The compiler's are among them because ColossalAI builds kernels at first use: with another compiler than the user's own,
kernels that are there already would be built again inside the trial.
"""

FIXED = {
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONHASHSEED": "0",
}
"""No network, output at once; the libraries that torch multiplies matrices with on a CPU have one thread."""


def host_threads(trial: Trial, simulated_nodes: bool = False) -> int:
    """OpenMP threads of a rank: beside a GPU its share of this machine's cores, since optimizers in host memory step on them.

    On a CPU it is one: there sums in another order would be other losses. `simulated_nodes`: all nodes' ranks are on this machine.
    """
    cell = trial.parsed_cell
    if cell.settings.device != "cuda":
        return 1
    ranks = cell.world_size if simulated_nodes else cell.processes_per_node
    return max(1, len(os.sched_getaffinity(0)) // (ranks * trial.limits.side_by_side))


def rank_environment(extra: Mapping[str, str] | None = None, search_path: tuple[str, ...] = (), *, threads: int = 1) -> dict[str, str]:
    """The environment of a launch: allow-listed variables, the fixed ones, `threads` of OpenMP unless the user said, then `extra`.

    `bench` is importable from its source tree; `search_path` comes before it.
    """
    chosen = {key: value for key, value in os.environ.items() if key in PASSED_ON or is_recorded(key)}
    fixed = {**FIXED, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    path = os.pathsep.join([*search_path, str(SOURCE_TREE)])
    return {**chosen, **fixed, "PYTHONPATH": path, **(extra or {})}
