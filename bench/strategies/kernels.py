"""ColossalAI's own kernels: where a cell on CUDA cannot have them, and loading prebuilt ones without a compiler. Torch-free at import."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from bench.cell import Cell
from bench.strategies.locked import holds_kernels, image_name


def kernel_problem(cell: Cell, optimizer: str) -> str | None:
    """Why HybridAdam, if it is the `optimizer` in force, has no kernels where the cell runs, or None. An unknown image is not judged.

    `container: none` is left to the machine: it may have them, or compile them at first use.
    """
    image = image_name(cell.settings.container)
    if image is None or optimizer != "hybrid" or cell.settings.device != "cuda":
        return None
    if not holds_kernels(image):
        return (
            f"HybridAdam needs ColossalAI's kernels; the image {image} holds none and no compiler; "
            "`container: current`, or `container: none` on a machine with nvcc, would be right"
        )
    overlay = cell.settings.overlay
    if overlay is not None and not _has_kernels(Path(overlay.colossalai).expanduser()):
        return (
            f"HybridAdam needs ColossalAI's kernels; the overlay hides those of the image {image}; "
            "a checkout that was built with BUILD_EXT=1 would be right"
        )
    return None


def _has_kernels(checkout: Path) -> bool:
    return any(found for folder in (checkout, checkout / "colossalai") for found in (folder / "_C").glob("*.so"))


def load_prebuilt_without_compiler() -> None:
    """Let HybridAdam load kernels that are prebuilt in ColossalAI's package where there is no nvcc.

    Its loader asks for a CUDA toolkit before it looks for them (0.5.0, kernel/kernel_loader.py, `load`).
    """
    from colossalai.kernel.kernel_loader import CPUAdamLoader, FusedOptimizerLoader

    for loader in (CPUAdamLoader, FusedOptimizerLoader):
        loader.REGISTRY = [_without_compiler(extension) for extension in loader.REGISTRY]


def _without_compiler(extension: Any) -> Any:
    if importlib.util.find_spec(extension().prebuilt_import_path) is None:
        return extension
    return type(extension.__name__, (extension,), {"assert_compatible": lambda _: None})
