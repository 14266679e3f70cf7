"""What the strategies made of ColossalAI's plugins share: starting it on a rank, and their precision names."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PLUGIN_PRECISION = {"fp32": "fp32", "bf16-pure": "bf16", "bf16-master": "bf16", "fp16-master": "fp16"}
"""Precision mode -> the plugins' word for the storage type; whether masters exist is a setting of its own."""

INITIAL_LOSS_SCALE = 2.0**16
"""As in ColossalAI v0.2.8 (coati/trainer/strategies/colossalai.py); LowLevelZero's own 2**32 would skip the first steps."""


def import_colossalai() -> None:
    """Import ColossalAI (seconds; a fork parent does it once) without what only its authors can act on.

    That is: optional packages that it misses, and torch functions that newer versions of torch rename.
    """
    warnings.filterwarnings("ignore", module=r"colossalai\.")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import colossalai.booster.plugin  # noqa: F401


def start_colossalai(device: torch.device, *, gemini: bool = False) -> None:
    """Make ColossalAI ready on this rank; where the device is a CPU, put the stand-ins in its place."""
    import_colossalai()
    if device.type == "cpu":
        from bench.strategies import cpu_emulation

        (cpu_emulation.install_gemini if gemini else cpu_emulation.install)()
