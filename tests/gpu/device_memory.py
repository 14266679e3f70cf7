"""Device memory as torch's allocator counts it in this process."""

from __future__ import annotations

import gc

import torch


def allocated() -> int:
    """Bytes that live on the device, those of earlier tests collected."""
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()
