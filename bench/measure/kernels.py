"""ColossalAI's own kernels: which of them lie here ready, and which would be compiled at first use. Torch-free.

Its optimizers HybridAdam and FusedAdam are C++ and CUDA. They come prebuilt in the package (`colossalai._C`), where it was installed so, or
are compiled by the first process that asks for them, into a folder of the user's that is named by torch's version, CUDA's and
the path of the package (0.5.0, kernel/extensions/base_extension.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
from pathlib import Path

from bench.measure.provenance import versions

KERNEL_CACHE = Path(".cache/colossalai/torch_extensions")
"""Below the home folder."""
HYBRID_ADAM = ("cpu_adam_arm" if platform.machine() == "aarch64" else "cpu_adam_x86", "fused_optim_cuda")
"""What HybridAdam loads (nn/optimizer/hybrid_adam.py and cpu_adam.py)."""
BUILD_MINUTES = 2
"""About how long the compiler needs for HybridAdam's two."""


def kernels_here(home: Path | None = None, package: Path | None = None) -> list[str]:
    """Names of the kernels that this torch and this ColossalAI load without compiling; `home` and `package` as they are, by default."""
    package = package or package_folder()
    if package is None:
        return []
    prebuilt = (package / "_C").glob("*.so")
    compiled = ((home or Path.home()) / KERNEL_CACHE).glob(f"{_folder_pattern(package)}/*.so")
    return sorted({path.name.split(".")[0] for path in (*prebuilt, *compiled)})


def package_folder() -> Path | None:
    """Where ColossalAI is installed; it is not imported."""
    spec = importlib.util.find_spec("colossalai")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _folder_pattern(package: Path) -> str:
    torch = ".".join((versions().get("torch") or "none").split(".")[:2])
    return f"torch{torch}_cuda-*-{hashlib.sha256(str(package / '__init__.py').encode()).hexdigest()}"


def not_built(kernels: list[str]) -> list[str]:
    """Those of HybridAdam's kernels that are not among `kernels`."""
    return [name for name in HYBRID_ADAM if name not in kernels]
