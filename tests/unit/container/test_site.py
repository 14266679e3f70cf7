"""Which ways to images a machine allows, and what it lacks for the others."""

from __future__ import annotations

import getpass
import subprocess

import pytest

from bench.container import site
from bench.container.site import has_subordinate_ids, namespaces_problem, problem_of, rootless_problems, ways
from bench.doctor import run_doctor


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Make programs, by name and script; nothing else is on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("COATI_BENCH_RUNTIME", raising=False)

    def make(**scripts: str) -> None:
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    return make


def lacking() -> dict[str, str]:
    return {way.name: "; ".join(way.needs) for way in ways()}


def test_on_a_bare_machine_only_the_hashed_environment_is_left(programs):
    needs = lacking()
    assert [name for name, text in needs.items() if not text] == ["the hashed environment on a shared path"]
    assert needs["an image built elsewhere"] == "a container runtime that works: Apptainer, podman or docker"
    assert needs["trials in apptainer"] == "apptainer or singularity on PATH"
    assert needs["trials in Enroot by Pyxis"] == "enroot on PATH; srun on PATH"
    assert "mmdebstrap (Debian: apt install mmdebstrap)" in needs["build an image as root"]


@pytest.mark.parametrize(("kind", "script"), [("podman", "echo runc"), ("apptainer", "echo apptainer version 1.4.5")])
def test_a_runtime_that_works_also_runs_images_from_elsewhere(programs, kind, script):
    programs(**{kind: script})
    needs = lacking()
    assert not needs[f"trials in {kind}"]
    assert not needs["an image built elsewhere"]
    (way,) = (way for way in ways() if way.name == f"trials in {kind}")
    assert way.note == "this one is taken; with GPUs untested"


@pytest.mark.parametrize(
    ("kind", "script", "problem"),
    [
        ("docker", "echo Cannot connect >&2; exit 1", "docker that works (its daemon); seen: Cannot connect"),
        ("podman", "exit 1", "podman that works; seen: no message"),
        ("apptainer", "echo apptainer version 1.1.9", "Apptainer 1.2 or newer; seen: apptainer version 1.1.9"),
        ("apptainer", "echo apptainer version 1.4.5", None),
    ],
)  # fmt: skip
def test_a_runtime_that_does_not_work_is_named_with_what_it_says(programs, kind, script, problem):
    programs(**{kind: script})
    assert problem_of(kind) == problem


def test_a_kernel_that_refuses_user_namespaces_is_named(monkeypatch):
    monkeypatch.setattr(site, "_read", lambda path: "0" if path.endswith("max_user_namespaces") else None)
    assert namespaces_problem() == "sysctl user.max_user_namespaces=0"
    assert "user namespaces; seen: sysctl user.max_user_namespaces=0" in rootless_problems()


def test_an_ordinary_user_is_told_which_subordinate_ids_are_missing(programs, monkeypatch):
    programs(newuidmap="", newgidmap="", unshare="")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(site, "has_subordinate_ids", lambda file: file.name == "subuid")
    assert rootless_problems() == [
        f"a line for {getpass.getuser()} in /etc/subgid (as root: usermod --add-subgids 200000-265535 {getpass.getuser()})"
    ]


def test_too_few_subordinate_ids_are_none(tmp_path):
    file = tmp_path / "subuid"
    for count, enough in (("65536", True), ("1000", False)):
        file.write_text(f"somebody:100000:65536\n{getpass.getuser()}:200000:{count}\n")
        assert has_subordinate_ids(file) is enough
    assert not has_subordinate_ids(tmp_path / "none")


def test_a_runtime_that_never_answers_is_given_up(programs, monkeypatch):
    programs(docker="")

    def never(*_, **__):
        raise subprocess.TimeoutExpired("docker", 20)

    monkeypatch.setattr(subprocess, "run", never)
    assert problem_of("docker").startswith("docker that answers; seen: ")


def test_the_doctor_lists_them(capsys):
    run_doctor()
    text = capsys.readouterr().out
    assert "build an image as an ordinary user" in text
    assert "yes  the hashed environment on a shared path (`make install` in a checkout that every node sees; `container: none`)" in text
