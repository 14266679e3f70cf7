"""Writes that wait for a disk, and what a disk says of itself."""

from __future__ import annotations

import errno
import os
import subprocess
from types import SimpleNamespace

import pytest

import bench.shared_disk as module
from bench.errors import MachineError
from bench.shared_disk import patiently, refusal


class Disk:
    """Refuses the first writes, each for the reason given."""

    def __init__(self, *reasons):
        self.reasons, self.writes, self.waits = list(reasons), 0, []

    def write(self):
        self.writes += 1
        if self.reasons:
            reason = self.reasons.pop(0)
            raise OSError(reason, os.strerror(reason))

    def wait(self, seconds):
        self.waits.append(seconds)
        return False


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.EIO])
def test_a_disk_that_refuses_for_a_moment_is_waited_for_and_told_once(tmp_path, capsys, reason):
    disk = Disk(reason, reason)
    patiently(disk.write, tmp_path / "r.json", "the record", disk.wait)
    assert disk.writes == 3
    assert capsys.readouterr().out == f"{tmp_path}/r.json: the record cannot be written: {os.strerror(reason)}; tried again for 60 s\n"


def test_the_wait_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.0)
    disk = Disk(*[errno.ENOSPC] * 1000)
    with pytest.raises(MachineError, match=r"r\.json: the record cannot be written: No space left on device; free space or rights"):
        patiently(disk.write, tmp_path / "r.json", "the record", disk.wait)
    assert disk.writes < 10


def test_who_is_told_to_stop_tries_once_more_and_gives_up(tmp_path):
    disk = Disk(*[errno.ENOSPC] * 1000)
    with pytest.raises(MachineError, match="No space left on device"):
        patiently(disk.write, tmp_path / "r.json", "the record", lambda seconds: True)
    assert disk.writes == 2


def test_what_does_not_pass_by_itself_is_not_waited_for(tmp_path):
    disk = Disk(errno.EACCES)
    with pytest.raises(MachineError, match="Permission denied"):
        patiently(disk.write, tmp_path / "r.json", "the record", disk.wait)
    assert (disk.writes, disk.waits) == (1, [])


def test_a_mistake_of_the_programs_is_not_taken_for_the_disks(tmp_path):
    def write():
        raise KeyError("name")

    with pytest.raises(KeyError):
        patiently(write, tmp_path / "r.json", "the record")


def test_a_disk_with_room_has_no_refusal_and_one_that_cannot_be_asked_neither(tmp_path):
    assert refusal(tmp_path) is None
    assert refusal(tmp_path / "not there") is None


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"f_bavail": 0}, "no space is left for "),
        ({"f_favail": 0}, "no space is left for "),
        ({"f_flag": os.ST_RDONLY}, "the disk of "),
        ({"f_files": 0, "f_favail": 0}, None),
    ],
)
def test_a_disk_says_why_it_takes_nothing(tmp_path, monkeypatch, more, text):
    space = SimpleNamespace(**{"f_bavail": 5, "f_files": 10, "f_favail": 5, "f_flag": 0, **more})
    monkeypatch.setattr(os, "statvfs", lambda folder: space)
    assert (refusal(tmp_path) or "").startswith(text or "")
    assert (refusal(tmp_path) is None) == (text is None)


def test_a_small_disk_that_is_really_full_is_seen(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", tmp_path], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(OSError, match="No space"):
            (tmp_path / "filler").write_bytes(bytes(1 << 20))
        assert refusal(tmp_path) == f"no space is left for {tmp_path}"
    finally:
        subprocess.run(["umount", tmp_path], check=True)
