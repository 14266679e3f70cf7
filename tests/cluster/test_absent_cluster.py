"""Where a machine lacks something, no cluster comes up, the reason is told, and nothing is left behind. Runs before there is a cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import cluster_hosts
import pytest
from cluster_hosts import NoClusterError, check
from cluster_slurm import Slurm, install

FAKE = """#!/bin/sh
case "$*" in *"{when}"*) echo "{says}" >&2; exit 1;; esac
exec {real} "$@"
"""


@pytest.fixture(autouse=True)
def whole_machine():
    """These tests take away one thing at a time from a machine that has all of them."""
    try:
        check()
        install()
    except NoClusterError as problem:
        pytest.skip(f"no cluster can be simulated here: {problem}")


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Put a program in the place of a real one that fails `when` its arguments have that text."""

    def make(name, when, says):
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / name).write_text(FAKE.format(when=when, says=says, real=shutil.which(name)))
        (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return make


def left_behind(folder: Path) -> list[str]:
    """Namespaces, /etc folders, mounts and daemons."""
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(folder) in line]
    processes = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder).encode() in _read(path)]
    etc = [path.name for path in cluster_hosts.ETC.glob("cbn-*")] if cluster_hosts.ETC.is_dir() else []
    return [*(name for name in names if name.startswith("cbn-")), *mounts, *processes, *etc]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("program", "when", "says"),
    [
        ("ip", "type bridge", "RTNETLINK answers: Operation not supported"),
        ("ip", "type veth", "Error: Unknown device type."),
        ("ip", "netns add", "mount --make-shared /run/netns failed: Operation not permitted"),
        ("unshare", "", "unshare: unshare failed: Operation not permitted"),
        ("mount", "--make-shared", "mount: permission denied"),
        ("munged", "", "munged: Error: Logfile is insecure"),
        ("slurmctld", "", "slurmctld: fatal: no such plugin"),
        ("slurmd", "", "slurmd: fatal: Unable to find the cgroup hierarchy"),
    ],
)
def test_what_is_missing_is_told_and_nothing_is_left(tmp_path, broken, program, when, says):
    broken(program, when, says)
    with pytest.raises(NoClusterError) as told, Slurm(tmp_path / "slurm", count=1):
        pass
    assert says in str(told.value)
    assert left_behind(tmp_path / "slurm") == []


def test_a_folder_of_etc_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cluster_hosts, "ETC", tmp_path / "file" / "netns")
    with pytest.raises(NoClusterError, match="Not a directory"), Slurm(tmp_path / "slurm", count=1):
        pass
    assert left_behind(tmp_path / "slurm") == []
