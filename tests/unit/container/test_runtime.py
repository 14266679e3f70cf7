from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.cell import cell_from_json
from bench.container import runtime, verify
from bench.container.inputs import build_inputs, package_digest
from bench.container.runtime import Bind, Container, container_of, find_image
from bench.data.cache import sha256_of
from bench.errors import MachineError, UserError
from bench.launch.command import Agents
from bench.launch.inputs import image_input
from bench.record import Input
from bench.trial import make_trial


def cell(**more):
    return cell_from_json(
        {"stage": "sft", "model": "bloom-tiny", "strategy": "naive", "steps": 2, "device": "cpu", "container": "cpu", **more}
    )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("COATI_BENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def apptainer(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    return program


def trial_in(tmp_path, package):
    image = Input(name="container", path=str(tmp_path / "x.sqfs"), sha256="a" * 64, facts={"package_sha256": package})
    data = tmp_path / "elsewhere" / "rows.json"
    data.parent.mkdir()
    data.touch()
    work = tmp_path / "results" / "suite" / "logs" / "c" / "0"
    return make_trial(cell(), 0, data=[Input(name="synthetic-instruct", path=str(data), sha256="b" * 64)], image=image, work=str(work))


def test_the_agent_runs_in_the_image_and_sees_only_what_it_needs(tmp_path, apptainer):
    trial = trial_in(tmp_path, package_digest())
    (line,) = Agents().command(trial, Path(trial.work) / "trial.json")
    assert line.startswith(f"{apptainer} exec --contain --home ")
    assert f"--bind {tmp_path}/results/suite:{tmp_path}/results/suite:rw" in line
    assert f"--bind {tmp_path}/elsewhere:{tmp_path}/elsewhere:ro" in line
    assert f"{tmp_path}/x.sqfs /opt/venv/bin/python -m torch.distributed.run" in line
    assert "--nv" not in line
    assert "--net --network none" in line


def test_agents_that_meet_on_one_machine_share_its_loopback(tmp_path, apptainer):
    trial = trial_in(tmp_path, package_digest())
    two = make_trial(cell(nodes=2, strategy="ddp"), 0, data=trial.data, image=trial.image, work=trial.work)
    lines = Agents().command(two, Path(trial.work) / "trial.json")
    assert [line.count(" exec ") for line in lines] == [1, 1]
    assert not any("--net" in line for line in lines)


def test_of_the_hosts_environment_only_what_names_no_place_of_the_host_goes_in(tmp_path):
    given = {"OMP_NUM_THREADS": "1", "CC": "/opt/gcc", "LD_LIBRARY_PATH": "/x", "PYTHONPATH": "/y", "VIRTUAL_ENV": "/z"}
    inside = container_of(trial_in(tmp_path, package_digest())).variables({**given, "TMPDIR": "/scratch", "HF_HOME": "/h"})
    assert set(inside) == {"OMP_NUM_THREADS", "COATI_BENCH_CACHE", "PYTHONPATH"}
    assert inside["PYTHONPATH"] == "/opt/coati-bench"


def test_another_package_than_the_images_is_bound_over_it(tmp_path, apptainer):
    container = container_of(trial_in(tmp_path, "of another revision"))
    assert f"{runtime.SOURCE_TREE}:{runtime.SOURCE_TREE}:ro" in container.enter(["python", "-c", "pass"], {}).line
    assert container.variables({})["PYTHONPATH"] == f"{runtime.SOURCE_TREE}:/opt/coati-bench"


def test_a_gpu_trial_gets_the_devices(tmp_path, apptainer):
    container = Container(Path("x.sqfs"), gpu=True)
    entered = container.enter(["python"], {"CUDA_VISIBLE_DEVICES": "GPU-1"})
    assert "--nv" in entered.line
    assert entered.environment["CUDA_VISIBLE_DEVICES"] == "GPU-1"


def test_a_missing_runtime_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MachineError, match="no container runtime; seen: none on PATH; apptainer would be right"):
        Container(Path("x.sqfs")).enter(["python"], {})


def test_what_is_compiled_at_first_use_is_of_one_environment_and_kind_of_device(tmp_path, apptainer, monkeypatch):
    monkeypatch.setenv("COATI_BENCH_CACHE", str(tmp_path))
    devices = [{"compute_capability": name} for name in ("9.0", "8.0", "9.0", None)]
    monkeypatch.setattr(runtime, "describe_devices", lambda: devices)
    one, other = (Container(Path("x.sqfs"), environment=f"sha256:{letter * 64}") for letter in "ab")
    assert [it.home for it in (one, other)] == [tmp_path / "home" / (letter * 12) for letter in "ab"]
    assert one._replace(gpu=True).home == tmp_path / "home" / "aaaaaaaaaaaa-8.0-9.0"
    assert f"--home {one.home} " in " ".join(one.enter(["python"], {}).line)
    assert one.home.is_dir()


def test_the_home_folder_of_a_trial_is_that_of_its_images_environment(tmp_path):
    trial = trial_in(tmp_path, "p")
    assert container_of(trial).home.name == "a" * 12
    image = replace(trial.image, facts={"environment_digest": f"sha256:{'c' * 64}"})
    assert container_of(make_trial(trial.parsed_cell, 0, image=image, work=trial.work)).home.name == "c" * 12


@pytest.mark.parametrize("digest", ["e", "another"])
def test_a_trial_is_told_whether_its_images_environment_is_the_committed_one(tmp_path, monkeypatch, apptainer, digest):
    monkeypatch.setenv("COATI_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verify, "committed", lambda name: {"digest": digest} if name == "cpu" else None)
    file = tmp_path / "coati-bench-cpu-aaaaaaaaaaaa.sqfs"
    file.write_bytes(b"the image")
    note = {"image": "cpu", "digest": f"sha256:{'a' * 64}", "environment_digest": "e", "package": "p"}
    file.with_suffix(".json").write_text(json.dumps(note | {"sha256": {file.name: sha256_of(file)}}))
    facts = image_input(cell(container=str(file))).facts
    assert (facts["environment_digest"], facts["environment_committed"]) == ("e", digest == "e")


def test_the_image_is_part_of_what_a_trial_computes(tmp_path):
    trial = trial_in(tmp_path, "p")
    other = make_trial(trial.parsed_cell, 0, data=trial.data, work=trial.work)
    assert trial.fingerprint != other.fingerprint


def test_a_running_parent_serves_only_trials_whose_files_it_sees():
    here = Container(Path("x.sqfs"), binds=(Bind(Path("/a"), writable=True), Bind(Path("/b"))))
    assert here.covers(Container(Path("x.sqfs"), binds=(Bind(Path("/a")),)))
    assert not here.covers(Container(Path("x.sqfs"), binds=(Bind(Path("/b"), writable=True),)))
    assert not here.covers(Container(Path("x.sqfs"), binds=(Bind(Path("/c")),)))
    assert not here.covers(Container(Path("y.sqfs")))


def test_an_image_that_was_not_built_here_is_refused_with_the_command_that_builds_it(tmp_path, monkeypatch, apptainer):
    monkeypatch.setenv("COATI_BENCH_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="`coati-bench container build cpu` builds it"):
        find_image("cpu")


def test_an_image_is_hashed_once_and_again_when_its_file_changes(tmp_path, monkeypatch, apptainer):
    monkeypatch.setenv("COATI_BENCH_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "coati-bench-cpu-aaaaaaaaaaaa.sqfs"
    file.write_bytes(b"the image")
    note = {"image": "cpu", "digest": "sha256:aaaaaaaaaaaa", "environment_digest": "e", "package": "p"}
    file.with_suffix(".json").write_text(json.dumps(note | {"sha256": {file.name: sha256_of(file)}}))
    hashed = []
    monkeypatch.setattr(runtime, "check_file", lambda path: hashed.append(path) or verify.check_file(path))
    for _ in range(2):
        runtime._found.cache_clear()
        assert find_image(str(file)).digest == "sha256:aaaaaaaaaaaa"
    assert hashed == [file]
    file.write_bytes(b"the imagf")
    runtime._found.cache_clear()
    with pytest.raises(UserError, match="not the image that was built"):
        find_image(str(file))


def test_of_two_images_with_the_same_locks_that_with_this_package_is_taken(tmp_path, monkeypatch, apptainer):
    monkeypatch.setenv("COATI_BENCH_CACHE", str(tmp_path))
    folder = tmp_path / "images"
    folder.mkdir()
    inputs = build_inputs(runtime.image_named("cpu"))
    for digest, package in (("aaaaaaaaaaaa", package_digest()), ("bbbbbbbbbbbb", "another")):
        path = folder / f"coati-bench-cpu-{digest}.sqfs"
        path.write_bytes(digest.encode())
        note = {"image": "cpu", "digest": f"sha256:{digest}", "environment_digest": "e", "inputs": inputs, "package": package}
        more = {"squashfs": str(path), "archive": None, "sha256": {path.name: sha256_of(path)}}
        path.with_suffix(".json").write_text(json.dumps(note | more))
    assert find_image("cpu").digest == "sha256:aaaaaaaaaaaa"
