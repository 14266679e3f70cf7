"""The environment that ranks get: named variables of the user's, and what a repeatable run needs. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from bench.measure.provenance import is_recorded

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
    "OMP_NUM_THREADS": "1",
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
"""One thread a rank, no network, output at once; `OMP_NUM_THREADS` of the user wins."""


def rank_environment(extra: Mapping[str, str] | None = None, search_path: tuple[str, ...] = ()) -> dict[str, str]:
    """The environment of a launch: allow-listed variables, the fixed ones, then `extra`.

    `bench` is importable from its source tree; `search_path` comes before it.
    """
    chosen = {key: value for key, value in os.environ.items() if key in PASSED_ON or is_recorded(key)}
    fixed = {**FIXED, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", FIXED["OMP_NUM_THREADS"])}
    path = os.pathsep.join([*search_path, str(SOURCE_TREE)])
    return {**chosen, **fixed, "PYTHONPATH": path, **(extra or {})}
