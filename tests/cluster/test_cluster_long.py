"""What else goes wrong on a cluster, on a real Slurm: drivers killed, preemption and requeue, limits, disks, locks of the dead."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from cluster_hosts import BRIDGE_HOST, command_of, end
from cluster_slurm import URGENT
from cluster_suite import A_WARM_START, wait_until

from bench.launch.manual import meeting_folder
from bench.record import load_record
from bench.saves import saves_folder
from bench.trial import load_trial

RANKS = ("bench.worker", "bench.launch.rank")

HOLD = """
import fcntl, os, sys, time
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""

BUILD = """
import os, sys, time
os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)  # as torch/utils/file_baton.py does
print("held", flush=True)
time.sleep(600)
"""

BREAK = (
    "import pathlib, sys; from bench.measure.build_locks import break_stale_locks; print(break_stale_locks([pathlib.Path(sys.argv[1])]))"
)


def test_a_driver_that_is_killed_and_begun_again_makes_no_block_twice(bench):
    bench.plan("strategy: [ddp], nodes: [2]", steps=150)
    first = bench.run()
    bench.await_step(1)
    end(bench.slurm.hosts.pids_of(BRIDGE_HOST, "coati-bench run", "snakemake"))
    first.wait()
    running = bench.slurm.jobs("RUNNING")
    assert len(running) == 1, bench.said()
    again = bench.run()
    assert again.wait(300) == 0, bench.said()
    assert f"jobs of an earlier run are still in the queue or running: {running[0]}; waiting for them" in bench.said()
    record = bench.record(1)
    assert (record.outcome, record.attempt) == ("ok", 1)
    assert record.provenance["scheduler"]["job"] == running[0]


# -- preemption, requeue, limits ---------------------------------------------------------------------------------


def preempt(bench):
    """Run a job that needs all nodes and may take them."""
    line = ("sbatch", "--wait", "--partition", URGENT, "--nodes", "3", "--exclusive", "--wrap", "hostname")
    done = bench.slurm.login(*line, "--output", str(bench.folder / "urgent.log"), seconds=180)
    assert done.returncode == 0, done.stderr


def test_a_preempted_job_is_requeued_and_goes_on_with_the_trials_that_it_has_not_finished(bench):
    bench.plan("strategy: [ddp], lora_rank: [0, 8], nodes: [2]", steps=100)
    driver = bench.run()
    wait_until(lambda: len(bench.without_record()) == 1, 240, bench.said)
    (interrupted,) = bench.without_record()
    bench.await_step(1, cell_id=interrupted)
    (finished,) = bench.records()
    (job,) = bench.slurm.jobs("RUNNING")
    preempt(bench)
    assert bench.without_record() == [interrupted]
    assert driver.wait(300) == 0, bench.said()
    records = {record.cell_id: record for record in bench.records()}
    assert records.pop(finished.cell_id) == finished
    record = records.pop(interrupted)
    assert (record.outcome, record.attempt) == ("ok", 1)
    assert {record.provenance["scheduler"]["job"], finished.provenance["scheduler"]["job"]} == {job}
    stopped = load_record(bench.layout.logs(interrupted, 0) / "attempt1" / "cancelled.json")
    assert (stopped.outcome, stopped.reason) == ("cancelled", "the supervisor got SIGTERM")
    assert (bench.layout.report / "report.html").exists()


def test_a_job_that_is_preempted_for_good_is_submitted_again_by_the_driver_that_waits_for_it(bench):
    bench.plan("strategy: [ddp], nodes: [2]", steps=100)
    bench.slurm.set_preemption("CANCEL")
    try:
        driver = bench.run()
        bench.await_step(1)
        (job,) = bench.slurm.jobs("RUNNING")
        preempt(bench)
    finally:
        bench.slurm.set_preemption("REQUEUE")
    assert driver.wait(400) == 0, bench.said()
    assert f"jobs preempted, and not started again by Slurm: {job}; what they had not finished is submitted again" in bench.said()
    record = bench.record(1)
    assert record.outcome == "ok"
    assert record.provenance["scheduler"]["job"] != job


def test_a_requeued_job_goes_on_in_mid_trial_where_the_trial_last_saved(bench):
    bench.plan("strategy: [ddp], nodes: [2]", steps=200, save_every=20)
    bench.prepare()
    job = bench.submit(bench.the_block(), 2, "--requeue")
    bench.await_step(1)
    saves = saves_folder(load_trial(bench.layout.logs(bench.the_cell(), 0) / "trial.json"))
    wait_until(lambda: list(saves.glob("step*0/save.json")), 120, bench.said)
    done = bench.slurm.login("scontrol", "requeue", job)
    assert done.returncode == 0, done.stderr
    record = bench.record(240)
    assert record.outcome == "ok", record.reason
    assert record.resumed_step >= 20
    assert len(record.lead.series["loss"]) == 200
    assert (record.provenance["scheduler"]["job"], record.provenance["scheduler"]["restarts"]) == (job, "1")
    bench.slurm.await_quiet(60)
    assert bench.slurm.hosts.with_text(*RANKS) == []


def test_a_job_that_is_cancelled_leaves_no_record_and_the_next_one_repeats_the_trial(bench):
    bench.plan("strategy: [ddp], nodes: [2]", steps=300)
    bench.prepare()
    job = bench.submit(bench.the_block(), 2)
    bench.await_step(1)
    bench.slurm.login("scancel", "--batch", "--signal=TERM", job)
    bench.slurm.await_quiet(90)
    assert not bench.layout.record(bench.the_cell(), 0).exists()
    assert (bench.layout.logs(bench.the_cell(), 0) / "cancelled.json").exists()
    bench.submit(bench.the_block(), 2)
    assert bench.record(240).outcome == "ok"


def test_a_time_limit_of_the_scheduler_is_the_outcome_of_a_trial_that_had_all_of_it_and_leaves_nothing_running(bench):
    bench.plan("strategy: [ddp], nodes: [2]", steps=20000, timeout=600)
    bench.prepare()
    job = bench.submit(bench.the_block(), 2, "--time", "1")
    bench.await_step(1)
    wait_until(lambda: job not in bench.slurm.jobs(), 180, bench.said)
    bench.slurm.await_quiet(120)
    assert not bench.layout.block(bench.the_block()).exists()
    assert bench.slurm.hosts.with_text(*RANKS) == []
    record = bench.record(10)
    assert record.outcome == "timeout"
    assert record.reason == f"the time limit of Slurm's job {job} ended it: 60 s, all of which it had; a longer one would be right"
    assert 0 <= record.observed["time_to_detection_seconds"] < 10


def test_a_typed_node_that_stands_still_is_noticed_and_leaves_nothing_running(bench):
    bench.plan("strategy: [ddp], nodes: [2]", steps=20000, timeout=600)
    bench.prepare()
    target, hosts = str(bench.layout.cell(bench.the_cell())), bench.slurm.hosts
    options = ("--nodes", "2", "--rendezvous", "cbn-n1:29500")
    nodes = [bench.start(hosts.names[node], "trial", target, *options, "--node-rank", str(node)) for node in (0, 1)]
    bench.await_step(1)
    (still,) = [pid for pid in hosts.pids_of("cbn-n2", "--node-rank 1") if "coati-bench trial" in command_of(pid)]
    os.kill(still, signal.SIGSTOP)
    try:
        record = bench.record(180)
    finally:
        os.kill(still, signal.SIGCONT)
    assert record.outcome == "error"
    assert record.reason.startswith("node 1 (cbn-n2) was silent for more than 30 s: its command or its link is gone"), record.reason
    assert 30 <= record.observed["time_to_detection_seconds"] < 120
    assert [node.wait(120) for node in nodes] == [0, 0], bench.said()
    assert meeting_folder(bench.layout.logs(bench.the_cell(), 0)).is_dir()
    assert hosts.with_text(*RANKS) == []


# -- the shared disk ---------------------------------------------------------------------------------------------


def drafts(bench):
    """Files and folders that a write left half done."""
    return [path for path in bench.layout.root.rglob(".*.json.*") if path.is_file() and path.suffix != ".lock"]


def test_a_disk_that_fills_up_in_mid_trial_ends_it_and_its_record_waits_for_room(bench_on_disk, disk):
    bench = bench_on_disk
    bench.plan("strategy: [ddp], nodes: [2]", steps=20000, timeout=600, save_every=20)
    bench.prepare()
    bench.submit(bench.the_block(), 2)
    saves = bench.layout.logs(bench.the_cell(), 0).with_name("0-saves")
    wait_until(lambda: list(saves.glob("step*0/save.json")), 240, bench.said)
    log = bench.folder / "block.log"

    def told():
        disk.fill()  # again and again: a save that is replaced gives its room back
        return "the record cannot be written: No space left on device; tried again for 60 s" in log.read_text()

    wait_until(told, 240, bench.said)
    assert not bench.layout.record(bench.the_cell(), 0).exists()
    assert bench.slurm.hosts.with_text(*RANKS) == []
    disk.free()
    record = bench.record(60)
    assert record.outcome == "error"
    assert "no space is left for " in record.reason, record.reason
    assert record.observed["time_to_detection_seconds"] is not None
    wait_until(bench.layout.block(bench.the_block()).exists, 60, bench.said)
    bench.slurm.await_quiet(60)
    assert drafts(bench) == []


def test_a_disk_that_turns_read_only_ends_the_block_with_an_error_and_the_next_one_repeats_the_trial(bench_on_disk, disk):
    bench = bench_on_disk
    bench.plan("strategy: [ddp], nodes: [2]", steps=150, heartbeat=20)
    bench.prepare()
    job = bench.submit(bench.the_block(), 2)
    bench.await_step(1)
    disk.turn_read_only()
    try:
        bench.slurm.await_quiet(300)
        said = (bench.folder / "block.log").read_text()
        path = bench.layout.record(bench.the_cell(), 0)
        assert f"coati-bench: {path}: the record cannot be written: Read-only file system; free space or rights are needed there" in said
        assert bench.slurm.login("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").stdout.strip() == "FAILED", said
        assert bench.slurm.hosts.with_text(*RANKS) == []
        assert not path.exists()
        assert not bench.layout.block(bench.the_block()).exists()
        assert drafts(bench) == []
    finally:
        disk.turn_writable()
    bench.submit(bench.the_block(), 2)
    assert bench.record(240).outcome == "ok"


# -- locks of the dead -------------------------------------------------------------------------------------------


def held(bench, host, program, path):
    """A process on a host that holds a lock at `path` as long as it lives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = bench.folder / f"{path.name}.log"
    process = bench.slurm.hosts.popen(host, sys.executable, "-c", program, str(path), log=log)
    wait_until(lambda: "held" in log.read_text(), 60, log.read_text)
    return process


def kill(process):
    process.kill()
    process.wait()


def test_the_lock_of_a_fetch_that_died_on_another_host_does_not_hold_up_the_next_fetch(bench):
    cache = Path(bench.environment["COATI_BENCH_CACHE"]).with_name("cache-of-the-dead")
    bench.environment["COATI_BENCH_CACHE"] = str(cache)
    holder = held(bench, "cbn-n1", HOLD, cache / "synthetic-instruct.guard")
    fetch = bench.start("cbn-n2", "data", "fetch", "synthetic-instruct", log="fetch.log")
    try:
        wait_until(lambda: "another process is fetching it; waiting" in (bench.folder / "fetch.log").read_text(), 60, bench.said)
        assert fetch.poll() is None
    finally:
        kill(holder)
    assert fetch.wait(60) == 0, bench.said()


def test_a_warm_start_that_died_on_one_host_is_made_on_another(bench):
    bench.write_plan(A_WARM_START)
    *others, last = bench.lines_once()  # data, tokenizer, and the weights that the reward model begins from
    for line in others:
        bench.call(*line)
    done = Path(last[-1])
    first = bench.start("cbn-n1", *last, log="first.log")
    wait_until((done.parent / "work" / "heartbeat0.json").exists, 120, bench.said)
    for pid in bench.slurm.hosts.pids_of("cbn-n1", "coati-bench", "bench."):
        os.kill(pid, signal.SIGKILL)
    first.wait()
    again = bench.start("cbn-n2", *last, log="again.log")
    assert again.wait(240) == 0, bench.said()
    assert json.loads(done.read_text())["outcome"] == "ok"


def test_a_build_lock_whose_builder_died_on_another_host_is_broken(bench):
    lock = bench.folder / "extensions" / "kernel" / "lock"
    builder = held(bench, "cbn-n1", BUILD, lock)
    line = (sys.executable, "-c", BREAK, str(bench.folder / "extensions"))
    seen = bench.slurm.hosts.run("cbn-n2", *line, env=bench.environment)
    assert (seen.stdout.strip(), lock.exists()) == ("[]", True), seen.stderr
    kill(builder)
    bench.slurm.hosts.run("cbn-n2", *line, env=bench.environment)
    assert not lock.exists()
