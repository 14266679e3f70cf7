"""What a killed build leaves goes with the next one, and never while its builder lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from bench.container.scratch import remove_left, scratch_folder
from bench.container.tools import DIES_WITH_US

BUILDER = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from bench.container.scratch import scratch_folder
    with scratch_folder(Path(sys.argv[1])) as scratch:
        (scratch / "context").mkdir()
        (scratch / "context" / "layer.tar").write_bytes(b"half")
        print(scratch, flush=True)
        sys.stdin.read()
""")


def start_builder(folder: Path) -> tuple[subprocess.Popen[str], Path]:
    builder = subprocess.Popen([sys.executable, "-c", BUILDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert builder.stdout is not None
    return builder, Path(builder.stdout.readline().strip())


def end(builder: subprocess.Popen[str], number: int) -> None:
    builder.send_signal(number)
    builder.communicate()


def test_a_scratch_folder_is_gone_at_the_end_whether_or_not_the_build_fails(tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as scratch:
        (scratch / "x").write_text("x")
    with pytest.raises(ValueError, match="disk"), scratch_folder(tmp_path):
        raise ValueError("disk")
    assert not list(tmp_path.glob(".build-*"))


def test_the_scratch_folder_of_a_killed_build_is_removed_by_the_next_one(tmp_path: Path) -> None:
    builder, left = start_builder(tmp_path)
    end(builder, signal.SIGKILL)
    assert (left / "context" / "layer.tar").exists()
    with scratch_folder(tmp_path) as own:
        assert not left.exists()
        assert own.is_dir()


def test_the_scratch_folder_of_a_living_build_stays(tmp_path: Path) -> None:
    builder, its = start_builder(tmp_path)
    try:
        with scratch_folder(tmp_path) as own:
            assert own != its
        assert remove_left(tmp_path) == []
        assert (its / "context" / "layer.tar").exists()
    finally:
        end(builder, signal.SIGTERM)
    assert remove_left(tmp_path) == [its]


def test_what_earlier_versions_left_goes_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".build-avddxzys" / "context").mkdir(parents=True)
    with scratch_folder(tmp_path):
        pass
    assert not list(tmp_path.glob(".build-*"))
    assert f"{tmp_path / '.build-avddxzys'}: left by a build that was killed; removed" in capsys.readouterr().out


@pytest.mark.skipif(not DIES_WITH_US, reason="setpriv of util-linux is not here")
def test_what_a_killed_build_ran_dies_with_it(tmp_path: Path) -> None:
    script = "from bench.container.tools import run; run(['sh', '-c', 'echo $$; echo $$ > pid.part; mv pid.part pid; exec sleep 600'])"
    builder = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    until((tmp_path / "pid").exists)
    number = int((tmp_path / "pid").read_text())
    builder.kill()
    builder.wait()
    until(lambda: not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE)


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds; a minute is far more than it needs."""
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
