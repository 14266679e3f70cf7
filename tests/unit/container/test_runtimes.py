"""The choice of a container runtime, and images that it takes."""

from __future__ import annotations

import json

import pytest

from bench.container import runtime as runtime_module
from bench.container.engine import read_ids
from bench.container.runtime import find_image
from bench.container.runtimes import choose, insist, wants_archive
from bench.errors import MachineError, UserError
from tests.faults.test_engine_faults import archive


@pytest.fixture
def programs(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("COATI_BENCH_RUNTIME", "")

    def make(*names: str) -> None:
        for name in names:
            (folder / name).touch(0o755)

    return make


def test_apptainer_comes_first_then_podman_then_docker(programs):
    found = []
    for name in ("docker", "podman", "singularity", "apptainer"):
        programs(name)
        found.append((choose().kind, choose().program.rpartition("/")[2]))
    assert found == [("docker", "docker"), ("podman", "podman"), ("apptainer", "singularity"), ("apptainer", "apptainer")]


def test_one_may_insist(programs):
    programs("apptainer", "docker")
    insist("docker")
    assert choose().kind == "docker"
    assert wants_archive()
    with pytest.raises(UserError, match="no such container runtime; seen: 'rkt'; one of apptainer, podman, docker would be right"):
        insist("rkt")


def test_a_runtime_that_one_insists_on_and_that_is_not_here_is_said(programs):
    programs("apptainer")
    insist("podman")
    with pytest.raises(MachineError, match="no container runtime podman; seen: not on PATH"):
        choose()
    assert not wants_archive()


def test_a_file_that_the_runtime_does_not_take_is_said(programs):
    programs("apptainer", "podman")
    insist("podman")
    with pytest.raises(MachineError, match=r"podman runs no image in a file \*\.sqfs; .*; apptainer would be right"):
        choose(".sqfs")


def test_an_image_without_its_archive_is_refused_with_the_command_that_makes_it(programs, tmp_path):
    programs("podman")
    squashfs = tmp_path / "coati-bench-cpu-0123.sqfs"
    squashfs.touch()
    with pytest.raises(UserError, match=r"podman takes an image as coati-bench-cpu-0123\.oci\.tar, .* build` with --archive makes it"):
        find_image(str(squashfs))


def test_an_archive_is_known_by_the_digest_of_its_manifest(tmp_path):
    file = tmp_path / "coati-bench-cpu-0123.oci.tar"
    digest = archive(file)
    assert read_ids(file, f"sha256:{digest}").manifest == f"sha256:{digest}"
    with pytest.raises(UserError, match="holds another image; seen: sha256:"):
        read_ids(file, f"sha256:{'0' * 64}")
    file.write_bytes(b"cut off")
    with pytest.raises(UserError, match="no OCI archive"):
        read_ids(file, f"sha256:{digest}")


def test_the_archive_beside_a_named_squashfs_is_taken_and_loaded(programs, tmp_path, monkeypatch):
    programs("podman")
    file = tmp_path / "coati-bench-cpu-0123.oci.tar"
    note = {"image": "cpu", "digest": f"sha256:{archive(file)}", "environment_digest": "e", "package": "p", "sha256": {}}
    (tmp_path / "coati-bench-cpu-0123.json").write_text(json.dumps(note))
    loaded = []
    monkeypatch.setattr(runtime_module, "load", lambda runtime, path, digest: loaded.append((runtime.kind, path, digest)))
    assert find_image(str(tmp_path / "coati-bench-cpu-0123.sqfs")).file == file
    assert loaded == [("podman", file, note["digest"])]
