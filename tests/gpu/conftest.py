from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="session")
def lone_group() -> Iterator[dict[str, str]]:
    """The NCCL group of this process alone, on the first device, and torchrun's variables for it.

    One for all modules: DeepSpeed keeps the groups it first made for as long as the process lives.
    """
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.destroy_process_group()


@pytest.fixture
def group(lone_group: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as the only rank of a group, under torch's own functions: DeepSpeed's ZeRO-3 leaves its `linear` behind."""
    for name, value in lone_group.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """GPU tests of all workers share the device; one marked `alone` has it to itself, from before its fixtures until after them."""
    if item.get_closest_marker("gpu") is None:
        return (yield)
    with on_the_device(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextmanager
def on_the_device(*, alone: bool) -> Iterator[None]:
    """Wait for a place. Who wants to be alone keeps the door shut while the others leave, and so does not wait for ever."""
    with _open("door") as door, _open("room") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield


def _open(name: str) -> Any:
    return (Path(tempfile.gettempdir()) / f"coati-bench-gpu-tests-{os.getuid()}-{name}.lock").open("w")
