"""The measured loop, run on every rank: set up, load, evaluate, train in laps, evaluate, save, and tell how it ended.

`python -m bench.worker TRIAL.json`, or `run_rank` in a forked process. The place in the job comes from the variables of
torch's `env://` rendezvous (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, GROUP_RANK).
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from bench.errors import BenchError, MachineError
from bench.measure.clock import LapClock, synchronise
from bench.measure.consistency import inconsistency
from bench.measure.evidence.judge import Declared, written
from bench.measure.evidence.watch import EvidenceWatch, learning_rates
from bench.measure.memory import MemoryWatch
from bench.measure.preflight import preflight
from bench.needs import held_by_rank, networks
from bench.record import Evidence, Lap, Memory, Outcome, Part, save_part
from bench.resume import Resume
from bench.shared_disk import patiently
from bench.stages.base import Place, Stage, StepReport, build_stage
from bench.strategies.base import Strategy, all_strategies
from bench.trial import Trial, load_trial

EXIT_OK, EXIT_ERROR, EXIT_OOM = 0, 1, 75

BEAT_SECONDS = 3.0
"""Least time between two beats inside a phase; a change of phase and a lap's edge always beat."""

BEAT_BYTES = 80
"""Length of a heartbeat's file."""

DIVERGENCE = ("loss",)
"""Series whose first value that is not finite ends the trial as `diverged`. They are reduced over ranks, so all ranks agree."""

LARGEST = float(torch.finfo(torch.float32).max)
"""Stands in a series for a value that is not finite and no divergence (a gradient norm where fp16 overflowed)."""

_SIZES = {"B": 1, "bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_REQUESTED = re.compile(r"[Tt]ried to allocate ([\d.]+) (TiB|GiB|MiB|KiB|bytes|B)")


class Diverged(Exception):  # noqa: N818 (an outcome, not an error)
    """A value that may not be infinite or NaN was."""


class Invalid(Exception):  # noqa: N818 (an outcome, not an error)
    """The trial itself knows that its numbers are wrong."""


class Heartbeat:
    """Says in a file where the rank is; the file's time is the beat. A beat that the disk refuses is missed: the supervisor times that."""

    def __init__(self, path: Path) -> None:
        self._path, self._last = path, 0.0
        self.phase, self.step = "start", 0

    def enter(self, phase: str, step: int | None = None) -> None:
        """Beat at a change of phase or a lap's edge."""
        self.phase, self.step = phase, self.step if step is None else step
        self._last = time.monotonic()
        with suppress(OSError):
            self._write(json.dumps({"phase": self.phase, "step": self.step}).ljust(BEAT_BYTES))

    def _write(self, text: str) -> None:
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.write(file, text.encode())  # over the last beat, of the same length: cheaper than a new file, and never half of one
        finally:
            os.close(file)  # what other nodes need to see it on a shared file system

    def beat(self) -> None:
        """Beat if the last one is `BEAT_SECONDS` old."""
        if time.monotonic() - self._last >= BEAT_SECONDS:
            self.enter(self.phase)


@dataclass(slots=True)
class Findings:
    """What this rank has seen so far; becomes its part, however the trial ends."""

    laps: list[Lap] = field(default_factory=list)
    series: dict[str, list[float]] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    watch: MemoryWatch | None = None
    evidence: Evidence | None = None
    resumed_step: int | None = None

    def keep(self) -> dict[str, Any]:
        """What belongs to the steps done so far, as plain values."""
        laps = [asdict(lap) for lap in self.laps]
        return {"laps": laps, "series": self.series, "held_out": self.held_out, "non_finite": self.facts.get("non_finite", {})}

    def take_up(self, step: int, kept: dict[str, Any]) -> None:
        """Go on from what `keep` gave after `step` steps."""
        self.resumed_step = step
        self.laps = [Lap(**lap) for lap in kept["laps"]]
        self.series, self.held_out = kept["series"], kept["held_out"]
        self.facts |= {"non_finite": kept["non_finite"]} if kept["non_finite"] else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How the trial ended on this rank."""

    outcome: Outcome
    code: int
    reason: str | None = None


class Rank:
    """One rank of one trial."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.cell = trial, trial.parsed_cell
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank, self.node = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("GROUP_RANK", "0"))
        self.heart = Heartbeat(trial.heartbeat_path(self.rank))
        self.found = Findings()
        self._born = psutil.Process().create_time()

    def run(self) -> Ending:
        """The life of a rank."""
        self.heart.enter("start")
        strategy, place = self._start()
        self._spend("start", time.time() - self._born - self.found.seconds.get("preflight", 0.0))
        self.heart.enter("load")
        held = partial(held_by_rank, cell=self.cell, rank=self.rank)
        self._evidence = EvidenceWatch(self.cell, declared(strategy, self.trial, place), partial(networks, self.cell), held, place.device)
        stage = self._load(self._evidence.beside(strategy), place)
        resume = Resume(self.trial, stage, place)
        done, kept = resume.begin()
        if done:
            self.found.take_up(done, kept)
        else:
            self._evaluate(stage, place, "before")
        self._train(stage, place, resume, done)
        self._evaluate(stage, place, "after")
        if self.trial.save_to is not None:
            self.heart.enter("save")
            begin = time.perf_counter()
            stage.save(self.trial.save_to)
            self._spend("save", time.perf_counter() - begin)
        ending = self._conclude(stage)
        self.heart.enter("done")
        return ending

    # -- phases ------------------------------------------------------------------------------------------------------

    def _start(self) -> tuple[Strategy, Place]:
        """Seeds, device, process group, framework."""
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        device = choose_device(self.cell.settings.device, self.local_rank)
        seed_everything(self.trial.seed)
        join_group(device, self.trial.limits.heartbeat_seconds)
        self._preflight(device)
        strategy = all_strategies()[self.cell.strategy]
        strategy.start(self.cell, device)
        seed_everything(self.trial.seed)
        self.world_size = dist.get_world_size()
        self.found.watch = MemoryWatch(device)
        self.found.facts |= machine_facts(device) | strategy_facts(strategy, self.trial)
        return strategy, self._place(device)

    def _preflight(self, device: torch.device) -> None:
        """Network, clocks and code of all nodes, before any framework is started; the first rank of each node keeps what was found."""
        if dist.get_world_size() > 1:
            found = preflight(device, self.node)
            self._spend("preflight", found["seconds"])
            self.found.facts |= {"preflight": found} if self.local_rank == 0 else {}

    def _place(self, device: torch.device) -> Place:
        size = self.cell.model_parallel_size
        place = Place(
            device=device, rank=dist.get_rank(), world_size=self.world_size, model_parallel_size=size,
            group=data_parallel_group(size), beat=self.heart.beat,
        )  # fmt: skip
        if size > 1:
            self.found.facts["data_parallel_rank"] = place.data_rank
        return place

    def _load(self, strategy: Strategy, place: Place) -> Stage:
        begin = time.perf_counter()
        stage = build_stage(self.trial, strategy, place)
        synchronise(place.device)
        self.found.facts |= stage.facts
        self._spend("load", time.perf_counter() - begin)
        return stage

    def _evaluate(self, stage: Stage, place: Place, edge: str) -> None:
        """Held-out metrics, `<metric>_<edge>`."""
        self.heart.enter("evaluate")
        begin = time.perf_counter()
        values = stage.evaluate()
        synchronise(place.device)
        self._spend("evaluate", time.perf_counter() - begin)
        self.found.facts |= stage.facts
        for name, value in values.items():
            if not np.isfinite(value):
                raise Diverged(f"held-out {name} {edge} training is {value}")
            self.found.held_out[f"{name}_{edge}"] = value

    def _train(self, stage: Stage, place: Place, resume: Resume, done: int) -> None:
        """All steps but the first `done`, in laps."""
        self.heart.enter("train", done)
        clock, watch = LapClock(place.device), self.found.watch
        assert watch is not None
        with self._weighing():
            self._evidence.begin()
        watch.start()
        lap_steps, seen = self.cell.settings.lap_steps, len(self.found.series.get("learning_rate", []))
        for first in range(done, stage.total, lap_steps):
            reports = []
            clock.start()
            for index in range(first, min(first + lap_steps, stage.total)):
                reports.append(self._advance(stage, index))
                watch.note(reports[-1].phase_peaks)
                if index == 0:
                    self._first_step(place)
            seconds = clock.stop()
            self._take(reports, first, seconds, clock.opened)
            self.heart.enter("train", first + len(reports))
            self._save(resume, first, first + len(reports))
        with self._weighing():
            self._evidence.end(learning_rates(self.found.series, seen))

    def _advance(self, stage: Stage, index: int) -> StepReport:
        """One step (PPO: iteration); evidence is taken in the first one, if its lap is a warm-up lap, which no report measures."""
        if index > 0 or stage.total <= self.cell.settings.lap_steps:
            return stage.advance(index)
        with self._evidence.tracing("the first step, in the first warm-up lap"):
            return stage.advance(index)

    def _conclude(self, stage: Stage) -> Ending:
        """What the evidence says. A step that was not traced before is run once more, now that nothing depends on it."""
        self.heart.enter("evidence")
        with self._weighing():
            if self._evidence.lacks_step():
                with self._evidence.tracing("the last step once more, after all that was measured"):
                    stage.advance(stage.total - 1)
            self.found.evidence = evidence = self._evidence.conclude(self.found.series)
        if evidence is None or evidence.state != "refuted":
            return Ending(outcome="ok", code=EXIT_OK)
        reason = "; ".join(f"{check.model}, {check.what}: {check.text}" for check in evidence.refuted)
        return Ending(outcome="invalid", code=EXIT_OK, reason=f"evidence refutes that {self.cell.strategy} is active: {reason}")

    @contextmanager
    def _weighing(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._spend("evidence", time.perf_counter() - begin)

    def _save(self, resume: Resume, first: int, done: int) -> None:
        """Save the training state at a lap's edge, outside the laps, if it is time to."""
        if resume.is_due(first, done):
            self.heart.enter("save")
            begin = time.perf_counter()
            resume.save(done, self.found.keep())
            self._spend("saves", time.perf_counter() - begin)
            self.heart.enter("train")

    def _first_step(self, place: Place) -> None:
        """The one extra synchronisation, in the first lap: how long it took to get going, evaluation and evidence left out."""
        synchronise(place.device)
        since = time.time() - self._born
        self._spend("time_to_first_step", since - sum(self.found.seconds.get(what, 0.0) for what in ("preflight", "evaluate", "evidence")))

    # -- findings ----------------------------------------------------------------------------------------------------

    def _spend(self, what: str, seconds: float) -> None:
        self.found.seconds[what] = self.found.seconds.get(what, 0.0) + seconds

    def _take(self, reports: list[StepReport], first: int, seconds: float, opened: float) -> None:
        """Read the lap's values, in one transfer, and keep the lap; raises Diverged."""
        steps = read_rows([step for report in reports for step in report.steps])
        iterations = read_rows([report.iteration for report in reports])
        per_unit = len(steps) // len(reports)
        for row, values in enumerate(steps):
            self._extend(values, first + row // per_unit)
        for row, values in enumerate(iterations):
            self._extend(values, first + row)
            self._check(values, first + row)
        self.found.laps.append(
            Lap(first_step=first, steps=len(reports), seconds=seconds, counts=add_up([report.counts for report in reports]),
                phases=add_up([report.phases for report in reports]), opened=opened)
        )  # fmt: skip

    def _check(self, values: dict[str, float], iteration: int) -> None:
        """Raise Invalid where a PPO iteration does not agree with itself; values are the job's, so all ranks agree."""
        if self.cell.stage == "ppo" and (problem := inconsistency(values, self.found.facts["precision"])):
            self.heart.step = iteration
            raise Invalid(f"PPO consistency at iteration {iteration}: {problem}")

    def _extend(self, values: dict[str, float], step: int) -> None:
        for name in DIVERGENCE:
            if name in values and not np.isfinite(values[name]):
                self.heart.step = step
                raise Diverged(f"{name} is {values[name]} at step {step}")
        for name, value in values.items():
            finite = bool(np.isfinite(value))
            if not finite:
                self.found.facts.setdefault("non_finite", {}).setdefault(name, []).append(step)
            self.found.series.setdefault(name, []).append(value if finite else LARGEST)

    def weigh_unfinished(self) -> None:
        """Take in what the allocator held in the step that ran out of memory; an allocator that no longer answers leaves it out."""
        if self.found.watch is not None:
            with suppress(RuntimeError):
                self.found.watch.note()

    def write(self, ending: Ending) -> None:
        """Write this rank's part; a disk that is full for a moment is waited for, as all that was measured is in it."""
        watch, path = self.found.watch, self.trial.part_path(self.rank)
        part = Part(
            rank=self.rank, local_rank=self.local_rank, node=self.node, world_size=self.world_size, hostname=socket.gethostname(),
            pid=os.getpid(), outcome=ending.outcome, reason=ending.reason, phase=self.heart.phase, step=self.heart.step,
            resumed_step=self.found.resumed_step, laps=self.found.laps, series=self.found.series, held_out=self.found.held_out,
            seconds=self.found.seconds, facts=self.found.facts, memory=Memory() if watch is None else watch.read(),
            evidence=self.found.evidence,
        )  # fmt: skip
        patiently(lambda: save_part(part, path), path, "what this rank found")


# -- set-up ----------------------------------------------------------------------------------------------------------


def choose_device(kind: str, local_rank: int) -> torch.device:
    """The device of this rank. Raises MachineError if it is not there."""
    if kind == "cpu":
        torch.set_num_threads(1)
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        raise MachineError(
            f"device cuda:{local_rank} is not there; seen: {count} CUDA devices; one for each rank of the node would be right"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch, the same on every rank."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002 (frameworks draw from the global one)
    torch.manual_seed(seed)


def join_group(device: torch.device, silence_seconds: float) -> None:
    """Join the process group that the environment names; collectives that outlast the heartbeat's limit fail.

    One rank that was started without a launcher is a group of its own.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # port 0: any that is free
    os.environ.update({name: value for name, value in alone.items() if name not in os.environ})
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method="env://",
        timeout=timedelta(seconds=max(60.0, silence_seconds)),
        device_id=device if on_gpu else None,
    )


def data_parallel_group(model_parallel_size: int) -> Any:
    """The process group of this rank with those at its place in other models; None where every rank holds a model. Collective."""
    if model_parallel_size == 1:
        return None
    ranks = range(dist.get_world_size())
    groups = [dist.new_group(list(ranks[place::model_parallel_size])) for place in range(model_parallel_size)]
    return groups[dist.get_rank() % model_parallel_size]


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What runs here: device name and bytes, versions of torch and ColossalAI as this rank imported them."""
    versions = {name: sys.modules[name].__version__ for name in ("torch", "colossalai", "transformers", "peft") if name in sys.modules}
    if device.type != "cuda":
        return {"device_name": platform.processor() or platform.machine(), "versions": versions}
    properties = torch.cuda.get_device_properties(device)
    return {"device_name": properties.name, "device_total_bytes": properties.total_memory, "versions": versions}


def declared(strategy: Strategy, trial: Trial, place: Place) -> Declared:
    """What the strategy's class and the cell say of where things lie, for evidence to be held against."""
    cell = trial.parsed_cell
    return Declared(
        sharded=strategy.sharded, offloaded=strategy.offloaded, model_parallel=cell.model_parallel_size,
        precision=strategy.forced_settings(cell).get("precision", cell.settings.precision),
        data_parallel=max(1, place.world_size // cell.model_parallel_size), on_gpu=place.device.type == "cuda",
    )  # fmt: skip


def strategy_facts(strategy: Strategy, trial: Trial) -> dict[str, Any]:
    """Precision, optimizer in force, what the strategy forced, semantics switches."""
    cell = trial.parsed_cell
    forced = strategy.forced_settings(cell)
    return {
        "precision": forced.get("precision", cell.settings.precision),
        "optimizer": forced.get("optimizer", cell.settings.optimizer),
        "forced_settings": forced,
        "emulated": strategy.emulated(cell),
        "semantics": cell.settings.semantics,
        "semantics_switches": list(cell.semantics_switches),
    }


# -- values ----------------------------------------------------------------------------------------------------------


def read_rows(rows: list[dict[str, float | Tensor]]) -> list[dict[str, float]]:
    """The rows as numbers; all tensors are read from the device at once."""
    tensors = [value.detach().double().reshape(()) for row in rows for value in row.values() if isinstance(value, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else [])
    return [{name: next(numbers) if isinstance(value, Tensor) else float(value) for name, value in row.items()} for row in rows]


def add_up(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum of each key over the rows.

    >>> add_up([{"tokens": 1}, {"tokens": 2, "sequences": 1}])
    {'tokens': 3, 'sequences': 1}
    """
    total: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            total[name] = total.get(name, 0) + value
    return total


# -- endings ---------------------------------------------------------------------------------------------------------


def classify(error: BaseException, phase: str, step: int) -> Ending:
    """How a trial ended that raised `error`."""
    if isinstance(error, (Diverged, Invalid)):
        return Ending(outcome="diverged" if isinstance(error, Diverged) else "invalid", code=EXIT_OK, reason=str(error))
    if is_out_of_memory(error):
        requested = requested_bytes(str(error))
        asked = "an unknown amount" if requested is None else written(requested)
        return Ending(outcome="oom", code=EXIT_OOM, reason=f"out of memory in phase {phase} at step {step}: {asked} requested")
    text = str(error) if isinstance(error, BenchError) else f"{type(error).__name__}: {error}"
    return Ending(outcome="error", code=EXIT_ERROR, reason=" ".join(text.split())[:2000])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's or the host's memory ran out; allocators below torch say so in words only."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in words or "can't allocate memory" in words)


def requested_bytes(text: str) -> int | None:
    """The bytes that an allocator was asked for, as its message says.

    >>> requested_bytes("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has ...")
    1610612736
    """
    found = _REQUESTED.search(text)
    return None if found is None else int(float(found[1]) * _SIZES[found[2]])


def run_rank(trial: Trial) -> int:
    """Run this rank of `trial` and leave its part. Returns 0 (ok, diverged, invalid), 1 (error) or 75 (out of memory)."""
    rank = Rank(trial)
    try:
        ending = rank.run()
    except Exception as error:  # noqa: BLE001 (whatever a framework raises is an outcome)
        ending = classify(error, rank.heart.phase, rank.heart.step)
        if ending.outcome == "oom":
            rank.weigh_unfinished()
        if ending.code != EXIT_OK:
            with suppress(OSError):  # a log on a full disk is no reason to lose the part
                traceback.print_exc()
    rank.write(ending)
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if ending.code == EXIT_OK and dist.is_initialized():
        dist.destroy_process_group()
    return ending.code


def main(arguments: list[str] | None = None) -> int:
    """Run one rank of the trial in the file that is named."""
    (path,) = sys.argv[1:] if arguments is None else arguments
    return run_rank(load_trial(Path(path)))


if __name__ == "__main__":
    sys.exit(main())
