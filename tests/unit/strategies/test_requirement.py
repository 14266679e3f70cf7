"""What a strategy needs of installed packages is judged from their metadata, and planning skips with that reason."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.matrix import impossible, make_plan
from bench.strategies import requirement
from bench.strategies.base import all_strategies
from bench.strategies.requirement import Requirement, release
from tests.trials import tiny_cell


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions that packages seem to have; None: not installed."""
    seen: dict[str, str | None] = {}

    def version(package: str) -> str:
        found = seen.get(package, "1.0")
        if found is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(requirement.importlib.metadata, "version", version)
    return seen


def cell(strategy: str):
    return tiny_cell("sft", strategy=strategy, steps=4, processes_per_node=2)


def test_an_older_torch_than_fsdp_needs_is_a_reason_at_planning(versions):
    versions["torch"] = "2.5.1"
    assert impossible(cell("fsdp")) == "fsdp: torch >= 2.6 is needed; seen: 2.5.1"
    versions["torch"] = "2.6.0+cu124"
    assert impossible(cell("fsdp")) is None


@pytest.mark.parametrize(
    ("strategy", "package", "extra"),
    [
        ("deepspeed_zero2", "deepspeed", "deepspeed"),
        ("deepspeed_zero3", "deepspeed", "deepspeed"),
        ("fabric", "lightning-fabric", "fabric"),
    ],
)
def test_an_extra_that_is_absent_or_old_is_a_reason_that_says_what_to_do(versions, strategy, package, extra):
    versions[package] = None
    assert impossible(cell(strategy)) == f"{strategy}: {package} is not installed; `make install-{extra}` would be right"
    versions[package] = "0.1"
    assert impossible(cell(strategy)).startswith(f"{strategy}: {package} >= ")
    versions[package] = "99.0"
    assert impossible(cell(strategy)) is None


@pytest.mark.parametrize("strategy", sorted(name for name, kind in all_strategies().items() if kind.uses_colossalai))
def test_strategies_of_colossalai_are_skipped_where_it_is_absent_or_old(versions, strategy):
    wanted = tiny_cell("sft", strategy=strategy, steps=4, processes_per_node=2, precision="bf16-master")
    assert impossible(wanted) is None
    versions["colossalai"] = None
    assert impossible(wanted) == f"{strategy}: colossalai is not installed; `make install` would be right"
    versions["colossalai"] = "0.4.9"
    assert impossible(wanted) == f"{strategy}: colossalai >= 0.5.0 is needed; seen: 0.4.9"


def test_a_suite_skips_what_is_not_installed_and_plans_the_rest(versions, tmp_path: Path):
    versions |= {"deepspeed": None, "lightning-fabric": None, "colossalai": None, "torch": "2.13.0"}
    settings = {"device": "cpu", "launcher": "fork", "precision": "fp32", "steps": 2}
    axes = {"stage": ["sft"], "model": ["bloom-tiny"], "strategy": ["naive", "fsdp", "zero2", "deepspeed_zero3", "fabric"]}
    suite = tmp_path / "suite.yaml"
    suite.write_text(json.dumps({"suite": "extras", "axes": axes, "settings": settings}), encoding="utf-8")
    plan = make_plan(suite)
    assert {cell.strategy for cell in plan.cells.values()} == {"naive", "fsdp"}
    assert {skipped.cell.strategy: "is not installed" in skipped.reason for skipped in plan.skipped} == {
        "zero2": True,
        "deepspeed_zero3": True,
        "fabric": True,
    }


@pytest.mark.parametrize(("container", "reason"), [
    ("upstream", "fsdp: torch >= 2.6 is needed; seen: 2.5.1 in the image upstream"), ("current", None), ("cpu", None), ("none", None),
])  # fmt: skip
def test_a_plan_for_an_image_is_judged_by_what_the_image_holds(versions, tmp_path: Path, container: str, reason: str | None):
    versions["torch"] = "2.13.0"
    settings = {"device": "cpu", "precision": "fp32", "steps": 2}
    axes = {"stage": ["sft"], "model": ["bloom-tiny"], "strategy": ["naive", "fsdp", "zero2"]}
    suite = tmp_path / "suite.yaml"
    suite.write_text(json.dumps({"suite": "images", "axes": axes, "settings": settings}), encoding="utf-8")
    plan = make_plan(suite, container=None if container == "none" else container)
    assert [skipped.reason for skipped in plan.skipped] == ([reason] if reason else [])
    assert {cell.strategy for cell in plan.cells.values()} == {"naive", "zero2"} | ({"fsdp"} if reason is None else set())


def test_an_extra_that_an_image_does_not_hold_is_missing_there_though_it_is_installed_here(versions):
    versions |= {"deepspeed": "0.19.8", "lightning-fabric": None}
    assert all_strategies()["deepspeed_zero3"].missing() is None
    reason = "deepspeed is not in the image current; `container: none` would be right where it is installed"
    assert all_strategies()["deepspeed_zero3"].missing("current") == f"deepspeed_zero3: {reason}"


@pytest.mark.parametrize("ending", [".sqfs", ".oci.tar"])
def test_an_images_file_is_judged_by_its_note_and_without_one_not_at_all(tmp_path: Path, ending: str):
    file = tmp_path / f"brought{ending}"
    need = Requirement("torch", "2.6")
    assert need.problem(str(file)) is None
    (tmp_path / "brought.json").write_text(json.dumps({"image": "upstream"}), encoding="utf-8")
    assert need.problem(str(file)) == "torch >= 2.6 is needed; seen: 2.5.1 in the image upstream"


def test_a_requirement_of_the_project_itself_is_not_judged_where_nothing_trains(versions):
    versions |= {"torch": None, "colossalai": None}
    assert Requirement("torch", "2.6").problem() is None
    assert all_strategies()["zero2"].missing() is None
    assert Requirement("torch", "2.6", extra="cuda").problem() == "torch is not installed; `make install-cuda` would be right"


def test_versions_are_ordered_by_their_numbers():
    assert release("2.10") > release("2.9.1") > release("2.9") == release("2.9.0+cpu") == release("2.9.0a0+git1234")


def test_every_extra_that_a_strategy_names_can_be_installed():
    root = Path(__file__).parents[3]
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    extras = {need.extra for strategy in all_strategies().values() for need in strategy.requires if need.extra}
    assert extras == {"deepspeed", "fabric"}
    for extra in extras:
        assert f"\ninstall-{extra}:" in makefile
        assert (root / "envs" / f"{extra}.lock").exists()


def test_asking_for_reasons_imports_no_framework():
    code = (
        "import sys; from bench.strategies.base import all_strategies\n"
        "[strategy.missing() for strategy in all_strategies().values()]\n"
        "print(*{'torch', 'deepspeed', 'lightning_fabric', 'colossalai'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
