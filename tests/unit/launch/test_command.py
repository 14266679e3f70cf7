"""Lines that start agents, and the environment of ranks."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from bench.cell import cell_from_json, cell_to_json
from bench.launch.command import Agents, agent_line, command_lines
from bench.launch.environment import SOURCE_TREE, host_threads, rank_environment
from bench.launch.node import agent_environment
from bench.launch.parent import rank_variables
from bench.launch.srun import SrunAgents
from bench.suite import Limits
from bench.trial import make_trial


def cell(nodes=1, processes=1):
    return cell_from_json(
        {"stage": "sft", "model": "bloom-tiny", "strategy": "ddp", "nodes": nodes, "processes_per_node": processes, "steps": 3,
         "global_batch": nodes * processes}
    )  # fmt: skip


def test_an_agents_line_says_where_it_stands():
    line = agent_line(cell(2, 4), 1, ["bench.worker", "t.json"], address="n1", port=5000, python="python")
    assert " ".join(line) == (
        "python -m torch.distributed.run --nnodes 2 --node-rank 1 --nproc-per-node 4 --master-addr n1 --master-port 5000 --max-restarts 0"
        " -m bench.worker t.json"
    )


def test_lines_to_type_are_one_for_each_node_and_meet_at_the_first():
    lines = command_lines(cell(3, 2), Path("a b/cells/c.json"), trial=2)
    assert [shlex.split(line) for line in lines] == [
        ["coati-bench", "trial", "a b/cells/c.json", "--trial", "2", "--nodes", "3", "--node-rank", rank, "--rendezvous", "$HEAD:29500"]
        for rank in "012"
    ]
    assert command_lines(cell(), Path("cells/c.json")) == ["coati-bench trial cells/c.json"]


def test_forked_ranks_of_several_nodes_are_one_line():
    forked = cell_from_json({**cell_to_json(cell(2)), "device": "cpu", "launcher": "fork"})
    assert command_lines(forked, Path("cells/c.json")) == ["coati-bench trial cells/c.json"]


def test_prefixes_go_around_the_agent_outer_first(tmp_path):
    agents = Agents(outer=("srun", "-N1"), inner=("apptainer", "exec", "x.sqfs"))
    (line,) = agents.command(make_trial(cell(), 0, work=str(tmp_path)), tmp_path / "trial.json")
    assert line.startswith("srun -N1 apptainer exec x.sqfs ")
    assert "-m torch.distributed.run" in line


def test_only_named_variables_reach_the_ranks(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("SOMETHING_ELSE", "x")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("HF_TOKEN", "x")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    found = rank_environment()
    assert {"AWS_SECRET_ACCESS_KEY", "SOMETHING_ELSE", "HF_TOKEN"}.isdisjoint(found)
    assert found["NCCL_DEBUG"] == "WARN"
    assert (found["HF_HUB_OFFLINE"], found["TRANSFORMERS_OFFLINE"]) == ("1", "1")
    assert found["PYTHONPATH"] == str(SOURCE_TREE)
    assert rank_environment(search_path=("/first",))["PYTHONPATH"].startswith("/first:")


def test_ranks_build_kernels_with_the_users_own_compiler(monkeypatch):
    chosen = {"CC": "/opt/gcc/bin/gcc", "CXX": "/opt/gcc/bin/g++", "MAX_JOBS": "4", "TORCH_CUDA_ARCH_LIST": "9.0", "CUDA_HOME": "/opt/cuda"}
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    assert chosen.items() <= rank_environment().items()


@pytest.mark.parametrize(("user", "expected"), [(None, "4"), ("7", "7")])
def test_the_users_number_of_threads_wins(monkeypatch, user, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if user:
        monkeypatch.setenv("OMP_NUM_THREADS", user)
    assert rank_environment(threads=4)["OMP_NUM_THREADS"] == expected


@pytest.mark.parametrize(
    ("device", "nodes", "processes", "simulated", "lanes", "threads"),
    [("cuda", 1, 1, False, 1, 16), ("cuda", 1, 4, False, 1, 4), ("cuda", 2, 4, False, 1, 4), ("cuda", 2, 4, True, 1, 2),
     ("cuda", 1, 32, False, 1, 1), ("cuda", 1, 2, False, 4, 2), ("cpu", 1, 1, False, 1, 1), ("cpu", 2, 2, True, 1, 1)],
)  # fmt: skip
def test_ranks_share_the_cores_beside_gpus_and_have_one_thread_on_a_cpu(
    monkeypatch, tmp_path, device, nodes, processes, simulated, lanes, threads
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    made = cell_from_json({**cell_to_json(cell(nodes, processes)), "device": device, "launcher": "torchrun"})
    trial = make_trial(made, 0, work=str(tmp_path), limits=Limits(side_by_side=lanes))
    assert host_threads(trial, simulated) == threads


def test_agents_hand_the_threads_on(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    made = cell_from_json({**cell_to_json(cell(1, 4)), "device": "cuda", "launcher": "torchrun"})
    trial = make_trial(made, 0, work=str(tmp_path))
    assert Agents()._environment(trial, ())["OMP_NUM_THREADS"] == SrunAgents("7")._environment(trial)["OMP_NUM_THREADS"] == "4"
    assert agent_environment("127.0.0.1", (), (), threads=4)["OMP_NUM_THREADS"] == "4"


def test_forked_ranks_get_what_torchrun_would_set():
    ranks = rank_variables(cell(2, 2), 5000)
    assert [(rank["RANK"], rank["GROUP_RANK"], rank["LOCAL_RANK"]) for rank in ranks] == [
        ("0", "0", "0"),
        ("1", "0", "1"),
        ("2", "1", "0"),
        ("3", "1", "1"),
    ]
    assert {(rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"], rank["MASTER_PORT"]) for rank in ranks} == {("4", "2", "5000")}
