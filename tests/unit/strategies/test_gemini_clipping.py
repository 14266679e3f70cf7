"""Gemini clips through HybridAdam's `div_scale`: also where bf16 gradients lie in host memory, which it updates without its kernel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.strategies.colossal import import_colossalai
from bench.strategies.gemini import heed_divisor

import_colossalai()
GRADIENT = torch.linspace(1, 2, 8).bfloat16()


@pytest.fixture
def hybrid_adam(monkeypatch: pytest.MonkeyPatch) -> Any:
    """HybridAdam, made without its kernels."""
    from colossalai.nn.optimizer import HybridAdam, cpu_adam

    kernels = SimpleNamespace(CPUAdamOptimizer=lambda *_: None)
    monkeypatch.setattr(cpu_adam, "CPUAdamLoader", lambda: SimpleNamespace(load=lambda: kernels))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return HybridAdam


def update(optimizer: Any, divisor: float) -> torch.Tensor:
    """Step with a gradient in bf16, whatever type the parameter has, as Gemini does; return the first moment."""
    (parameter,) = optimizer.param_groups[0]["params"]
    values, parameter.data = parameter.data, GRADIENT.clone()
    parameter.grad, parameter.data = parameter.data, values
    optimizer.step(div_scale=divisor)
    moment: torch.Tensor = optimizer.state[parameter]["exp_avg"].clone()
    return moment


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_gradients_in_host_memory_are_clipped(hybrid_adam: Any, dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.zeros(8, dtype=dtype))
    optimizer = heed_divisor(hybrid_adam([parameter], betas=(0.5, 0.5)))
    gradient = GRADIENT.to(dtype)
    first = update(optimizer, 4.0)
    assert torch.allclose(first, gradient / 8)
    second = update(optimizer, -1.0)  # what Gemini says where the norm is small enough
    assert torch.allclose(second, first / 2 + gradient / 2)
    assert torch.allclose(update(optimizer, 4.0), second / 2 + gradient / 8, rtol=1e-2)


def test_colossalai_itself_still_forgets_to(hybrid_adam: Any) -> None:
    """Else `heed_divisor` would divide twice: take it away then."""
    optimizer = hybrid_adam([torch.nn.Parameter(torch.zeros(8))], betas=(0.5, 0.5))
    assert torch.allclose(update(optimizer, 4.0), GRADIENT.float() / 2)
