"""Runs a trial from outside its processes and always leaves a record. Torch-free.

One trial is at most three tries: launch and network incidents before the first step are tried again, nothing else is. A
cancelled trial is not finished: its record is left beside its logs (`cancelled.json`), not among the records, so that the
next run repeats it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.errors import RecordError
from bench.launch.allotment import Allotment
from bench.launch.assemble import assemble, make_provenance
from bench.launch.classify import SIGTERM, Seen, Verdict, classify
from bench.launch.command import Agents
from bench.launch.environment import host_threads, rank_environment
from bench.launch.job import AbsentError, Job, Launcher, LaunchError
from bench.launch.oom import oom_kills
from bench.launch.parent import ForkParent
from bench.launch.pool import BusyError, LackingError, hold_devices
from bench.launch.processes import proportional_bytes, resident_bytes, signal_name
from bench.launch.rank import name_supervisor, read_process
from bench.launch.readings import Readings, flags, foreign_processes, observe, other_nodes
from bench.launch.watch import Stop, Watched, dump_stacks, listening, watch
from bench.layout import telemetry_path
from bench.measure.build_locks import break_stale_locks
from bench.measure.nvml import Device
from bench.measure.preflight import preflight_flags
from bench.measure.provenance import utc_now
from bench.measure.telemetry import Telemetry
from bench.record import Part, Record, load_part, save_record
from bench.saves import drop_saves
from bench.shared_disk import patiently, refusal
from bench.trial import Trial, save_trial

MOST_TRIES = 3
LOG_LINES, LOG_BYTES = 12, 4000
"""How much of a log's end goes into a reason."""
SHARED_MEMORY = "trials side by side shared the device's memory, so it says nothing of what the strategy needs"
STALE_LOCK = "stale build lock broken"
"""Flag: an earlier build of kernels had died, and this trial may have built them anew."""

_SIGNAL_SECONDS = 1.0
"""A signal to the whole job may reach the ranks before it reaches us."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """What one try gave."""

    verdict: Verdict
    parts: tuple[Part, ...] = ()
    observed: dict[str, Any] | None = None
    flags: tuple[str, ...] = ()


def run_trial(
    trial: Trial,
    record_path: Path,
    *,
    parent: ForkParent | None = None,
    agents: Launcher | None = None,
    stop: Stop | None = None,
    allotment: Allotment | None = None,
) -> Record:
    """Run `trial` to its end and return its record, which is written to `record_path` unless the trial was cancelled.

    `parent` forks the ranks of cells with `launcher: fork` (one is made for this trial if none is given), `agents` starts the
    others. `allotment` is that of an allocation that this trial has to itself, whose end is a `timeout`. Raises RecordError if
    a record is there already, MachineError if the record cannot be written.
    """
    if record_path.exists():
        raise RecordError(f"{record_path}: a record is never rewritten; remove it (`coati-bench retry`) to run the trial again")
    started = utc_now()
    with nullcontext(stop) if stop else listening() as heard, _launcher(trial, parent, agents) as launcher:
        attempt, tried = 0, Try(verdict=Verdict("cancelled", "asked to stop before the start"))
        while attempt < MOST_TRIES and not heard.asked:
            attempt += 1
            tried = _try_with_devices(trial, launcher, heard, telemetry_path(record_path))
            if not tried.verdict.incident or heard.wait(attempt):
                break
        trial_file = Path(trial.work) / "trial.json"
        variables = rank_environment(threads=host_threads(trial, launcher.simulated_nodes(trial)))
        command = launcher.command(trial, trial_file)
        provenance = make_provenance(trial, command=command, variables=variables, started=started, ended=utc_now())
        if heard.asked:
            over = allotment and allotment.verdict(heard.asked)
            tried = replace(tried, verdict=over or Verdict("cancelled", f"the supervisor got {heard.asked}"))
        record = assemble(
            trial, tried.verdict, launcher=launcher.name, simulated_nodes=launcher.simulated_nodes(trial), attempt=max(attempt, 1),
            parts=list(tried.parts), observed=tried.observed, provenance=provenance, more_flags=list(tried.flags),
        )  # fmt: skip
        leave(record, record_path, Path(trial.work), stop=heard)
    drop_saves(trial, record.outcome)
    return record


def leave(record: Record, path: Path, work: Path, stop: Stop | None = None) -> None:
    """Write a record, a cancelled one beside the logs. Raises MachineError if the disk goes on refusing it."""
    target = work / "cancelled.json" if record.outcome == "cancelled" else path

    def write() -> None:
        target.unlink(missing_ok=True) if record.outcome == "cancelled" else None
        save_record(record, target)

    patiently(write, target, "the record", (stop or Stop()).wait)


@contextmanager
def _launcher(trial: Trial, parent: ForkParent | None, agents: Launcher | None) -> Iterator[Launcher]:
    if trial.parsed_cell.settings.launcher != "fork":
        yield agents or Agents()
    elif parent is not None:
        yield parent
    else:
        with ForkParent(Path(trial.work).parent / f"{Path(trial.work).name}-parent.log") as own:
            yield own


def _try_with_devices(trial: Trial, launcher: Launcher, stop: Stop, telemetry: Path) -> Try:
    """One try on idle devices that nobody else holds, or on the CPU."""
    cell = trial.parsed_cell
    try:
        if cell.settings.device == "cpu":
            return _try(trial, launcher, stop, [], telemetry)
        with hold_devices(launcher.devices_here(trial), shared=trial.limits.shares_devices, stopped=stop.wait) as devices:
            broken = break_stale_locks()
            tried = _try(trial, launcher, stop, devices, telemetry)
            return replace(tried, flags=(*tried.flags, *([STALE_LOCK] if broken else [])))
    except BusyError as problem:
        return Try(verdict=Verdict("busy", str(problem)))
    except AbsentError as problem:
        observed = None if problem.waited_seconds is None else {"time_to_detection_seconds": problem.waited_seconds}
        return Try(verdict=Verdict("error", str(problem)), observed=observed)
    except LackingError as problem:
        return Try(verdict=Verdict("error", str(problem)))
    except LaunchError as problem:
        return Try(verdict=Verdict("error", str(problem), incident=True))
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        return Try(verdict=Verdict("error", f"the work folder cannot be written: {problem}"))


def _try(trial: Trial, launcher: Launcher, stop: Stop, devices: list[Device], telemetry_file: Path) -> Try:
    work = Path(trial.work)
    clean(work)
    save_trial(trial, work / "trial.json")
    name_supervisor(work)
    kills = oom_kills()
    job = launcher.start(trial, work / "trial.json", [device.uuid for device in devices])
    try:
        with Telemetry(job.pids, resident=resident_bytes, proportional=proportional_bytes, devices=devices) as telemetry:
            watched = watch(job, trial, stop)
        if watched.end in ("silent", "timeout"):
            dump_stacks(watched.processes)
    finally:
        job.end()
    if any(process.code == SIGTERM for process in watched.processes.values()):
        stop.wait(_SIGNAL_SECONDS)
    seen = _gather(trial, job, watched, stop, 0 if kills is None else (oom_kills() or 0) - kills)
    verdict = classify(seen)
    own, others = Readings.of(telemetry), other_nodes(trial)
    if trial.limits.shares_devices:
        verdict = verdict._replace(reason=f"{verdict.reason}; {SHARED_MEMORY}") if verdict.outcome == "oom" else verdict
    elif (strangers := foreign_processes(own, others)) and verdict.outcome == "ok":
        verdict = Verdict("invalid", f"a process of somebody else computed on the devices meanwhile: {', '.join(strangers)}")
    observed = _observed(trial, watched) | observe(own, others, seen.parts, telemetry_file)
    parts = tuple(seen.parts.values())
    return Try(verdict=verdict, parts=parts, observed=observed, flags=(*flags(own, others), *preflight_flags(parts)))


def _gather(trial: Trial, job: Job, watched: Watched, stop: Stop, kills: int) -> Seen:
    ranks = range(trial.parsed_cell.world_size)
    parts = {rank: part for rank in ranks if (part := _part(trial.part_path(rank)))}
    return Seen(
        world_size=len(ranks), limits=trial.limits, watched=watched, cancelled=stop.asked, parts=parts,
        logs={rank: tail(trial.log_path(rank)) for rank in ranks}, trouble=job.trouble(),
        launcher_log="\n".join(filter(None, map(tail, job.log_paths()))), oom_kills=kills, space=refusal(Path(trial.work)),
    )  # fmt: skip


def _part(path: Path) -> Part | None:
    """A rank's part; one that is not there or cannot be used is a missing one."""
    try:
        return load_part(path)
    except RecordError:
        return None


def _observed(trial: Trial, watched: Watched) -> dict[str, Any]:
    notes = {rank: read_process(Path(trial.work), rank) for rank in range(trial.parsed_cell.world_size)}
    ends = {str(rank): signal_name(note.code) for rank, note in notes.items() if note and note.code is not None}
    by_itself = {rank for rank, note in watched.processes.items() if note.code is not None}
    return {
        "seconds": watched.seconds,
        "time_to_detection_seconds": watched.detection_seconds,
        "exits": ends,
        "ended_by_supervisor": [rank for rank, note in notes.items() if note and rank not in by_itself],
        "last_seen": {str(rank): {"phase": place.phase, "step": place.step} for rank, place in watched.places.items()},
    }


def clean(work: Path) -> None:
    """Move what an earlier try left in `work` into `attempt<n>/`, so that this one starts in an empty folder."""
    work.mkdir(parents=True, exist_ok=True)
    left = [path for path in work.iterdir() if not (path.is_dir() and path.name.startswith("attempt"))]
    if left:
        folder = work / f"attempt{1 + len(list(work.glob('attempt*')))}"
        folder.mkdir()
        for path in left:
            path.rename(folder / path.name)


def tail(path: Path) -> str:
    """The last lines of a log, without what is no text."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LOG_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line for line in text.replace("\0", "").splitlines() if line.strip()]
    return "\n".join(lines[-LOG_LINES:])
