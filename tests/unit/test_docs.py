"""Generated pages are those that would be generated now, and every room of the package stands on the map."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_architecture_page_is_up_to_date() -> None:
    """Run `python docs/generate.py` when this fails."""
    assert (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8") == generator().architecture()


def test_every_package_has_a_room_on_the_map() -> None:
    packages = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "bench").rglob("__init__.py")}
    assert packages == set(generator().ROOMS)


def test_every_module_says_in_its_first_line_what_it_is() -> None:
    silent = [path.name for path in (ROOT / "bench").rglob("*.py") if path.name != "__init__.py" and not generator()._first_line(path)]
    assert silent == []


def test_every_target_of_the_makefile_stands_once_and_is_listed_by_help() -> None:
    done = subprocess.run(["make", "-C", str(ROOT), "--no-print-directory", "help"], capture_output=True, text=True, check=True)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert done.stderr == ""
    assert [line.split()[1] for line in done.stdout.splitlines()] == targets
