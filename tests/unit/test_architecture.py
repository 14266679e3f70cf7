"""What may import what, where no import contract can see it: planning, reporting and starting never load torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "peft", "colossalai", "accelerate")
ALGORITHMS = ("bench.rl", "bench.rollout", "bench.stages.", "bench.worker", "bench.measure.evidence.")
LOADS_TORCH = {
    "bench.data.collate",
    "bench.models.build",
    "bench.models.random_weights",
    "bench.measure.clock",
    "bench.measure.memory",
    "bench.resume",
}
"""Only these, beside the algorithms (the stages' base is none), may load a framework when they are imported."""


def modules() -> list[str]:
    paths = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "bench").rglob("*.py"))
    names = (".".join(path.parts).removesuffix(".__init__") for path in paths)
    return sorted(name for name in names if name != "bench.__main__")


def loaded_by(names: list[str]) -> list[str]:
    code = (
        "import importlib, json, sys\n"
        f"[importlib.import_module(name) for name in {names!r}]\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "name", ["bench.cli", "bench.matrix", "bench.report.commands", "bench.launch.workflow", "bench.doctor", "bench.needs"]
)
def test_planning_reporting_and_starting_load_no_framework(name: str) -> None:
    assert loaded_by([name]) == []


def test_every_module_outside_the_algorithms_can_be_imported_without_a_framework() -> None:
    light = [name for name in modules() if name not in LOADS_TORCH and (name == "bench.stages.base" or not name.startswith(ALGORITHMS))]
    assert "bench.strategies.gemini" in light
    assert loaded_by(light) == []


def imports_of(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, `import_module("...")` included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module" and isinstance(node.args[0], ast.Constant):
            found.add(str(node.args[0].value).split(".")[0])
    return found


def test_only_strategies_import_colossalai() -> None:
    using = {path.relative_to(ROOT / "bench").parts[0] for path in (ROOT / "bench").rglob("*.py") if "colossalai" in imports_of(path)}
    assert using == {"strategies"}


def test_everything_imported_is_a_stated_requirement() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    as_imported = {"pyyaml": "yaml", "nvidia-ml-py": "pynvml", "cyclonedx-python-lib": "cyclonedx", "packageurl-python": "packageurl"}
    stated = {item.split(">")[0].split("=")[0] for item in sum(project["optional-dependencies"].values(), project["dependencies"])}
    known = {as_imported.get(name, name).replace("-", "_") for name in stated} | set(sys.stdlib_module_names) | {"bench", "tests"}
    own = {path.stem for folder in ("tests", "envs", "docs", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    files = [path for folder in ("bench", "tests", "envs", "docs", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert {name: str(path) for path in files for name in imports_of(path) - known - own} == {}
