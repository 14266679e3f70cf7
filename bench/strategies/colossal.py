"""What the strategies made of ColossalAI's plugins share: the version they need, starting it on a rank, and their precision names."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial, wraps
from types import FunctionType
from typing import TYPE_CHECKING, Any

from bench.cell import Cell
from bench.strategies.base import Strategy
from bench.strategies.requirement import Requirement

if TYPE_CHECKING:
    import torch

PLUGIN_PRECISION = {"fp32": "fp32", "bf16-pure": "bf16", "bf16-master": "bf16", "fp16-master": "fp16"}
"""Precision mode -> the plugins' word for the storage type; whether masters exist is a setting of its own."""

INITIAL_LOSS_SCALE = 2.0**16
"""As in ColossalAI v0.2.8 (coati/trainer/strategies/colossalai.py); LowLevelZero's own 2**32 would skip the first steps."""


class ColossalStrategy(Strategy):
    """A strategy made of a plugin of ColossalAI's."""

    uses_colossalai = True
    requires = (Requirement("colossalai", "0.5.0"),)

    def start(self, cell: Cell, device: torch.device) -> None:  # noqa: ARG002
        """See `Strategy.start`."""
        start_colossalai(device)


def import_colossalai() -> None:
    """Import ColossalAI (seconds; a fork parent does it once) without what only its authors can act on.

    That is: optional packages that it misses, and torch functions that newer versions of torch rename.
    """
    warnings.filterwarnings("ignore", module=r"colossalai\.")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    with warnings.catch_warnings(), compiling_at_the_first_call():
        warnings.simplefilter("ignore")
        import colossalai.booster.plugin
        import colossalai.legacy.utils.memory  # noqa: F401  (Gemini's placement asks it for the device's capacity)


@contextmanager
def compiling_at_the_first_call() -> Iterator[None]:
    """Let `torch.compile` wait for the first call of a function that it is given meanwhile.

    bitsandbytes, which ColossalAI imports, has fallbacks compiled as it is imported. That loads torch's compiler, a second of every rank's
    start, for functions that hardly any trial calls.
    """
    import torch

    at_once = torch.compile

    def later(function: Any = None, **options: Any) -> Any:
        if function is None:
            return partial(later, **options)
        if not isinstance(function, FunctionType):
            return at_once(function, **options)
        compiled = cache(partial(at_once, function, **options))

        @wraps(function)
        def at_the_first_call(*arguments: Any, **named: Any) -> Any:
            return compiled()(*arguments, **named)

        return at_the_first_call

    torch.compile = later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = at_once


def start_colossalai(device: torch.device, *, gemini: bool = False) -> None:
    """Make ColossalAI ready on this rank; where the device is a CPU, put the stand-ins in its place."""
    import_colossalai()
    if device.type == "cpu":
        from bench.strategies import cpu_emulation

        (cpu_emulation.install_gemini if gemini else cpu_emulation.install)()


SCALE_STATE = ("_scale", "_growth_step", "_hysteresis_step")
"""What changes in DynamicGradScaler (colossalai/amp/naive_amp/grad_scaler); its own `state_dict` leaves the counters out."""


def loss_scale_state(mixin: Any) -> dict[str, Any]:
    """The dynamic loss scale of one of ColossalAI's mixed-precision mixins, for `Engine.training_state`; {} unless fp16."""
    scaler = getattr(mixin, "grad_scaler", None)
    values = {} if scaler is None else {name: getattr(scaler, name) for name in SCALE_STATE}
    return {name: value.cpu() if hasattr(value, "cpu") else value for name, value in values.items()}


def load_loss_scale(mixin: Any, state: dict[str, Any]) -> None:
    """Put back what `loss_scale_state` gave."""
    for name, value in state.items():
        before = getattr(mixin.grad_scaler, name)
        setattr(mixin.grad_scaler, name, value.to(before.device) if hasattr(before, "device") else value)


def forced_hybrid(cell: Cell) -> dict[str, Any]:
    """The setting that a strategy forces that takes ColossalAI's Adam only; on a CPU, which has no kernels of it, a plain one stands in."""
    wanted = "hybrid" if cell.settings.device == "cuda" else "adamw"
    return {} if cell.settings.optimizer == wanted else {"optimizer": wanted}


def in_force(cell: Cell, forced: dict[str, Any]) -> Cell:
    """`cell` with the forced settings in place of its own."""
    return replace(cell, settings=replace(cell.settings, **forced)) if forced else cell
