from __future__ import annotations

import hashlib
import json
import re
from types import SimpleNamespace

import pytest

from bench.container import build, images, inputs, requirements, verify, wheelhouse
from bench.container.images import image_named
from bench.container.manifest import Layer, environment_content
from bench.container.tools import explain, require, require_space, run
from bench.container.wheelhouse import make_wheelhouse, requirements_of
from bench.data.cache import sha256_of
from bench.errors import MachineError, UserError


@pytest.mark.parametrize("name", list(images.images()))
def test_an_image_holds_what_the_package_needs_and_none_of_its_developers_tools(name):
    locked = {item.name for item in requirements.read_lock(requirements.wheel_requirements(image_named(name)))}
    assert {"torch", "transformers", "peft", "bitsandbytes", "pydantic", "snakemake", "setuptools", "wheel"} <= locked
    assert not {"pytest", "ruff", "mypy", "playwright", "hypothesis"} & locked


@pytest.mark.parametrize("name", list(images.images()))
def test_everything_in_an_image_is_pinned_and_hashed_and_names_no_place(name):
    image = image_named(name)
    for text in (requirements.wheel_requirements(image), requirements.source_requirements(image)):
        assert "://" not in text
        items = requirements.read_lock(text)
        assert items
        assert all(re.search(r"==\S+ \\\n", item.text) and "--hash=sha256:" in item.text for item in items)


def test_an_image_that_is_not_in_the_table_is_refused_with_those_that_are():
    with pytest.raises(UserError, match=r"image 'curent': there is no such image; one of cpu, current, upstream"):
        image_named("curent")


def test_a_changed_lock_is_named_as_what_differs():
    image = image_named("cpu")
    now = inputs.build_inputs(image)
    before = {**now, "wheels": "0" * 64}
    assert [item.name for item in inputs.differences(before, now)] == ["wheels"]


def test_the_package_digest_follows_content_and_not_time(monkeypatch, tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(inputs, "SOURCE_TREE", tmp_path)
    first = inputs.package_digest()
    (tmp_path / "bench" / "a.py").touch()
    (tmp_path / "bench" / "__pycache__").mkdir()
    (tmp_path / "bench" / "__pycache__" / "a.pyc").write_bytes(b"0")
    assert inputs.package_digest() == first
    (tmp_path / "bench" / "a.py").write_text("x = 2\n")
    assert inputs.package_digest() != first


def built_file(tmp_path, content=b"squashfs"):
    digest = "sha256:" + "ab" * 32
    path = tmp_path / "coati-bench-cpu-abababababab.sqfs"
    path.write_bytes(content)
    note = {"image": "cpu", "digest": digest, "environment_digest": digest, "inputs": {}, "package": "p",
            "sha256": {path.name: sha256_of(path)}, "squashfs": str(path), "archive": None}  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(note))
    return path


def test_an_image_file_is_what_its_note_says(tmp_path):
    assert verify.check_file(built_file(tmp_path))["image"] == "cpu"


@pytest.mark.parametrize("damage", ["tampered", "cut off"])
def test_a_changed_image_file_is_refused(tmp_path, damage):
    path = built_file(tmp_path)
    path.write_bytes(b"squashfz" if damage == "tampered" else b"squ")
    with pytest.raises(UserError, match=r"not the image that was built; seen: sha256 .*would be right; bring or build it again"):
        verify.check_file(path)


def test_an_image_file_without_its_note_or_not_there_is_refused(tmp_path):
    path = built_file(tmp_path)
    path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="is not beside it"):
        verify.check_file(path)
    with pytest.raises(UserError, match="no such image"):
        verify.check_file(tmp_path / "x.sqfs")


def test_another_digest_is_explained_by_the_inputs_that_differ(monkeypatch, tmp_path):
    image = image_named("cpu")
    now = inputs.build_inputs(image)
    path = built_file(tmp_path)
    built = build.Built(image, "sha256:new", "sha256:x", now, "p", path)
    monkeypatch.setattr(verify, "committed", lambda _: {"digest": "sha256:old", "inputs": {**now, "wheels": "f" * 64}})
    (text,) = verify.verify(image, built)
    assert "seen: sha256:new; sha256:old is committed; inputs differ: wheels: ffffffffffff -> " in text
    monkeypatch.setattr(verify, "committed", lambda _: {"digest": "sha256:old", "inputs": now})
    assert "no input differs" in verify.verify(image, built)[0]
    monkeypatch.setattr(verify, "committed", lambda _: {"digest": "sha256:new", "inputs": now})
    assert verify.verify(image, built) == []


def test_an_image_says_inside_what_it_was_built_on_and_of_which_commit(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(build, "keep", lambda image, tree, it, *_, **__: made.append(it))
    monkeypatch.setattr(build, "revision", lambda: "c0ffee")
    tree = SimpleNamespace(run=lambda *_, **__: None, layer_of=lambda _: Layer("sha256:p", 1))
    environment = build.Environment(environment_content(Layer("sha256:e", 1), "l", 0), {})
    build.finish(image_named("cpu"), tree, environment, tmp_path, tmp_path)
    home = made[0].package / "opt" / "coati-bench"
    said = {name: (home / name).read_text().strip() for name in ("environment.digest", "revision", "source.sha256")}
    assert said == {"environment.digest": environment.content.digest, "revision": "c0ffee", "source.sha256": inputs.package_digest(home)}
    assert json.loads(made[0].content.configuration)["config"]["Labels"]["org.opencontainers.image.revision"] == "c0ffee"


def test_missing_programs_are_all_named_with_their_packages(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MachineError, match=r"missing: buildah, mksquashfs; on Debian and Ubuntu: apt install buildah squashfs-tools"):
        require("buildah", "mksquashfs")


def test_too_little_space_is_said_before_anything_is_made(tmp_path):
    with pytest.raises(MachineError, match=r"too little space for the image; seen: .* GB free; 1000000 GB would be right"):
        require_space(tmp_path / "not" / "there", 10**15)
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("write: No space left on device", "the disk is full"),
        ("newuidmap: not found", "uidmap"),
        ("unshare: failed", "user namespaces"),
        ("THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", "a file is not the locked one: it, or the lock, was changed"),
    ],
)
def test_a_failed_program_is_explained(output, advice):
    assert advice in explain(output)


def test_a_wheelhouse_goes_into_a_new_folder_only(tmp_path):
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "mine").touch()
    with pytest.raises(UserError, match="not empty; seen: 1 entries"):
        make_wheelhouse(image_named("cpu"), tmp_path / "house", python="3.12", cache=tmp_path)


def test_a_changed_wheel_is_named_and_fetched_again_once_it_is_removed(tmp_path, monkeypatch):
    def fetch(_, house, **__):
        (house / "six-1.0-py3-none-any.whl").write_bytes(b"wheel")

    monkeypatch.setattr(wheelhouse, "fetch", fetch)
    lock = f"six==1.0 \\\n    --hash=sha256:{hashlib.sha256(b'wheel').hexdigest()}\n"
    wheel = wheelhouse.filled("cpu", lock, "", tmp_path) / "six-1.0-py3-none-any.whl"
    wheelhouse.filled("cpu", lock, "", tmp_path)
    wheel.write_bytes(b"tampered")
    with pytest.raises(
        MachineError, match=r"six-1.0-py3-none-any.whl: not a locked file; seen: sha256 \w{64}, which no lock names; remove"
    ):
        wheelhouse.filled("cpu", lock, "", tmp_path)
    wheel.unlink()
    assert (wheelhouse.filled("cpu", lock, "", tmp_path) / wheel.name).read_bytes() == b"wheel"


def test_what_a_failed_step_of_buildah_says_is_told_without_its_noise(tmp_path):
    script = "echo pip: no such wheel >&2; echo 'subprocess exited with status 1' >&2; echo 'Error: exit status 1' >&2; exit 1"
    with pytest.raises(MachineError, match=r"^environment.sh: it failed; seen: sh ended with 1: pip: no such wheel$"):
        run(["sh", "-c", script], what="environment.sh")


def test_a_wheelhouse_lists_its_wheels_with_hashes(tmp_path):
    (tmp_path / "galore_torch-1.0-py3-none-any.whl").write_bytes(b"wheel")
    assert requirements_of(tmp_path) == f"galore-torch==1.0 --hash=sha256:{sha256_of(tmp_path / 'galore_torch-1.0-py3-none-any.whl')}\n"
