"""A driver that is killed and begun again, preemption, and a time limit of the scheduler's, on a real Slurm."""

from __future__ import annotations

from cluster_hosts import BRIDGE_HOST, end
from cluster_suite import wait_until


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


def test_a_time_limit_of_the_scheduler_leaves_nothing_running(bench):
    bench.plan("strategy: [ddp], nodes: [2]", steps=20000, timeout=600)
    bench.prepare()
    job = bench.submit(bench.the_block(), 2, "--time", "1")
    bench.await_step(1)
    wait_until(lambda: job not in bench.slurm.jobs(), 150, bench.said)
    bench.slurm.await_quiet(60)
    assert not bench.layout.block(bench.the_block()).exists()
    wait_until(lambda: not bench.slurm.hosts.with_text("bench.worker", "bench.launch.rank"), 10, bench.said)
