"""Make envs/*.lock from pyproject.toml with uv, and say which versions changed.

    python envs/lock.py                           newest versions that fit
    python envs/lock.py --exclude-newer 2026-11-20

Locks are hashed requirement files for pip: no address of a registry stands in them, so the same lock serves the public
registry, a mirror and a folder of wheels. There are two families, by torch: `cpu` and `cuda`.

    cpu.lock             all but what only torch's CUDA build needs
    cpu-cuda-build.lock  what that build needs besides; used where no CPU build of torch is to be had
    cuda.lock            for machines with NVIDIA GPUs
    sdist.lock           what exists as source only; built without isolation, after the others

The hashes are those of every file that the registry has for a version. A CPU build of torch (`2.13.0+cpu`) that pip is
configured to find is allowed too, and its hash is kept by later runs on machines that cannot see it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
ENVS = ROOT / "envs"
TARGET = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"]
CUDA_BUILD = re.compile(r"^(nvidia-|cuda-|triton$)")
"""Names of what torch's CUDA build requires and its CPU build does not."""
CPU_HASH = re.compile(r"^# (torch==\S+\+cpu) (sha256:[0-9a-f]{64})$", re.MULTILINE)


class Locked(NamedTuple):
    """One requirement of a lock: its lines, and the names of those that ask for it (`pyproject.toml` for ours)."""

    name: str
    version: str
    hashes: tuple[str, ...]
    via: tuple[str, ...]


def main() -> int:
    """Write the locks; 0, or 3 where uv is missing or finds no resolution."""
    parser = argparse.ArgumentParser(description="Make envs/*.lock from pyproject.toml.")
    parser.add_argument("--exclude-newer", metavar="DATE", help="ignore releases after this date")
    options = parser.parse_args()
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["coati-bench"]["lock"]
    extra = ["--exclude-newer", options.exclude_newer] if options.exclude_newer else []
    before = {path.name: versions(path.read_text()) for path in ENVS.glob("*.lock")}
    for name, text in make_locks(facts, extra).items():
        (ENVS / name).write_text(text)
        print_changes(name, before.get(name, {}), versions(text))
    return 0


def make_locks(facts: dict, extra: list[str]) -> dict[str, str]:
    """Return the text of every lock by file name."""
    locks: dict[str, str] = {}
    for family, torch in facts["families"].items():
        locked, sizes = resolve(torch, facts["drop"], extra)
        wheels = [item for item in locked if item.name not in facts["sdists"]]
        sources = [item for item in locked if item.name in facts["sdists"]]
        for item in wheels:
            if not sizes[item.name].get("wheel"):
                sys.exit(
                    f"{item.name} {item.version} has no wheel for the target; add it to tool.coati-bench.lock.sdists in pyproject.toml"
                )
        if family == "cpu":
            plain = reachable(locked)
            also = cpu_build(torch)
            locks["cpu.lock"] = write(f"cpu: torch {torch}", [item for item in wheels if item.name in plain], sizes, "wheel", also)
            locks["cpu-cuda-build.lock"] = write(
                f"cpu: what torch's CUDA build needs besides cpu.lock; torch {torch}",
                [item for item in wheels if item.name not in plain],
                sizes,
                "wheel",
            )
        else:
            locks[f"{family}.lock"] = write(f"{family}: torch {torch}", wheels, sizes, "wheel")
        text = write("source only; every family", sources, sizes, "sdist")
        if locks.setdefault("sdist.lock", text) != text:
            sys.exit(f"the families want different sources: {locks['sdist.lock']}\n{text}")
    return locks


def resolve(torch: str, drop: list[str], extra: list[str]) -> tuple[list[Locked], dict[str, dict[str, int]]]:
    """Return what uv locks for this torch, and the bytes of each name's wheel and sdist for the target platform."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = Path(folder) / "overrides.txt"
        overrides.write_text("\n".join([f"torch=={torch}", *(f"{name} ; sys_platform == 'never'" for name in drop)]) + "\n")
        common = [
            "pip",
            "compile",
            "pyproject.toml",
            "--extra",
            "dev",
            "--override",
            str(overrides),
            "--no-header",
            "--no-emit-index-url",
            "-q",
            *TARGET,
            *extra,
        ]
        text = uv([*common, "--generate-hashes", "--annotation-style", "line", "-o", f"{folder}/lock.txt"], Path(folder) / "lock.txt")
        pylock = tomllib.loads(uv([*common, "--format", "pylock.toml", "-o", f"{folder}/pylock.toml"], Path(folder) / "pylock.toml"))
    sizes = {}
    for package in pylock["packages"]:
        wheels = [wheel for wheel in package.get("wheels", []) if fits(file_name(wheel["url"]))]
        sizes[package["name"]] = {
            "wheel": max((wheel.get("size", 0) for wheel in wheels), default=0),
            "sdist": package.get("sdist", {}).get("size", 0),
        }
    return parse(text), sizes


def uv(arguments: list[str], output: Path) -> str:
    """Run uv and return what it wrote to `output`."""
    program = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if program is None:
        print("uv is missing; it makes the locks and is not needed to install: python -m pip install uv", file=sys.stderr)
        sys.exit(3)
    done = subprocess.run([program, *arguments], cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        sys.exit(3)
    return output.read_text()


def fits(wheel: str) -> bool:
    """Whether a wheel is for CPython 3.11 on Linux x86_64 (or for anything)."""
    _, python, abi, platform = wheel.removesuffix(".whl").rsplit("-", 3)
    return any(tag in {"any"} or ("linux" in tag and "x86_64" in tag and "musl" not in tag) for tag in platform.split(".")) and (
        abi == "none" or abi == "cp311" or (abi == "abi3" and any(int(tag[3:]) <= 11 for tag in python.split(".") if tag.startswith("cp3")))
    )


def file_name(url: str) -> str:
    """Last part of an address."""
    return unquote(urlsplit(url).path).rsplit("/", 1)[-1]


def parse(text: str) -> list[Locked]:
    """Return the requirements of a hashed requirement file with line annotations.

    >>> parse("six==1.17.0 \\\\\\n    --hash=sha256:aa \\\\\\n    --hash=sha256:bb\\n    # via coati-bench (pyproject.toml), torch\\n")
    [Locked(name='six', version='1.17.0', hashes=('sha256:aa', 'sha256:bb'), via=('coati-bench', 'torch'))]
    """
    items = []
    for chunk in re.split(r"\n(?=[A-Za-z0-9])", text.strip()):
        head = re.match(r"([A-Za-z0-9._-]+)==(\S+)", chunk)
        if head is None:
            continue
        via = re.search(r"# via (.*)", chunk)
        names = tuple(name.split(" ")[0] for name in via.group(1).split(", ")) if via else ()
        items.append(Locked(head.group(1), head.group(2), tuple(re.findall(r"--hash=(\S+)", chunk)), names))
    return items


def reachable(locked: list[Locked]) -> set[str]:
    """Names that are needed when torch asks for none of its CUDA packages."""
    names = {item.name for item in locked}
    found: set[str] = set()
    while True:
        more = {
            item.name
            for item in locked
            if item.name not in found
            and any(asker not in names or (asker in found and not CUDA_BUILD.match(item.name)) for asker in item.via)
        }
        if not more:
            return found
        found |= more


def cpu_build(torch: str) -> tuple[str, str] | None:
    """Return (`torch==<version>+cpu`, hash) of the CPU build that pip is configured to find, or that the last lock names."""
    wanted = f"torch=={torch}+cpu"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--dry-run",
            "--no-deps",
            "--ignore-installed",
            "--report",
            str(report),
            wanted,
        ]
        done = subprocess.run(command, text=True, capture_output=True, check=False)
        if done.returncode == 0:
            info = json.loads(report.read_text())["install"][0]["download_info"]
            found = info.get("archive_info", {}).get("hashes", {}).get("sha256")
            path = Path(unquote(urlsplit(info["url"]).path))
            return wanted, f"sha256:{found or hashlib.sha256(path.read_bytes()).hexdigest()}"
    old = dict(CPU_HASH.findall((ENVS / "cpu.lock").read_text())) if (ENVS / "cpu.lock").exists() else {}
    return (wanted, old[wanted]) if wanted in old else None


def write(what: str, items: list[Locked], sizes: dict[str, dict[str, int]], kind: str, also: tuple[str, str] | None = None) -> str:
    """Return the text of a lock."""
    total = sum(sizes[item.name][kind] for item in items)
    torch = sum(sizes[item.name][kind] for item in items if item.name == "torch")
    lines = [f"# {what}", "# Made by envs/lock.py from pyproject.toml; do not edit. Sizes are for CPython 3.11 on Linux x86_64."]
    lines += [f"# bytes: {total}", f"# bytes of torch: {torch}"]
    lines += [f"# {also[0]} {also[1]}"] if also else []
    for item in sorted(items):
        hashes = sorted({*item.hashes, *([also[1]] if also and item.name == "torch" else [])})
        lines.append(f"{item.name}=={item.version} \\\n    " + " \\\n    ".join(f"--hash={value}" for value in hashes))
        lines.append(f"    # via {', '.join(item.via)}")
    return "\n".join(lines) + "\n"


def versions(text: str) -> dict[str, str]:
    """Versions by name in a lock."""
    return {item.name: item.version for item in parse(text)}


def print_changes(name: str, before: dict[str, str], after: dict[str, str]) -> None:
    """Say what changed in one lock."""
    changed = [package for package in sorted({*before, *after}) if before.get(package) != after.get(package)]
    print(f"{name}: {len(after)} packages, {len(changed)} changed")
    if before:
        for package in changed:
            print(f"  {package}: {before.get(package, 'absent')} -> {after.get(package, 'absent')}")


if __name__ == "__main__":
    sys.exit(main())
