"""DeepSpeed beside devices that are known by their UUIDs."""

from __future__ import annotations

import pytest
import torch

from bench.strategies.deepspeed_zero import ask_torch_for_memory

cuda_accelerator = pytest.importorskip("deepspeed.accelerator.cuda_accelerator", reason="deepspeed is not installed")


class FakeNvml:
    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802 (as NVML has it)
        return index


def test_deepspeed_cannot_read_uuids_and_asks_torch_what_is_free(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-83ea4e47-3d79-2efc-8abd-9dd253c94062")
    monkeypatch.setattr(cuda_accelerator, "pynvml", FakeNvml())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (7 << 30, 80 << 30))
    theirs = type("Theirs", (cuda_accelerator.CUDA_Accelerator,), {})
    with pytest.raises(ValueError, match="invalid literal for int"):
        theirs().available_memory(0)  # once it can, nothing of ours is needed
    ask_torch_for_memory(theirs)
    assert theirs().available_memory(0) == 7 << 30
