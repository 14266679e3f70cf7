"""Compiled kernels are made once for what decides them, known by their hash, and never taken when they were changed."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from bench.container import build, kernels, verify
from bench.container.buildah import Tree
from bench.container.images import image_named, images
from bench.container.inputs import build_inputs, kernel_inputs
from bench.container.manifest import Layer
from bench.container.requirements import compiler_requirements, read_lock
from bench.errors import MachineError

IMAGE = image_named("current")

ALL = [(2, 75), (2, 80), (2, 86), (2, 90), (2, 100), (2, 120), (1, 120)]
"""Kind and capability of what the compiler makes for the image: machine code for all, PTX for the last."""


def fat_binary(entries: list[tuple[int, int]]) -> bytes:
    """As nvcc writes it into a module: heads of 64 bytes, 8 bytes of code each."""
    parts = [struct.pack("<HHIQ", kind, 1, 64, 8) + bytes(12) + struct.pack("<I", number) + bytes(32 + 8) for kind, number in entries]
    body = b"".join(parts)
    return b"\x7fELF" + struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body + b"rest"


ENVIRONMENT = Layer("sha256:environment", 1)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """A compiler that writes two modules; its calls."""
    calls: list[dict[str, str]] = []

    def run(_: Tree, command: list[str], mounts: dict[Path, str], *, what: str, variables: dict[str, str]) -> None:
        (context,) = (folder for folder, place in mounts.items() if place == "/opt/kernels")
        calls.append({**variables, "command": " ".join(command), "locked": (context / "compiler.txt").read_text()})
        assert (context / what).exists()
        target = context / "out" / "colossalai" / "_C"
        target.mkdir(parents=True)
        for name in ("cpu_adam_x86", "fused_optim_cuda"):
            (target / f"{name}.cpython-311-x86_64-linux-gnu.so").write_bytes(name.encode() + fat_binary(ALL))

    monkeypatch.setattr(Tree, "run", run)
    monkeypatch.setattr(Tree, "layer", lambda _: ENVIRONMENT)
    monkeypatch.setattr(kernels, "compiler_wheelhouse", lambda image, folder: folder / "compiler")
    return calls


def kernels_for(folder: Path, image: Any = IMAGE) -> tuple[kernels.Kernels, Path] | None:
    number = len(list(folder.glob("scratch*")))
    (folder / f"scratch{number}").mkdir()
    return kernels.kernels_for(image, Tree(folder / "tree", 0), ENVIRONMENT, folder / f"scratch{number}", folder)


def test_they_are_compiled_once_for_the_architectures_of_the_image(tmp_path: Path, compiler: list[dict[str, str]]) -> None:
    first, again = kernels_for(tmp_path), kernels_for(tmp_path)
    assert first is not None
    assert first == again
    (call,) = compiler
    assert call["ARCHITECTURES"] == "7.5;8.0;8.6;9.0;10.0;12.0+PTX"
    assert call["command"] == "sh /opt/kernels/kernels.sh"
    assert "nvidia-cuda-nvcc==13.0" in call["locked"]
    assert sorted(path.name for path in first[1].glob("*.so")) == sorted(first[0].modules)


def test_their_digest_is_that_of_names_and_contents(tmp_path: Path, compiler: list[dict[str, str]]) -> None:
    found = kernels_for(tmp_path)
    assert found is not None
    assert re.fullmatch(r"sha256:\w{64}", found[0].digest)
    assert kernels.Kernels.of(found[0].to_json()) == found[0]


def test_a_kernel_that_was_changed_is_refused(tmp_path: Path, compiler: list[dict[str, str]]) -> None:
    found = kernels_for(tmp_path)
    assert found is not None
    module = next(found[1].glob("*.so"))
    module.write_bytes(b"tampered")
    with pytest.raises(MachineError, match=r"not the kernel that was compiled; seen: \w{64}; \w{64} would be right; remove"):
        kernels_for(tmp_path)


def test_a_compiler_that_makes_nothing_leaves_nothing(
    tmp_path: Path, compiler: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tree, "run", lambda *_, **__: None)
    with pytest.raises(MachineError, match="no kernel came out"):
        kernels_for(tmp_path)
    assert not list(tmp_path.glob("kernels-*"))


def test_a_compiler_that_changes_the_environment_is_refused(
    tmp_path: Path, compiler: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tree, "layer", lambda _: Layer("sha256:changed", 2))
    with pytest.raises(MachineError, match=r"compiling kernels changed the environment; seen: .*sha256:changed.*sha256:environment"):
        kernels_for(tmp_path)
    assert not list(tmp_path.glob("kernels-*"))


def test_the_architectures_of_a_module_are_read_from_it() -> None:
    assert kernels.architectures_in(fat_binary(ALL[:1]) + fat_binary(ALL[5:])) == {"7.5", "12.0", "12.0+"}
    assert kernels.architectures_in(b"\x7fELF of a processor") == set()


def test_a_module_without_code_for_an_architecture_of_the_image_is_refused(tmp_path: Path, compiler: list[dict[str, str]]) -> None:
    more = IMAGE._replace(architectures=(*IMAGE.architectures[:-1], "10.3", "12.0+"))
    with pytest.raises(MachineError, match=r"its kernels have no code for 10\.3; seen: 10\.0, 12\.0, 12\.0\+, 7\.5, .* would be right"):
        kernels_for(tmp_path, more)
    assert not list(tmp_path.glob("kernels-*"))


def test_an_image_without_a_compiler_has_none(tmp_path: Path) -> None:
    assert kernels_for(tmp_path, image_named("upstream")) is None
    assert kernel_inputs(image_named("cpu")) == {}


def test_they_are_made_anew_for_another_environment_and_do_not_decide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before, environment = kernel_inputs(IMAGE), build_inputs(IMAGE)
    assert kernel_inputs(IMAGE._replace(architectures=("9.0",)))["architectures"] != before["architectures"]
    assert build_inputs(IMAGE._replace(architectures=("9.0",), compiler=None)) == environment
    assert kernel_inputs(IMAGE._replace(epoch=1))["environment"] != before["environment"]


def test_a_compiler_is_locked_for_the_images_own_cuda_with_hashes() -> None:
    for image in images().values():
        locked = read_lock(compiler_requirements(image))
        assert bool(locked) == bool(image.compiler)
        assert {item.name for item in locked if not item.version.startswith(f"{image.cuda}.")} == set()
        assert all("--hash=sha256:" in item.text for item in locked)


def built_with(tmp_path: Path, digest: str) -> build.Built:
    modules = kernels.Kernels(digest, kernel_inputs(IMAGE), {"x.so": "0" * 64})
    return build.Built(IMAGE, "sha256:environment", "sha256:x", build_inputs(IMAGE), "p", tmp_path / "x.sqfs", None, modules)


def test_other_kernels_than_the_committed_ones_are_told_with_what_differs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = {"digest": "sha256:kernels", "inputs": {**kernel_inputs(IMAGE), "compiler": "f" * 64}}
    known = {"digest": "sha256:environment", "inputs": build_inputs(IMAGE), "kernels": before}
    monkeypatch.setattr(verify, "committed", lambda _: known)
    assert verify.verify(IMAGE, built_with(tmp_path, "sha256:kernels")) == []
    (text,) = verify.verify(IMAGE, built_with(tmp_path, "sha256:others"))
    assert text.startswith(
        "current: other kernels; seen: sha256:others; sha256:kernels is committed; inputs differ: compiler: ffffffffffff -> "
    )
    monkeypatch.setattr(verify, "committed", lambda _: {key: value for key, value in known.items() if key != "kernels"})
    assert "none is committed" in verify.verify(IMAGE, built_with(tmp_path, "sha256:kernels"))[0]


def test_explain_says_which_images_have_kernels() -> None:
    assert any(line.startswith("ColossalAI's kernels, compiled into it") for line in verify.explain(IMAGE))
    assert verify.NO_KERNELS in verify.explain(image_named("upstream"))
    assert not any("kernels" in line for line in verify.explain(image_named("cpu")))


def test_an_image_is_found_again_only_with_the_kernels_that_would_be_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = built_with(tmp_path, "sha256:kernels")
    made.squashfs.write_bytes(b"squashfs")
    (tmp_path / "coati-bench-current-x.json").write_text(json.dumps(made.to_json()))
    assert build.built_here(IMAGE, tmp_path) == [made]
    assert build.built_here(IMAGE._replace(architectures=("9.0",)), tmp_path) == []
