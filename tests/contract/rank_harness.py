"""Real ranks for tests: forked from this process, gloo over loopback, a fresh process group each time.

The parent never touches a process group, so that a child starts clean; the CPU stand-ins of ColossalAI are installed in the
child only and die with it. A child that fails hands its traceback back; one that hangs is killed and reported.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class NoAnswer(AssertionError):  # noqa: N818 (a finding)
    """A rank hung."""


_fork = multiprocessing.get_context("fork")


def run_ranks(work: Callable[..., Any], world_size: int, *arguments: Any, seconds: float = 120.0, join: bool = True) -> list[Any]:
    """Run `work(*arguments)` on `world_size` ranks; return what each returned (plain Python values), in rank order.

    Unless `join`, the work itself joins the process group that the environment names.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = [_fork.Pipe(duplex=False) for _ in range(world_size)]
    ranks = [
        _fork.Process(target=_rank, args=(work, rank, world_size, port, pipes[rank][1], arguments, join), daemon=True)
        for rank in range(world_size)
    ]
    gc.freeze()  # else ColossalAI's collections walk through, and so copy, all that the parent has loaded
    for rank in ranks:
        rank.start()
    try:
        return [_answer(rank, pipes[rank][0], seconds) for rank in range(world_size)]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
            rank.close()


def _answer(rank: int, pipe: Any, seconds: float) -> Any:
    if not pipe.poll(seconds):
        raise NoAnswer(f"rank {rank} did not answer within {seconds:g} s")
    failed, value = pipe.recv()
    if failed:
        raise AssertionError(f"rank {rank} failed:\n{value}")
    return value


def _rank(work: Callable[..., Any], rank: int, world_size: int, port: int, pipe: Any, arguments: tuple[Any, ...], join: bool) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GROUP_RANK="0"
    )
    torch.set_num_threads(1)
    try:
        if join:
            dist.init_process_group("gloo")
        pipe.send((False, work(*arguments)))
        if join:
            dist.barrier()
    except BaseException:
        pipe.send((True, traceback.format_exc()))
    finally:
        os._exit(0)
