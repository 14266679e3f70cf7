"""Trials for tests: tiny cells on synthetic data, run by forked ranks of this process."""

from __future__ import annotations

import gc
import importlib
import os
import socket
import sys
import traceback
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from bench.cell import Cell, cell_from_json
from bench.data.synthetic import file_content
from bench.record import Input, Part, load_part
from bench.trial import Trial, make_trial

OF_A_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables of a rank in a group; a process that inherits them takes itself for that rank."""
KIND_OF = {"sft": "synthetic-instruct", "rm": "synthetic-pairs", "ppo": "synthetic-prompts"}

SIZES: dict[str, dict[str, Any]] = {
    "sft": {"steps": 4, "global_batch": 8, "sequence_length": 64, "learning_rate": 1e-2},
    "rm": {"steps": 4, "global_batch": 8, "sequence_length": 64, "learning_rate": 5e-3},
    "ppo": {
        "iterations": 2, "prompts_per_iteration": 16, "global_batch": 8, "prompt_length": 16, "response_length": 8, "sequence_length": 64,
        "learning_rate": 1e-3, "ptx": "synthetic-instruct", "ptx_coef": 0.2, "ppo_epochs": 2, "lap_steps": 1,
    },
}  # fmt: skip
"""Settings of each stage that move the losses within a second or two."""


def tiny_cell(stage: str, **changes: Any) -> Cell:
    """A cell of `stage` that runs in a second or two on one CPU core."""
    base: dict[str, Any] = {
        "stage": stage, "model": "bloom-tiny", "strategy": "naive", "device": "cpu", "launcher": "fork", "precision": "fp32",
        "tokenizer_vocabulary": 1024, "warm_start": "none", "micro_batch": 8, "global_batch": 16,
    }  # fmt: skip
    return cell_from_json({**base, **changes})


def tiny_trial(
    cell: Cell, folder: Path, *, trial: int = 0, starts: dict[str, Path] | None = None, save: bool = False, **rest: Any
) -> Trial:
    """A trial of `cell` on synthetic data in `folder`; `starts` maps roles to checkpoint folders."""
    from bench.checkpoint import checkpoint_sha256

    names = {cell.settings.data, getattr(cell.settings, "ptx", "none")} - {"none"}
    data = [data_input(name, folder.parent) for name in sorted(names)]
    folders = {"tokenizer": tokenizer_folder(folder.parent), **(starts or {})}
    inputs = [Input(name=role, path=str(path), sha256=checkpoint_sha256(path)) for role, path in folders.items()]
    folder.mkdir(parents=True, exist_ok=True)
    save_to = str(folder / "weights") if save else None
    return make_trial(cell, trial, data=data, starts=inputs, save_to=save_to, work=str(folder), **rest)


def data_input(name: str, folder: Path) -> Input:
    """A data set as an input; synthetic ones are written to `folder`, `file:` ones are where they say."""
    import hashlib

    path = Path(name.removeprefix("file:")) if name.startswith("file:") else folder / f"{name}.json"
    if not path.exists():
        path.write_bytes(file_content(name))
    return Input(name=name, path=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@cache
def tokenizer_folder(folder: Path) -> Path:
    """A tokenizer trained on all synthetic texts, in `folder`."""
    from bench.data.collate import PROMPT_WITHOUT_INPUT
    from bench.data.synthetic import instruct_rows, pair_rows
    from bench.models.tokenizer import train_tokenizer

    texts = [PROMPT_WITHOUT_INPUT.format_map(row) + row["output"] for row in instruct_rows()]
    texts += [row["prompt"] + row[side] for row in pair_rows() for side in ("chosen", "rejected")]
    train_tokenizer(texts, 1024, folder / "tokenizer")
    return folder / "tokenizer"


def run_forked(trial: Trial) -> list[Part]:
    """Run every rank of `trial` in a forked process; return the parts. Ranks are ended if they outlast the test's patience."""
    codes = fork_ranks(trial)
    parts = [load_part(trial.part_path(rank)) for rank in range(trial.parsed_cell.world_size)]
    for part, code in zip(parts, codes, strict=True):
        assert (code == 0) == (part.outcome in ("ok", "diverged", "invalid")), (part.outcome, part.reason, code)
    return parts


def fork_ranks(trial: Trial) -> list[int]:
    """Run every rank of `trial` in a forked process; return the exit codes."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in start_ranks(trial)]


def start_ranks(trial: Trial) -> list[int]:
    """Start every rank of `trial` in a forked process; return their ids."""
    import torch

    import bench.worker

    with suppress(ImportError):  # a second of imports of peft's, once instead of in every rank
        importlib.import_module("peft.tuners.lora.bnb")
    torch.set_num_threads(1)
    cell = trial.parsed_cell
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    gc.freeze()  # as the fork parent does: else ColossalAI's collections walk through, and so copy, all that is loaded
    return [_fork(bench.worker.run_rank, trial, rank, cell, port) for rank in range(cell.world_size)]


def _fork(run: Any, trial: Trial, rank: int, cell: Cell, port: str) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 minds threads; torch's are idle here
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(trial.log_path(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank % cell.processes_per_node), "WORLD_SIZE": str(cell.world_size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": str(rank // cell.processes_per_node),
        }  # fmt: skip
        code = run(trial)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def only(parts: list[Part]) -> Part:
    """The lead part of a trial that went well."""
    for part in parts:
        assert part.outcome == "ok", part.reason
    return parts[0]
