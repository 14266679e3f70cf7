"""A partition that the cluster does not have is told before anything is submitted."""

from __future__ import annotations

import pytest

from bench.errors import UserError
from bench.launch import workflow
from bench.launch.queue import check_partitions

SUITE = """
suite: small
axes: {stage: [sft], model: [bloom-tiny], strategy: [ddp]}
settings: {device: cpu, precision: fp32, tokenizer_vocabulary: 1024, warm_start: none}
stages:
  sft: {data: synthetic-instruct, steps: 4, micro_batch: 1, global_batch: 6, sequence_length: 128, learning_rate: 1e-2}
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A login node whose sinfo knows two partitions, and whose other commands note that they were called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    scripts = {"sinfo": "echo debug; echo gpu", **dict.fromkeys(("sbatch", "squeue", "scancel"), f"echo called >> {tmp_path}/submitted")}
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    return programs


def profile(tmp_path, text):
    folder = tmp_path / "profiles" / "site"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"executor: slurm\n{text}\n")
    return folder


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("default-resources: {slurm_partition: gpus}", "gpus (default-resources)"),
        ("default-resources: [mem_mb=100, slurm_partition=gpus]", "gpus (default-resources)"),
        ("set-resources: {block: {slurm_partition: 'gpu,gpus'}}", "gpus (set-resources: block)"),
    ],
)
def test_a_partition_that_does_not_exist_is_named_with_those_that_do(cluster, tmp_path, text, where):
    with pytest.raises(UserError) as told:
        check_partitions(profile(tmp_path, text))
    assert f"a partition that does not exist: {where}; seen by sinfo: debug, gpu;" in str(told.value)
    assert told.value.exit_code == 2


@pytest.mark.parametrize(
    "text", ["", "default-resources: {slurm_partition: gpu}", "set-resources: {block: {slurm_partition: 'gpu,debug'}, warm: {mem_mb: 1}}"]
)
def test_partitions_that_exist_and_none_at_all_are_accepted(cluster, tmp_path, text):
    check_partitions(profile(tmp_path, text))


def test_a_silent_sinfo_decides_nothing(cluster, tmp_path):
    (cluster / "sinfo").write_text("#!/bin/sh\necho slurm_load_partitions: Unable to contact slurm controller >&2; exit 1\n")
    check_partitions(profile(tmp_path, "default-resources: {slurm_partition: gpus}"))


def test_run_refuses_before_it_submits_or_writes(cluster, tmp_path, monkeypatch):
    folder = profile(tmp_path, "default-resources: {slurm_partition: gpus}")
    suite, results = tmp_path / "small.yaml", tmp_path / "results"
    suite.write_text(SUITE)
    monkeypatch.setattr(workflow, "_check_installation", lambda _profile, _root: folder)
    monkeypatch.setattr(workflow, "check_slurm", lambda: None)
    with pytest.raises(UserError, match=r"gpus \(default-resources\)"):
        workflow.run_suite(suite, profile="site", results=results)
    assert not (tmp_path / "submitted").exists()
    assert not results.exists()
