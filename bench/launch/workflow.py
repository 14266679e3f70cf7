"""`coati-bench run`: a suite from its file to its report, by Snakemake. Torch-free.

Snakemake and all below it run under a guard (bench/launch/guard.py), so whatever ends this process ends them; what was
finished stays finished, and the same command goes on from there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
from rich.filesize import decimal

from bench.data.sources import resolve
from bench.errors import MachineError, UserError
from bench.launch.follow import Follower
from bench.launch.guard import Ended, Guarded
from bench.launch.queue import PreemptionWatch, Queue, check_partitions, check_slurm, uses_slurm
from bench.launch.readiness import check_readiness, forget_lost_images, forget_unfinished
from bench.launch.runlock import Held, hold
from bench.layout import Layout
from bench.matrix import Plan, make_plan, save_plan
from bench.needs import weights_on_disk_bytes
from bench.plan_text import plan_text
from bench.record import write_json

SOURCE_TREE = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 15.0
"""What blocks get after SIGTERM to end their ranks and leave what they know."""
LOOK_SECONDS = 0.5
MOST_SUBMISSIONS = 10
"""How often blocks are submitted again that were preempted for good."""
PATIENT = "bench.launch.patient_slurm"
"""The module that is Snakemake where jobs go to Slurm."""
SETTINGS = ".snakemake.json"
"""What the Snakefile is told, beside the plan."""
INTERRUPTED, CANNOT = 130, 3


def run_suite(
    suite: Path, *, profile: str = "local", results: Path = Path("results"), dry_run: bool = False, container: str | None = None
) -> int:
    """Run the suite in the file `suite` whole, or what of it is not done yet; the report goes to results/<suite>/report.

    Returns 0 when everything planned has a record and the report is made, whatever the outcomes; 3 when something could not be
    made, 2 if only for mistakes of the user's (data that cannot be read), 130 when interrupted. Raises UserError or MachineError
    before anything is started.
    """
    plan = make_plan(suite, container=container)
    root = results / plan.suite
    layout = Layout(root.absolute() if str(root).startswith("-") else root)  # in a shell line a leading dash would be an option
    folder = _check_installation(profile, layout.root)
    if dry_run:
        say(plan_text(plan))
        say(f"Dry run: nothing was done; {Follower(plan, layout, say).recorded_text()}.")
        return 0
    if profile == "local":
        check_readiness(plan, layout.root)
    queue = Queue(layout.root) if uses_slurm(folder) else None
    if queue:
        check_slurm()
        check_partitions(folder)
    with hold(layout.root) as lock:
        save_plan(plan, layout.plan)
        try:
            if queue:
                queue.wait(say)
            ended = _run(suite, plan, layout, folder, lock, queue)
        except KeyboardInterrupt:
            ended = INTERRUPTED
        if ended == INTERRUPTED:
            cancelled = queue.cancel() if queue else []
            say(f"jobs cancelled: {', '.join(cancelled)}") if cancelled else None
            say(f"interrupted; nothing runs any more. The same command goes on from here: coati-bench run {suite}")
        return ended


def _run(suite: Path, plan: Plan, layout: Layout, profile: Path, lock: Held, queue: Queue | None) -> int:
    for text in [*forget_unfinished(plan, layout), *forget_lost_images(plan, layout)]:
        say(text)
    _write_settings(layout.root)
    command = snakemake_command(layout.root, profile, queue)
    _clear_stale_lock(command, was_killed=lock.was_killed)
    follower, log = Follower(plan, layout, say), layout.root / "logs" / "snakemake.log"
    _announce(suite, plan, layout, follower)
    before, offset = _modified(layout), log.stat().st_size if log.exists() else 0
    for _ in range(MOST_SUBMISSIONS):
        ended, lost = _follow(command, follower, log, lock, queue)
        if not lost:
            break
        say(f"jobs preempted, and not started again by Slurm: {', '.join(lost)}; what they had not finished is submitted again")
        _clear_stale_lock(command, was_killed=False)
    else:
        raise MachineError(
            f"{log}: jobs were preempted {MOST_SUBMISSIONS} times; try again when the cluster is less busy, or ask for requeue"
        )
    if ended is None:
        return INTERRUPTED
    if ended.code != 0:
        return _tell_failure(ended, layout, log, offset)
    if _modified(layout) == before:
        say("Nothing to do: every trial has its record and the report is up to date.")
    _tell_results(suite, layout, follower.outcomes())
    return 0


def _follow(command: list[str], follower: Follower, log: Path, lock: Held, queue: Queue | None) -> tuple[Ended | None, list[str]]:
    """Run `command` under guard to its end and say what happens.

    Returns how it ended, None if this process was interrupted; and the jobs that were preempted for good, if it was ended for them.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    watch = PreemptionWatch(queue) if queue else None
    guarded = Guarded(command, environment=_environment(), log=log, grace=GRACE_SECONDS, keep=(lock.descriptor,))
    try:
        while (ended := guarded.wait(LOOK_SECONDS)) is None:
            follower.look()
            if watch and (lost := watch.lost()):
                return guarded.end(), lost
    except KeyboardInterrupt:
        say("interrupted; ending what runs ...")
        guarded.end()
        follower.look()
        return None, []
    follower.look()
    return ended, []


def snakemake_command(root: Path, profile: Path, queue: Queue | None = None) -> list[str]:
    """The Snakemake call that makes the report of the suite whose folder is `root`; jobs carry the name that `queue` looks for."""
    named = ["--slurm-jobname-prefix", queue.prefix] if queue else []
    snakefile, settings = str(SOURCE_TREE / "Snakefile"), root.absolute() / SETTINGS
    return [
        sys.executable, "-m", PATIENT if queue else "snakemake", "--snakefile", snakefile, "--profile", str(profile), "--nocolor",
        *named, "--configfile", str(settings),
    ]  # fmt: skip


def _write_settings(root: Path) -> None:
    """Leave the folder of the suite where Snakemake reads it; what is written behind `--config` is parsed as YAML, in part."""
    write_json({"suite": str(root)}, root / SETTINGS)


def _environment() -> dict[str, str]:
    """What Snakemake gets: this environment, in which rules find `coati-bench` and the Snakefile finds `bench`."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    python_path = os.pathsep.join(filter(None, [str(SOURCE_TREE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PATH": path, "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"}


def _check_installation(profile: str, root: Path) -> Path:
    """Return the folder of `profile`. Raises UserError if there is none, MachineError if the installation is not whole."""
    profiles = SOURCE_TREE / "profiles"
    known = sorted(path.parent.name for path in profiles.glob("*/config.yaml"))
    if not known or not (SOURCE_TREE / "Snakefile").exists():
        raise MachineError(f"{SOURCE_TREE}: the Snakefile and profiles are missing; run from a checkout that `make install` installed")
    if profile not in known:
        raise UserError(f"--profile {profile}: there is no such profile; choose among {', '.join(known)}")
    if not Path(sys.executable).with_name("coati-bench").exists():
        raise MachineError(f"coati-bench is not installed beside {sys.executable}, and rules call it by name; `make install` installs it")
    if root.parent.exists() and not root.parent.is_dir():
        raise UserError(f"--results {root.parent}: a file is there; name a folder, which need not exist yet")
    if set("{}\n") & set(str(root)):
        raise UserError(f"--results {root.parent}: Snakemake takes braces in a path for wildcards; choose another folder")
    if any("\ud800" <= letter <= "\udfff" for letter in str(root)):
        raise UserError(f"--results {str(root.parent)!a}: a name that is no UTF-8 stands in no plan; choose another folder")
    return profiles / profile


def _clear_stale_lock(command: list[str], *, was_killed: bool) -> None:
    """Clear the lock that a killed Snakemake left in this folder, unless one runs here."""
    locks = Path(".snakemake/locks")
    if not locks.is_dir() or not any(locks.iterdir()) or _snakemake_runs_here():
        return
    if was_killed:
        say("the last run of this suite was killed; its lock is cleared")
    subprocess.run([*command, "--unlock"], env=_environment(), capture_output=True, check=False)


def _snakemake_runs_here() -> bool:
    here = str(Path.cwd())
    processes = psutil.process_iter(["cmdline", "cwd", "status"])
    return any(
        any(Path(word).name in ("snakemake", PATIENT) for word in info["cmdline"] or ())
        and info["cwd"] == here
        and info["status"] != psutil.STATUS_ZOMBIE
        for info in (process.info for process in processes)
    )


def _announce(suite: Path, plan: Plan, layout: Layout, follower: Follower) -> None:
    numbers = {"cell": len(plan.cells), "trial": plan.trials, "block": len(plan.blocks)}
    cells, trials, blocks = (f"{number} {name}{'s' * (number != 1)}" for name, number in numbers.items())
    say(f"{suite}: {cells} x {trials} in {blocks}, {len(plan.skipped)} skipped; {follower.recorded_text()}")
    absent = [resolve(name) for name in plan.data if not layout.data(name).exists()]
    if absent:
        sizes = (f"{source.name} ({decimal(source.bytes)})" if source.bytes else source.name for source in absent)
        say(f"data to fetch, generate or read: {', '.join(sizes)}")
    if disk := weights_on_disk_bytes(plan):
        say(f"disk for weights: {decimal(disk)}")
    say(f"results: {layout.root}; everything that is printed: {layout.root / 'logs' / 'snakemake.log'}")


def _tell_failure(ended: Ended, layout: Layout, log: Path, offset: int) -> int:
    """Say why not everything was made, and make a report of what is there."""
    with log.open("rb") as file:
        file.seek(offset)
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    told = list(dict.fromkeys(line for line in lines if line.startswith("coati-bench: "))) or lines[-15:]
    say(f"Not everything could be made (Snakemake ended with {ended.code}); {log} has all of it:")
    say("\n".join(f"  {line}" for line in told))
    if layout.records.is_dir() and any(layout.records.glob("*/*.json")):
        program = str(Path(sys.executable).with_name("coati-bench"))
        done = subprocess.run([program, "report", str(layout.records), "--output", str(layout.report)], check=False, capture_output=True)
        if done.returncode == 0:
            say(f"A report of what is there: {layout.report / 'report.html'}")
    codes = set(re.findall(r"returned non-zero exit status (\d+)\.$", "\n".join(lines), re.MULTILINE))
    return UserError.exit_code if codes == {str(UserError.exit_code)} else CANNOT


def _tell_results(suite: Path, layout: Layout, outcomes: Counter[str]) -> None:
    failed = {name: count for name, count in sorted(outcomes.items()) if name != "ok"}
    if failed:
        counts = ", ".join(f"{count} {name}" for name, count in failed.items())
        say(f"Not ok: {counts}. They are results, in the report with their reasons; coati-bench retry {suite} --outcome "
            f"{','.join(failed)} sets them aside for another run.")  # fmt: skip
    for sentence in headline(layout.report / "report.md"):
        say(sentence)
    say(f"Report: {layout.report / 'report.html'}")


def headline(report: Path) -> list[str]:
    """The sentences at the head of report.md, as plain text."""
    sentences = []
    for line in report.read_text(encoding="utf-8").splitlines()[1:]:
        if line.startswith(("|", "#")):
            break
        if line.strip():
            sentences.append(line.replace("\\", ""))
    return sentences


def _modified(layout: Layout) -> int | None:
    report = layout.report / "report.html"
    return report.stat().st_mtime_ns if report.exists() else None


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)
