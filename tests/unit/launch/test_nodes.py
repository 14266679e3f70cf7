"""What several hosts need: meeting files, options, lines of a step, what a block asks a scheduler for, jobs in its queue."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from bench.cell import cell_from_json
from bench.errors import MachineError, UserError
from bench.launch import assemble, meeting, queue, srun
from bench.launch.allocation import GIB, allocation
from bench.launch.command import Agents
from bench.launch.meeting import Beacon, Sight
from bench.launch.node import Meeting, agent_environment, interface_towards, start_agent
from bench.launch.rank import node_path
from bench.launch.single import read_rendezvous
from bench.launch.srun import SrunAgents, agents_here
from bench.measure import build_locks
from bench.suite import Limits
from bench.trial import make_trial

ROOT = Path(__file__).parents[3]


def cell(nodes=1, processes=1, **more):
    return cell_from_json(
        {"stage": "sft", "model": "bloom-tiny", "strategy": "ddp", "nodes": nodes, "processes_per_node": processes, "steps": 3,
         "global_batch": nodes * processes, **more}
    )  # fmt: skip


@pytest.fixture
def fast_beats(monkeypatch):
    monkeypatch.setattr(meeting, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(meeting, "SILENT_SECONDS", 0.6)


def seen_alive(sight, seconds):
    deadline = time.monotonic() + seconds
    while not sight.look().alive and time.monotonic() < deadline:
        time.sleep(0.02)
    return sight.alive


def test_a_node_is_believed_once_its_beat_moves_and_until_it_stands_still(tmp_path, fast_beats):
    sight = Sight(tmp_path / "node1.json")
    with Beacon(tmp_path / "node1.json", phase="wait") as beacon:
        assert seen_alive(sight, 5)
        beacon.say(phase="run", number=1)
        assert (sight.look().words["phase"], sight.words["number"]) == ("run", 1)
    time.sleep(0.8)
    assert not sight.look().alive
    assert sight.words["phase"] == "run"


def test_what_an_earlier_run_left_is_no_node(tmp_path, fast_beats):
    with Beacon(tmp_path / "node1.json", phase="wait"):
        pass
    assert not seen_alive(Sight(tmp_path / "node1.json"), 0.5)


def test_a_node_that_is_started_anew_must_move_its_beat_again(tmp_path, fast_beats):
    path, sight = tmp_path / "node1.json", Sight(tmp_path / "node1.json")
    with Beacon(path, phase="wait"):
        assert seen_alive(sight, 5)
    path.write_text(json.dumps({"session": "another", "beat": 7, "phase": "wait"}))
    assert not sight.look().alive


def test_half_a_file_is_not_read(tmp_path):
    (tmp_path / "node1.json").write_text('{"session": "x", "be')
    assert Sight(tmp_path / "node1.json").look().words == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((2, None, None), "needs --nodes, --node-rank and --rendezvous; seen: --nodes 2"),
        ((2, 2, "n1:29500"), "--node-rank 2: nodes are counted from 0; 0 to 1 would be right"),
        ((2, 0, "n1"), "--rendezvous n1: HOST:PORT of node 0 would be right"),
        ((2, 0, "n1:99999"), "HOST:PORT"),
    ],
)
def test_options_that_do_not_say_where_nodes_meet_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        read_rendezvous(*options)


def test_an_address_of_version_six_is_read():
    assert read_rendezvous(2, 0, "[fd00::1]:29500")[2:] == ("fd00::1", 29500)


def test_ranks_talk_through_the_interface_that_leads_to_the_first_node(monkeypatch):
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no.such.host.invalid") is None
    assert agent_environment("127.0.0.1", (), ())["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    found = agent_environment("127.0.0.1", ("GPU-1", "GPU-2"), ())
    assert (found["GLOO_SOCKET_IFNAME"], found["TP_SOCKET_IFNAME"], found["CUDA_VISIBLE_DEVICES"]) == ("ib0", "lo", "GPU-1,GPU-2")


@pytest.mark.parametrize(("device", "broken"), [("cuda", True), ("cpu", False)])
def test_every_node_breaks_the_build_lock_of_its_own_dead_builder(tmp_path, monkeypatch, device, broken):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(build_locks, "builders_are_in_sight", lambda _: True)
    lock = tmp_path / ".cache/colossalai/torch_extensions/torch2.11_cuda-13.0-abc/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    trial = make_trial(cell(2, device=device), 0, work=str(tmp_path / "work"))
    (tmp_path / "work").mkdir()
    agent = start_agent(trial, tmp_path / "trial.json", Meeting(node=1, address="127.0.0.1"), program="this")
    agent.end()
    assert lock.exists() is not broken


def test_a_step_has_one_task_on_each_node_and_ends_whole(tmp_path):
    (line,) = SrunAgents("77").command(make_trial(cell(3, 2), 0, work=str(tmp_path)), tmp_path / "trial.json")
    assert line.startswith("srun --jobid 77 --nodes 3 --ntasks 3 --ntasks-per-node 1 --kill-on-bad-exit=1 ")
    assert " -m bench.launch.node " in line
    assert "torch.distributed.run" not in line


def test_outside_an_allocation_agents_run_here(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert isinstance(agents_here(2), Agents)


@pytest.mark.parametrize(("allocated", "kind"), [(1, Agents), (2, SrunAgents), (3, SrunAgents)])
def test_an_allocation_with_too_few_nodes_is_said_and_simulated(monkeypatch, capsys, allocated, kind):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr(srun.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(srun, "allocated_nodes", lambda *_: allocated)
    assert isinstance(agents_here(2), kind)
    assert ("has 1 of 2 nodes" in capsys.readouterr().out) == (allocated < 2)


@pytest.mark.parametrize(("boots", "shared"), [(("a", "b"), False), (("a", "a"), True), (("a", None), False), (("a",), False)])
def test_nodes_on_one_kernel_share_a_machine(tmp_path, boots, shared):
    for node, boot in enumerate(boots):
        node_path(tmp_path, node).write_text(json.dumps({"machine": {"boot_id": boot}, "versions": {}, "environment": {}}))
    assert assemble.share_a_machine(make_trial(cell(2), 0, work=str(tmp_path))) is shared


def test_a_block_asks_for_its_nodes_one_task_on_each_and_time_for_all_of_its_trials():
    found = allocation([cell(3, 2, device="cpu")] * 4, Limits(timeout_seconds=600))
    assert (found.nodes, found.tasks, found.mpi, found.cpus_per_task, found.runtime) == (3, 3, "srun", 2, 50)
    assert (found.gres, found.mem_mb >= 2 * 3 * 1024) == ("", True)


def test_a_block_of_one_node_on_devices_asks_for_them():
    found = allocation([cell(1, 8, model="llama-7b", device="cuda")], Limits())
    assert (found.nodes, found.mpi, found.gres, found.tasks_per_gpu, found.runtime) == (1, "", "gpu:8", 0, 70)
    assert found.mem_mb * (1 << 20) > 8 * 50 * GIB  # ddp holds 16 bytes a parameter on every rank


@pytest.mark.parametrize("profile", sorted((ROOT / "profiles").glob("*/config.yaml")), ids=lambda path: path.parent.name)
def test_every_profile_repeats_only_what_changed(profile):
    content = yaml.safe_load(profile.read_text())
    assert content["rerun-triggers"] == ["mtime", "params", "input"]
    assert content["keep-going"] is True
    assert queue.uses_slurm(profile.parent) == profile.parent.name.startswith("slurm")


def test_the_template_for_a_site_does_what_the_plain_profile_does():
    plain, template = (yaml.safe_load((ROOT / "profiles" / name / "config.yaml").read_text()) for name in ("slurm", "slurm-site-template"))
    assert plain == template


def test_a_machine_without_slurm_is_told_what_it_lacks(monkeypatch):
    monkeypatch.setattr(queue.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(queue.shutil, "which", lambda name: None if name == "sbatch" else name)
    with pytest.raises(MachineError, match="seen: no sbatch on PATH"):
        queue.check_slurm()
    monkeypatch.setattr(queue.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MachineError, match="make install-slurm"):
        queue.check_slurm()


def test_jobs_of_an_earlier_driver_are_waited_for_and_those_of_other_suites_are_not(monkeypatch, tmp_path):
    mine, said = queue.Queue(tmp_path / "mine"), []
    other = queue.Queue(tmp_path / "other")
    answers = [f"12 {mine.prefix}_x\n13 {other.prefix}_x\n14 editor\n", f"13 {other.prefix}_x\n"]
    monkeypatch.setattr(queue.subprocess, "run", lambda *a, **_: subprocess.CompletedProcess(a, 0, answers.pop(0), ""))
    mine.wait(said.append, look=0)
    assert said == ["jobs of an earlier run are still in the queue or running: 12; waiting for them"]
    assert answers == []


def test_a_scheduler_that_does_not_answer_is_an_error_of_the_machine(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise subprocess.CalledProcessError(1, "squeue", stderr="slurm_load_jobs error: Unable to contact slurm controller")

    monkeypatch.setattr(queue.subprocess, "run", refuse)
    with pytest.raises(MachineError, match="squeue does not answer: slurm_load_jobs error"):
        queue.Queue(tmp_path).held()
    assert queue.Queue(tmp_path).cancel() == []
