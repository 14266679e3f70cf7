"""Build locks: torch's own lock, held by real processes, killed ones among them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.measure import build_locks
from bench.measure.build_locks import QUIET_SECONDS, break_stale_locks, build_folders, file_system, find_locks

BUILDER = """
import os, sys, time
descriptor = os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)  # as torch.utils.file_baton does
print("held", flush=True)
time.sleep(600)
"""

TORCHS_LOCK = """
import sys
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
print(baton.try_acquire(), flush=True)
baton.wait()
print("done", flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build's folder, on a file system whose processes are all in sight."""
    monkeypatch.setattr(build_locks, "builders_are_in_sight", lambda _: True)
    made = tmp_path / "torch2.11_cuda-13.0-abc"
    made.mkdir()
    return made


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process that says when it stands."""
    started = []

    def run(code: str, argument: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", code, str(argument)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def test_the_lock_of_a_live_build_is_left_alone_and_its_process_named(folder: Path, start: Callable) -> None:
    builder = start(BUILDER, folder / "lock")
    (lock,) = find_locks([folder.parent])
    assert (lock.path, lock.builder, lock.stale) == (folder / "lock", builder.pid, False)
    assert f"process {builder.pid} is building" in str(lock)
    assert break_stale_locks([folder.parent]) == []
    assert (folder / "lock").exists()


def test_the_lock_of_a_killed_build_is_broken_at_once(folder: Path, start: Callable) -> None:
    kill(start(BUILDER, folder / "lock"))
    (lock,) = find_locks([folder.parent])
    assert lock.stale
    assert f"{folder / 'lock'}, 0 s old: its build died" in str(lock)
    assert [one.path for one in break_stale_locks([folder.parent])] == [folder / "lock"]
    assert not (folder / "lock").exists()
    assert break_stale_locks([folder.parent]) == []


def test_a_compiler_that_outlives_its_builder_still_builds(folder: Path, start: Callable) -> None:
    kill(start(BUILDER, folder / "lock"))
    (folder.parent / "ninja").symlink_to(shutil.which("sleep"))
    ninja = subprocess.Popen([folder.parent / "ninja", "600"], cwd=folder)
    try:
        assert find_locks([folder.parent])[0].builder == ninja.pid
        assert break_stale_locks([folder.parent]) == []
    finally:
        kill(ninja)
    assert len(break_stale_locks([folder.parent])) == 1


def test_a_shell_that_stands_in_the_folder_is_no_builder(folder: Path, start: Callable) -> None:
    kill(start(BUILDER, folder / "lock"))
    shell = subprocess.Popen(["sleep", "600"], cwd=folder)
    try:
        assert len(break_stale_locks([folder.parent])) == 1
    finally:
        kill(shell)


def test_a_build_that_began_since_the_look_keeps_its_lock(folder: Path, start: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    kill(start(BUILDER, folder / "lock"))
    seen = find_locks([folder.parent])
    (folder / "other").touch()  # takes the inode, should the file system give freed ones out again
    (folder / "lock").unlink()
    start(BUILDER, folder / "lock")
    monkeypatch.setattr(build_locks, "find_locks", lambda _: seen)
    assert break_stale_locks([folder.parent]) == []
    assert (folder / "lock").exists()


def test_where_builders_may_be_out_of_sight_a_lock_is_stale_only_when_its_folder_is_quiet(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_locks, "builders_are_in_sight", lambda _: False)
    (folder / "lock").touch()
    (folder / "a.o").touch()
    old = time.time() - QUIET_SECONDS - 60
    for path in (folder / "lock", folder):
        os.utime(path, (old, old))
    (lock,) = find_locks([folder.parent])
    assert (lock.builder, lock.stale) == (None, False)
    assert "no builder is seen from here; taken to be dead 15 minutes after" in str(lock)
    os.utime(folder / "a.o", (old, old))
    assert [one.path for one in break_stale_locks([folder.parent])] == [folder / "lock"]


@pytest.mark.parametrize(
    ("kind", "alone", "sure"),
    [("ext4", True, True), ("ext4", False, False), ("overlay", False, True), ("nfs4", True, False), ("lustre", True, False)],
)
def test_who_may_hold_a_lock_follows_from_its_file_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, alone: bool, sure: bool
) -> None:
    monkeypatch.setattr(build_locks, "file_system", lambda _: kind)
    monkeypatch.setattr(build_locks, "_sees_all_processes", lambda: alone)
    assert build_locks.builders_are_in_sight(tmp_path) is sure


def test_the_file_system_is_the_kernels_word() -> None:
    assert file_system(Path("/proc/self/status")) == "proc"
    assert file_system(Path("/dev/shm")) == "tmpfs"


def test_torchs_own_lock_waits_no_more_once_it_is_broken(folder: Path, start: Callable) -> None:
    kill(start(BUILDER, folder / "lock"))
    waiting = subprocess.Popen([sys.executable, "-c", TORCHS_LOCK, str(folder / "lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert waiting.stdout.readline() == "False\n"
        time.sleep(0.3)
        assert waiting.poll() is None
        break_stale_locks([folder.parent])
        assert waiting.communicate(timeout=10)[0] == "done\n"
    finally:
        waiting.kill()


def test_the_folders_are_those_of_the_user_and_of_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("COATI_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "named"))
    assert {tmp_path / "me/.cache/colossalai/torch_extensions", tmp_path / "cache/home/.cache/torch_extensions", tmp_path / "named"} <= set(
        build_folders()
    )
