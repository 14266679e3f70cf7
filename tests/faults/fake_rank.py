"""A rank without torch that behaves as its trial's first input says, so that supervision is tested with real processes.

`facts["behaviour"]` maps a rank (as text) to one of the functions below, by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from bench.record import Lap, Part, save_part
from bench.trial import Trial, load_trial

RANK = "RANK"


def run_rank(trial: Trial) -> int:
    rank = int(os.environ[RANK])
    print(f"rank {rank} of {os.environ['WORLD_SIZE']} on node {os.environ['GROUP_RANK']}", flush=True)
    return globals()[behaviour(trial).get(str(rank), "work")](trial, rank)


def behaviour(trial: Trial) -> dict[str, str]:
    """From the first input's facts, else from `behaviour.json` beside the data, by stage and strategy."""
    if "behaviour" in trial.data[0].facts:
        return trial.data[0].facts["behaviour"]
    script = Path(trial.data[0].path).with_name("behaviour.json")
    return json.loads(script.read_text()).get(f"{trial.cell['stage']} {trial.cell['strategy']}", {}) if script.exists() else {}


def beat(trial: Trial, rank: int, phase: str, step: int) -> None:
    draft = trial.heartbeat_path(rank).with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps({"phase": phase, "step": step}))
    draft.rename(trial.heartbeat_path(rank))  # never half of one, as a real rank's


def leave_part(trial: Trial, rank: int, outcome: str = "ok", reason: str | None = None, step: int = 10) -> None:
    laps = [Lap(first_step=0, steps=5, seconds=0.1, counts={"loss_tokens": 5})]
    part = Part(
        rank=rank, local_rank=int(os.environ["LOCAL_RANK"]), node=int(os.environ["GROUP_RANK"]), world_size=int(os.environ["WORLD_SIZE"]),
        hostname=socket.gethostname(), pid=os.getpid(), outcome=outcome, reason=reason, phase="done" if outcome == "ok" else "train",
        step=step, laps=laps, series={"loss": [1.0]}, facts={"program": __name__, "hash_seed": os.environ.get("PYTHONHASHSEED")},
    )  # fmt: skip
    save_part(part, trial.part_path(rank))


def save(trial: Trial) -> None:
    """Weights that tell which start they come from, written at once."""
    draft = Path(f"{trial.save_to}.draft")
    draft.mkdir(parents=True)
    begun = [start.sha256 for start in trial.starts]
    (draft / "tokenizer.json").write_text(json.dumps({"cell": trial.cell, "seed": trial.seed, "begun": begun}))
    draft.rename(trial.save_to)


def work(trial: Trial, rank: int) -> int:
    beat(trial, rank, "train", 10)
    if trial.save_to and rank == 0:
        save(trial)
    leave_part(trial, rank)
    return 0


def slow_work(trial: Trial, rank: int) -> int:
    time.sleep(1.0)
    return work(trial, rank)


def meet(trial: Trial, rank: int) -> int:
    """Work, once another trial of the suite is at work as well."""
    (Path(trial.work) / "here").touch()
    for _ in range(1200):
        if len(list(Path(trial.work).parents[1].glob("*/*/here"))) > 1:
            return work(trial, rank)
        time.sleep(0.05)
    return 1


def hang(trial: Trial, rank: int) -> int:
    beat(trial, rank, "train", 7)
    time.sleep(600)
    return 0


def hang_deaf(trial: Trial, rank: int) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return hang(trial, rank)


def beat_for_ever(trial: Trial, rank: int) -> int:
    for step in range(100_000):
        beat(trial, rank, "train", step)
        time.sleep(0.05)
    return 0


def exit_three(trial: Trial, rank: int) -> int:
    beat(trial, rank, "train", 4)
    print("the ark has a hole", flush=True)
    return 3


def raise_error(trial: Trial, rank: int) -> int:
    raise ValueError("a wrong turn")


def kill_self(trial: Trial, rank: int) -> int:
    beat(trial, rank, "train", 2)
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def kill_waiter(trial: Trial, rank: int) -> int:
    beat(trial, rank, "train", 2)
    time.sleep(0.5)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)
    return 0


def memory_error(trial: Trial, rank: int) -> int:
    raise MemoryError


def exhaust_memory(trial: Trial, rank: int) -> int:
    """Join the memory group that the trial names, and take more than it allows."""
    Path(trial.data[0].facts["cgroup"], "cgroup.procs").write_text(str(os.getpid()))
    hoard = []
    while True:
        hoard.append(bytearray(os.urandom(1024)) * 8192)


def say_oom(trial: Trial, rank: int) -> int:
    leave_part(trial, rank, "oom", "requested 2147483648 bytes", step=3)
    return 75


def oom_without_part(trial: Trial, rank: int) -> int:
    return 75


def diverge(trial: Trial, rank: int) -> int:
    leave_part(trial, rank, "diverged", "loss is not finite at step 6", step=6)
    return 0


def no_part(trial: Trial, rank: int) -> int:
    return 0


def leave_session(trial: Trial, rank: int) -> int:
    """Start a process that is forked twice, leads a session of its own, drops its environment and is deaf; then work on."""
    note = Path(trial.work).parent / f"stray{rank}.pid"
    code = (
        "import os, signal, sys, time\nif os.fork(): os._exit(0)\nos.setsid()\nif os.fork(): os._exit(0)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwith open(sys.argv[1] + '.part', 'w') as note: note.write(str(os.getpid()))\n"
        "os.rename(sys.argv[1] + '.part', sys.argv[1])\ntime.sleep(600)"
    )
    subprocess.run([sys.executable, "-S", "-c", code, str(note)], env={}, check=True)
    while not note.exists():
        time.sleep(0.01)
    return work(trial, rank)


def leave_session_and_hang(trial: Trial, rank: int) -> int:
    leave_session(trial, rank)
    return hang_deaf(trial, rank)


def fail_after_stray(trial: Trial, rank: int) -> int:
    """Fail once rank 0 has left a process outside of the session."""
    note = Path(trial.work).parent / "stray0.pid"
    while not note.exists():
        time.sleep(0.01)
    return exit_three(trial, rank)


def lose_link_once(trial: Trial, rank: int) -> int:
    """Break like a rank whose rendezvous failed, at the first try only."""
    if not list(Path(trial.work).glob("attempt*")):
        raise ConnectionResetError("Connection reset by peer")
    return work(trial, rank)


def lose_link(trial: Trial, rank: int) -> int:
    raise ConnectionRefusedError("[Errno 111] Connection refused")


def lose_link_late(trial: Trial, rank: int) -> int:
    beat(trial, rank, "train", 3)
    raise ConnectionResetError("Connection reset by peer")


def bind_port(trial: Trial, rank: int) -> int:
    """Do what rank 0 of a process group does first."""
    with socket.socket() as server:
        server.bind((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
    return work(trial, rank)


def patch(trial: Trial, rank: int) -> int:
    """Patch a module of the parent's, and tell whether somebody had done so before."""
    leave_part(trial, rank, reason=str(hasattr(contextlib, "patched")))
    contextlib.patched = True
    return 0


def cuda_work(trial: Trial, rank: int) -> int:
    """Hold 2 GiB of the device and multiply for a while."""
    import torch

    assert torch.cuda.device_count() == int(os.environ["LOCAL_WORLD_SIZE"])
    held = torch.ones(1 << 29, device="cuda")
    factor = torch.ones(8192, 8192, dtype=torch.bfloat16, device="cuda")
    end = time.monotonic() + 6
    while time.monotonic() < end:
        factor @ factor
        torch.cuda.synchronize()
        beat(trial, rank, "train", int(held[0]))
    return work(trial, rank)


def cuda_exhaust(trial: Trial, rank: int) -> int:
    """Ask for more than any device has."""
    import torch

    torch.empty(1 << 45, dtype=torch.uint8, device="cuda")
    return 0


if __name__ == "__main__":
    sys.exit(run_rank(load_trial(Path(sys.argv[1]))))
