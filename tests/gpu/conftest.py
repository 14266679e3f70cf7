from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """This process as the only rank of an NCCL group, on the first device."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in rank.items():
            environment.setenv(name, value)
        torch.cuda.set_device(0)
        dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
        yield
        dist.destroy_process_group()


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
