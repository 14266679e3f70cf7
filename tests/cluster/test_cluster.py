"""Suites on a real Slurm of three hosts, by Snakemake, sbatch, srun and torchrun; trials typed on every host; and what goes wrong there."""

from __future__ import annotations

import shutil

import pytest
from cluster_hosts import BRIDGE_HOST, command_of, end
from cluster_suite import STAGES_IN_AN_IMAGE, wait_until

from bench.container.runtime import find_image
from bench.errors import UserError
from bench.launch.manual import meeting_folder

TOLERANCE = 1e-4
RANKS = ("bench.worker", "bench.launch.rank")


def losses(record):
    return record.lead.series["loss"]


def last_host(bench):
    """The last host where ranks run."""
    return [name for name in bench.slurm.hosts.names if bench.slurm.hosts.pids_of(name, *RANKS)][-1]


def agents_of_last_host(bench):
    agents = bench.slurm.hosts.pids_of(last_host(bench), "-m torch.distributed.run")
    return [pid for pid in agents if "bench.launch.guard" not in command_of(pid)]


def test_losses_at_one_two_and_three_nodes_are_those_of_one_process(bench):
    bench.plan("strategy: [naive, ddp, zero2], lora_rank: [0, 8], nodes: [1, 2, 3]")
    assert bench.run().wait(540) == 0, bench.said()
    records = {(it.cell["strategy"], it.cell["lora_rank"], it.cell["nodes"]): it for it in bench.records()}
    assert len(records) == 14
    for (_, lora_rank, nodes), record in records.items():
        assert (record.outcome, record.launcher) == ("ok", "srun"), record.reason
        assert losses(record) == pytest.approx(losses(records["naive", lora_rank, 1]), abs=TOLERANCE)
        assert [(part.node, part.world_size) for part in record.parts] == [(node, nodes) for node in range(nodes)]
        hosts = [part.hostname for part in record.parts]
        assert len(set(hosts)) == nodes
        assert [machine["hostname"] for machine in record.provenance["machines"]] == hosts
        assert record.provenance["node_differences"] == {}
        assert record.simulated_nodes == (nodes > 1)  # by the kernel that these hosts share; real nodes have one each
        assert record.provenance["scheduler"]["scheduler"] == "slurm"
    jobs = bench.slurm.login("squeue", "-h", "-t", "all", "-o", "%i %D %k").stdout
    assert {line.split()[1] for line in jobs.splitlines() if "rule_block" in line} == {"1", "2", "3"}
    for record in records.values():
        (seen,) = bench.allocations_of(record) or [None]
        assert (seen and seen["hosts"]) == ([part.hostname for part in record.parts] if len(record.parts) > 1 else None)
    assert (bench.layout.report / "report.html").exists()


def test_every_stage_runs_on_two_nodes_in_the_image(bench):
    image = image_built_here()
    bench.write_plan(STAGES_IN_AN_IMAGE.format(image=image.file))
    assert bench.run().wait(300) == 0, bench.said()
    records = {record.cell["stage"]: record for record in bench.records()}
    assert set(records) == {"sft", "rm", "ppo"}
    for record in records.values():
        assert (record.outcome, record.launcher) == ("ok", "srun"), record.reason
        assert [part.world_size for part in record.parts] == [2, 2]
        assert len({part.hostname for part in record.parts}) == 2
        seen = [machine["container"] for machine in record.provenance["machines"]]
        assert seen == [image.file.name, image.file.name]  # the name carries the digest


def image_built_here():
    """The cpu image, if the user's cache has it and Apptainer is there: building it takes minutes, so that is not done here."""
    if shutil.which("apptainer") is None:
        pytest.skip("no cells in an image: Apptainer is not installed")
    try:
        return find_image("cpu")
    except UserError as error:
        pytest.skip(f"no cells in an image: {error}")


def test_lines_typed_on_three_hosts_in_any_order_make_one_record(bench):
    bench.plan("strategy: [ddp], nodes: [3]")
    bench.prepare()
    hosts, commands = bench.slurm.hosts, []
    lines = bench.typed_lines(hosts.names[0])
    for node in (2, 0, 1):
        commands.append(bench.start(hosts.names[node], *lines[node], log=f"node{node}.log"))
        wait_until((meeting_folder(bench.layout.logs(bench.the_cell(), 0)) / f"node{node}.json").exists, 60, bench.said)
    assert [command.wait(240) for command in commands] == [0, 0, 0], bench.said()
    record = bench.record(1)
    assert (record.outcome, record.launcher, record.provenance["missing_nodes"]) == ("ok", "manual", []), record.reason
    assert [(part.node, part.hostname, part.world_size) for part in record.parts] == [(node, hosts.names[node], 3) for node in range(3)]
    assert all("ddp full 3x1 node" in (bench.folder / f"node{node}.log").read_text() for node in (1, 2))


def test_a_host_that_never_comes_is_named(bench):
    bench.plan("strategy: [ddp], nodes: [3]")
    bench.prepare()
    target, hosts = str(bench.layout.cell(bench.the_cell())), bench.slurm.hosts
    commands = [
        bench.start(
            hosts.names[node], "trial", target, "--nodes", "3", "--node-rank", str(node), "--rendezvous", "cbn-n1:29500", "--wait", "12"
        )
        for node in (0, 1)
    ]
    assert [command.wait(180) for command in commands] == [0, 0], bench.said()
    record = bench.record(1)
    assert record.outcome == "error"
    assert record.reason.startswith("node 2 never came: waited 12 s; seen: node 0 (cbn-n1), node 1 (cbn-n2)")
    assert record.attempt == 1


def test_an_agent_that_is_killed_ends_the_trial_on_all_nodes(bench):
    bench.plan("strategy: [ddp], nodes: [2]", steps=2000)
    bench.prepare()
    bench.submit(bench.the_block(), 2)
    bench.await_step(1)
    end(agents_of_last_host(bench))
    record = bench.record(120)
    assert (record.outcome, record.attempt) == ("error", 1), record.reason
    assert record.observed["time_to_detection_seconds"] < 60
    bench.slurm.await_quiet(120)
    assert bench.slurm.hosts.with_text(*RANKS) == []


def test_a_node_cut_off_in_mid_step_is_a_timeout_and_its_ranks_end_by_themselves(bench):
    bench.plan("strategy: [ddp], nodes: [2]", steps=2000, heartbeat=20)
    bench.prepare()
    bench.submit(bench.the_block(), 2)
    bench.await_step(1)
    lost = last_host(bench)
    bench.slurm.hosts.cut(lost)
    try:
        record = bench.record(120)
        assert record.outcome == "timeout", record.reason
        assert " was silent for more than 20 s (phase train, step " in record.reason
        assert 20 <= record.observed["time_to_detection_seconds"] < 80
        wait_until(lambda: not bench.slurm.hosts.pids_of(lost, *RANKS), 150, bench.said)
    finally:
        bench.slurm.hosts.mend(lost)
    bench.slurm.await_quiet(120)


def test_a_trial_over_its_time_limit_is_ended_on_all_nodes(bench):
    bench.plan("strategy: [ddp], nodes: [2]", steps=5000, timeout=20)
    bench.prepare()
    bench.submit(bench.the_block(), 2)
    record = bench.record(240)
    assert (record.outcome, record.attempt) == ("timeout", 1)
    assert record.reason.startswith("longer than 20 s (")
    assert record.observed["time_to_detection_seconds"] < 60
    bench.slurm.await_quiet(120)
    assert bench.slurm.hosts.with_text(*RANKS) == []


def test_a_controller_that_is_restarted_loses_nothing(bench):
    bench.plan("strategy: [ddp], nodes: [2]", steps=100)
    driver = bench.run()
    bench.await_step(1)
    bench.slurm.stop_controller()
    for program in ("scontrol", "squeue"):  # the driver asks and is not answered; when scontrol is not, the bare plugin turns to sacct
        wait_until(lambda asks=program: bench.slurm.hosts.pids_of(BRIDGE_HOST, asks), 120, bench.said)
    assert driver.poll() is None
    bench.slurm.start_controller()
    assert driver.wait(300) == 0, bench.said()
    assert bench.record(1).outcome == "ok"
