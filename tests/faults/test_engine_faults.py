"""podman's and docker's containers are no children of ours: nothing of them outlives a trial, whatever ends it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from bench.launch.command import Agents
from bench.launch.parent import ForkParent
from bench.launch.processes import descendants
from bench.launch.rank import read_process
from bench.launch.supervise import run_trial
from bench.launch.watch import Stop
from bench.record import Input
from bench.trial import Trial, make_trial, save_trial
from tests.faults.fake_engine import Engine

PROGRAM = "tests.faults.fake_rank"
"""Importable inside from the source tree, which is bound there."""
TREE = Path(__file__).parents[2]


@pytest.fixture
def engine(tmp_path, monkeypatch):
    with Engine(tmp_path) as running:
        monkeypatch.setenv("PATH", f"{running.program.parent}:{os.environ['PATH']}")
        monkeypatch.setenv("COATI_BENCH_RUNTIME", "docker")
        monkeypatch.setenv("COATI_BENCH_CACHE", str(tmp_path / "cache"))
        yield running
        running.shutdown()


def archive(path: Path) -> str:
    """Write an OCI archive without layers; the digest of its manifest."""
    configuration = json.dumps({"rootfs": {}}).encode()
    manifest = json.dumps({"config": {"digest": f"sha256:{sha256(configuration)}"}, "layers": []}).encode()
    index = json.dumps({"manifests": [{"digest": f"sha256:{sha256(manifest)}"}]}).encode()
    with tarfile.open(path, "w") as tar:
        for name, text in [("index.json", index), *((f"blobs/sha256/{sha256(blob)}", blob) for blob in (configuration, manifest))]:
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    return sha256(manifest)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def contained(engine, fake_trial, tmp_path):
    """A fake trial in an image that the engine has."""

    def make(behaviour: dict[int, str], **more: object) -> Trial:
        trial = fake_trial(behaviour, **more)
        image = tmp_path / "coati-bench-cpu-0123.oci.tar"
        digest = archive(image)
        found = Input(name="container", path=str(image), sha256=digest, facts={"digest": f"sha256:{digest}", "package_sha256": "another"})
        return make_trial(trial.parsed_cell, 0, data=trial.data, work=trial.work, limits=trial.limits, image=found)

    return make


@pytest.fixture
def launch(tmp_path, engine):
    """Run a trial as its cell says."""

    def run(trial: Trial, **more: object):
        with ForkParent(tmp_path / "parent.log", program=PROGRAM, preload=("contextlib",)) as parent:
            return run_trial(trial, tmp_path / "record.json", parent=parent, agents=Agents(program=PROGRAM), **more)

    return run


@pytest.mark.parametrize("launcher", ["fork", "torchrun"])
def test_ranks_run_in_the_image_and_the_record_has_its_name_as_seen_inside(contained, launch, engine, launcher):
    record = launch(contained({}, launcher=launcher))
    assert (record.outcome, record.reason) == ("ok", None)
    (machine,) = record.provenance["machines"]
    assert (machine["container"], machine["container_runtime"]) == ("coati-bench-cpu-0123.oci.tar", "docker")
    assert engine.running == {}
    (line,) = [line for line in engine.lines if line[0] == "run"]
    assert "--read-only" in line
    assert line[line.index("--network") + 1] == "none"


def test_agents_of_one_machine_meet_on_the_loopback_of_the_first_ones_container(contained, launch, engine):
    record = launch(contained({}, nodes=2, launcher="torchrun"))
    assert record.outcome == "ok", record.reason
    runs = sorted((line for line in engine.lines if line[0] == "run"), key=lambda line: line[line.index("--name") + 1])
    names = [line[line.index("--name") + 1] for line in runs]
    assert [line[line.index("--network") + 1] for line in runs] == ["none", f"container:{names[0]}"]
    assert [machine["node"] for machine in record.provenance["machines"]] == [0, 1]


def test_only_the_allowed_environment_goes_in(contained, launch, engine, monkeypatch):
    monkeypatch.setenv("SECRET_OF_MINE", "x")
    launch(contained({}))
    (line,) = [line for line in engine.lines if line[0] == "run"]
    given = [line[place + 1].partition("=")[0] for place, word in enumerate(line) if word == "--env"]
    assert {"OMP_NUM_THREADS", "HOME", "PYTHONPATH"} <= set(given)
    assert "SECRET_OF_MINE" not in given


def test_a_trial_whose_time_is_over_leaves_no_container(contained, launch, engine, tmp_path, gone):
    trial = contained({0: "hang_deaf", 1: "leave_session_and_hang"}, timeout_seconds=10.0, heartbeat_seconds=60.0)
    record = launch(trial)
    assert record.outcome == "timeout", record.reason
    assert engine.running == {}
    assert gone(inside_of(trial, tmp_path))


def test_a_cancelled_trial_leaves_no_container(contained, launch, engine, wait_until, gone):
    trial, stop = contained({0: "hang_deaf", 1: "hang_deaf"}), Stop()
    threading.Thread(target=lambda: wait_until(trial.heartbeat_path(1).exists, 60) and stop.ask("SIGTERM")).start()
    assert launch(trial, stop=stop).outcome == "cancelled"
    assert engine.running == {}
    assert gone([read_process(Path(trial.work), rank).pid for rank in (0, 1)])


@pytest.mark.parametrize(
    ("launcher", "also"),
    [("torchrun", ""), ("fork", "bench.launch.guard"), ("fork", "bench.launch.attend"), ("fork", "docker run")],
)
def test_nothing_survives_a_killed_supervisor(contained, engine, launcher, also, tmp_path, wait_until, gone):
    trial = contained({0: "hang_deaf", 1: "leave_session_and_hang"}, launcher=launcher, timeout_seconds=60.0, heartbeat_seconds=60.0)
    save_trial(trial, tmp_path / "trial.json")
    line = [sys.executable, Path(__file__).with_name("fake_supervisor.py"), tmp_path / "trial.json", tmp_path / "record.json", PROGRAM]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(TREE)}) as process:
        assert wait_until(lambda: (tmp_path / "stray1.pid").exists() and trial.heartbeat_path(0).exists(), 60)
        inside = inside_of(trial, tmp_path)
        outside = descendants([process.pid])
        assert not set(inside) & set(outside)
        for pid in [process.pid, *(pid for pid in outside if also and also in command_line(pid))]:
            os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: gone([*inside, *outside]) and not engine.running, 60)


def test_an_engine_that_cannot_start_a_container_is_told_at_once(contained, launch, engine, monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError("no such runtime")

    monkeypatch.setattr(engine, "start", refuse)
    record = launch(contained({}))
    assert record.outcome == "error"
    assert "the fork parent did not get ready" in record.reason
    assert "no such runtime" in (tmp_path / "parent.log").read_text()


def inside_of(trial: Trial, folder: Path) -> list[int]:
    """Both ranks, and what one of them started in a session of its own."""
    return [*(read_process(Path(trial.work), rank).pid for rank in (0, 1)), int((folder / "stray1.pid").read_text())]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
