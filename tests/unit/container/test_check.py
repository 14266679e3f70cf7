"""`container check`: the committed environment, another one, or why it could not be tried."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from bench.cli import app
from bench.container import build, check, site
from bench.container.images import image_named
from bench.container.inputs import build_inputs
from bench.container.rootfs import ArchiveChangedError
from bench.errors import UserError

IMAGE = image_named("cpu")
INPUTS = {**build_inputs(IMAGE), "root file system": "a" * 64}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A machine that makes `digest`, or raises `error`, and lacks `missing`."""
    state: dict[str, object] = {"digest": "sha256:right", "error": None, "missing": []}

    def build_environment(*_: object, **__: object) -> SimpleNamespace:
        if isinstance(state["error"], Exception):
            raise state["error"]
        return SimpleNamespace(content=SimpleNamespace(digest=state["digest"]), inputs=INPUTS)

    monkeypatch.setattr(check, "committed", lambda _: {"digest": "sha256:right", "inputs": INPUTS})
    monkeypatch.setattr(check, "build_environment", build_environment)
    monkeypatch.setattr(check, "missing_programs", lambda *_: state["missing"])
    monkeypatch.setattr(build, "require_space", lambda *_: None)
    monkeypatch.setattr(check, "build_problems", list)
    return state


def test_the_committed_environment_is_said_to_be_it(tmp_path: Path, machine: dict[str, object]) -> None:
    assert check.check_environment(IMAGE, cache=tmp_path) == "cpu: built anew, its environment is the committed one (sha256:right)"
    assert not list((tmp_path / "images").glob(".build-*"))


def test_the_image_is_made_of_the_committed_environment_only(
    tmp_path: Path, machine: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    monkeypatch.setattr(check, "finish", lambda *given: made.append(given[2].content.digest) or SimpleNamespace(squashfs="x.sqfs"))
    assert check.check_environment(IMAGE, cache=tmp_path, keep=True).endswith("(sha256:right); image: x.sqfs")
    machine["digest"] = "sha256:other"
    with pytest.raises(UserError):
        check.check_environment(IMAGE, cache=tmp_path, keep=True)
    assert made == ["sha256:right"]


def test_another_environment_is_an_error_with_the_inputs_that_differ(tmp_path: Path, machine: dict[str, object]) -> None:
    machine["digest"] = "sha256:other"
    with pytest.raises(UserError, match="cpu: another digest; seen: sha256:other; sha256:right is committed; no input differs"):
        check.check_environment(IMAGE, cache=tmp_path)


def test_missing_programs_skip_it_and_are_named(tmp_path: Path, machine: dict[str, object]) -> None:
    machine["missing"] = ["buildah", "mksquashfs"]
    assert check.check_environment(IMAGE, cache=tmp_path).startswith("SKIPPED: buildah, mksquashfs missing")


def test_without_root_it_is_skipped_where_the_user_lacks_namespaces(
    tmp_path: Path, machine: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(check, "build_problems", site.build_problems)
    monkeypatch.setattr(site, "rootless_problems", list)
    assert check.check_environment(IMAGE, cache=tmp_path).startswith("cpu: built anew")
    monkeypatch.setattr(site, "rootless_problems", lambda: ["user namespaces"])
    assert check.check_environment(IMAGE, cache=tmp_path).startswith("SKIPPED: user namespaces missing")


def test_an_archive_that_has_changed_skips_it(tmp_path: Path, machine: dict[str, object]) -> None:
    machine["error"] = ArchiveChangedError("Debian's archive has changed")
    assert check.check_environment(IMAGE, cache=tmp_path) == "SKIPPED: Debian's archive has changed"


def test_the_verb_exits_with_2_for_another_environment_and_0_where_it_is_skipped(tmp_path: Path, machine: dict[str, object]) -> None:
    verb = ["container", "check", "cpu", "--cache", str(tmp_path)]
    machine["digest"] = "sha256:other"
    assert CliRunner().invoke(app, verb).exit_code != 0
    machine["missing"] = ["buildah"]
    skipped = CliRunner().invoke(app, verb)
    assert (skipped.exit_code, skipped.stdout.splitlines()[0][:9]) == (0, "SKIPPED: ")
