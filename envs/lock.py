"""Make envs/*.lock from pyproject.toml with uv, and say which versions changed.

    python envs/lock.py                           newest versions that fit
    python envs/lock.py --exclude-newer 2026-11-20
    python envs/lock.py --extras-only             the optional extras, beside the locks that are there
    python envs/lock.py --compilers-only          the CUDA compilers that images' kernels are made with
    python envs/lock.py --family upstream         one family; what the family `cuda` locks stays where its torch allows it

Locks are hashed requirement files for pip: no address of a registry stands in them, so the same lock serves the public
registry, a mirror and a folder of wheels. There are three families, by torch: `cpu`, `cuda` and `upstream`, the newest torch
within ColossalAI's own limits, for older drivers; the optional extras are for the first two.

    cpu.lock             all but torch
    cpu-torch-cpu.lock   torch's CPU build; from wherever pip is configured to find it
    cpu-torch-cuda.lock  torch's CUDA build and what that needs besides; used where no CPU build is to be had
    cuda.lock            all, for machines with NVIDIA GPUs
    upstream.lock        the same with the older torch
    sdist.lock           what exists as source only; built without isolation, after the others
    compilers/NAME.lock  a CUDA compiler; it is installed nowhere but while an image's kernels are compiled
    NAME.lock            what the optional extra NAME needs besides, for every family

The hashes are those of every file that the registry has for a version; that of the CPU build is kept by later runs on
machines where pip cannot find one.
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
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
ENVS = ROOT / "envs"
TARGET = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"]
CUDA_BUILD = re.compile(r"^(nvidia-|cuda-|triton$)")
"""Names of what torch's CUDA build requires and its CPU build does not."""


class Locked(NamedTuple):
    """One requirement of a lock."""

    name: str
    version: str
    hashes: tuple[str, ...]
    via: tuple[str, ...]
    """Who asks for it; `coati-bench` is this project."""
    size: int = 0
    """Bytes of its file for the target platform."""


def main() -> int:
    """Write the locks; 0, or 3 where uv is missing or finds no resolution."""
    parser = argparse.ArgumentParser(description="Make envs/*.lock from pyproject.toml.")
    parser.add_argument("--exclude-newer", metavar="DATE", help="ignore releases after this date")
    parser.add_argument("--extras-only", action="store_true", help="leave the other locks as they are")
    parser.add_argument("--compilers-only", action="store_true", help="the CUDA compilers and nothing else")
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["coati-bench"]["lock"]
    parser.add_argument("--family", choices=list(facts["families"]), help="this family only, no extras")
    options = parser.parse_args()
    extra = ["--exclude-newer", options.exclude_newer] if options.exclude_newer else []
    if options.family:
        facts["families"] = {options.family: facts["families"][options.family]}
        locks = make_locks(facts, extra)
        check_sources(locks.pop("sdist.lock"))
        save(locks)
        return 0
    if options.compilers_only:
        save(compiler_locks(facts, extra))
        return 0
    if not options.extras_only:
        save(make_locks(facts, extra) | compiler_locks(facts, extra))
    save({f"{name}.lock": extra_lock(name, facts, extra) for name in facts["extras"]})
    return 0


def check_sources(sources: str) -> None:
    """Exit unless `sources` is the lock of sources that is there, which every family shares."""
    before = (ENVS / "sdist.lock").read_text()
    if sources != before:
        sys.exit(f"the sources would change for every family: {before}\n{sources}\nwithout --family all locks are made anew")


def save(locks: dict[str, str]) -> None:
    """Write the locks and say what changed."""
    for name, text in locks.items():
        before = (ENVS / name).read_text() if (ENVS / name).exists() else ""
        (ENVS / name).parent.mkdir(exist_ok=True)
        (ENVS / name).write_text(text)
        print_changes(name, versions(before), versions(text))


def extra_lock(name: str, facts: dict, extra: list[str]) -> str:
    """Return the lock of an optional extra: what it needs beside the locks that are there, the same for every family."""
    found = {}
    for family in facts["extended"]:
        torch = facts["families"][family]
        files = [ENVS / "sdist.lock", *(path for path in ENVS.glob(f"{family}*.lock"))]
        there = [item for path in files for item in parse(path.read_text())]
        names = {item.name for item in there}
        found[family] = write(f"extra {name}", [item for item in resolve(torch, facts, extra, name, there) if item.name not in names])
    if len(set(found.values())) != 1:
        sys.exit(f"the families want different packages for {name}: {found}")
    return found.popitem()[1]


def compiler_locks(facts: dict, extra: list[str]) -> dict[str, str]:
    """Return the locks of the CUDA compilers by file name."""
    return {f"compilers/{name}.lock": compiler_lock(name, wanted, extra) for name, wanted in facts["compilers"].items()}


def compiler_lock(name: str, wanted: list[str], extra: list[str]) -> str:
    """Return the lock of one compiler; exits where a file for the target is missing."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "requirements.in"
        asked.write_text("".join(f"{line}\n" for line in wanted))
        common = ["pip", "compile", str(asked), "--no-header", "--no-emit-index-url", "-q", *TARGET, *extra]
        text = uv([*common, "--generate-hashes", "--annotation-style", "line"], Path(folder) / "lock.txt")
        packages = tomllib.loads(uv([*common, "--format", "pylock.toml"], Path(folder) / "pylock.toml"))["packages"]
    sizes = {package["name"]: file_size(package, from_source=False) for package in packages}
    if absent := [package for package, size in sizes.items() if not size]:
        sys.exit(f"no wheel for the target: {', '.join(absent)}")
    return write(f"compiler {name}", [item._replace(size=sizes[item.name], via=(f"compiler {name}",)) for item in parse(text)])


def make_locks(facts: dict, extra: list[str]) -> dict[str, str]:
    """Return the text of every lock by file name."""
    locks: dict[str, str] = {}
    for family, torch in facts["families"].items():
        locked = resolve(torch, facts, extra, preferred=locks.get("cuda.lock") or read_cuda_lock() if family == "upstream" else "")
        wheels = [item for item in locked if item.name not in facts["sdists"]]
        locks |= cpu_locks(torch, wheels) if family == "cpu" else {f"{family}.lock": write(f"{family}: torch {torch}", wheels)}
        sources = write("every family: what exists as source only", [item for item in locked if item.name in facts["sdists"]])
        if locks.setdefault("sdist.lock", sources) != sources:
            sys.exit(f"the families want different sources: {locks['sdist.lock']}\n{sources}")
    return locks


def read_cuda_lock() -> str:
    """The lock of the family `cuda` as it is there."""
    return (ENVS / "cuda.lock").read_text()


def cpu_locks(torch: str, wheels: list[Locked]) -> dict[str, str]:
    """Return the locks of the family `cpu`."""
    common = reachable(wheels) - {"torch"}
    locks = {
        "cpu.lock": write("cpu: all but torch", [item for item in wheels if item.name in common]),
        "cpu-torch-cuda.lock": write(f"cpu: torch {torch}, CUDA build", [item for item in wheels if item.name not in common]),
    }
    build = cpu_build(torch)
    return locks if build is None else {**locks, "cpu-torch-cpu.lock": write(f"cpu: torch {torch}, CPU build", [build])}


def resolve(
    torch: str, facts: dict, extra: list[str], optional: str = "", there: Sequence[Locked] = (), preferred: str = ""
) -> list[Locked]:
    """Return what uv locks for this torch, with an extra beside what is `there`, in the versions of a `preferred` lock where it can.

    Exits where a file for the target is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        overrides, constraints = Path(folder) / "overrides.txt", Path(folder) / "constraints.txt"
        constraints.write_text("".join(f"{item.name}=={item.version}\n" for item in there if item.name != "torch"))
        overrides.write_text("\n".join([f"torch=={torch}", *(f"{name} ; sys_platform == 'never'" for name in facts["drop"])]) + "\n")
        common = f"pip compile pyproject.toml --extra dev --override {overrides} --no-header --no-emit-index-url -q".split()
        common += [*TARGET, *extra, "--constraint", str(constraints), *(["--extra", optional] if optional else [])]
        lock = Path(folder) / "lock.txt"
        lock.write_text(preferred)
        text = uv([*common, "--generate-hashes", "--annotation-style", "line"], lock)
        constraints.write_text("".join(f"{item.name}=={item.version}\n" for item in parse(text) if item.name != "torch"))
        packages = tomllib.loads(uv([*common, "--format", "pylock.toml"], Path(folder) / "pylock.toml"))["packages"]
    sizes = {package["name"]: file_size(package, package["name"] in facts["sdists"]) for package in packages}
    absent = [name for name, size in sizes.items() if not size]
    if absent:
        sys.exit(f"no wheel for the target (or, in tool.coati-bench.lock.sdists, no source): {', '.join(absent)}; see pyproject.toml")
    return [item._replace(size=sizes[item.name]) for item in parse(text)]


def file_size(package: dict, from_source: bool) -> int:
    """Bytes of the file that would be installed on the target; 0 if there is none."""
    if from_source:
        return package.get("sdist", {}).get("size", 0)
    return max((wheel.get("size", 0) for wheel in package.get("wheels", []) if fits(file_name(wheel["url"]))), default=0)


def uv(arguments: list[str], output: Path) -> str:
    """Run uv with this output file and return what it wrote."""
    program = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if program is None:
        print("uv is missing; it makes the locks and is not needed to install: python -m pip install uv", file=sys.stderr)
        sys.exit(3)
    done = subprocess.run([program, *arguments, "-o", str(output)], cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        sys.exit(3)
    return output.read_text()


def fits(wheel: str) -> bool:
    """Whether a wheel is for CPython 3.11 on Linux x86_64 (or for anything)."""
    _, python, abi, platform = wheel.removesuffix(".whl").rsplit("-", 3)
    return any(tag == "any" or ("linux" in tag and "x86_64" in tag and "musl" not in tag) for tag in platform.split(".")) and (
        abi == "none" or abi == "cp311" or (abi == "abi3" and any(int(tag[3:]) <= 11 for tag in python.split(".") if tag.startswith("cp3")))
    )


def file_name(url: str) -> str:
    """Last part of an address."""
    return unquote(urlsplit(url).path).rsplit("/", 1)[-1]


def parse(text: str) -> list[Locked]:
    r"""Return the requirements of a hashed requirement file with line annotations.

    >>> parse("six==1.17.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n    # via coati-bench (pyproject.toml), torch\n")
    [Locked(name='six', version='1.17.0', hashes=('sha256:aa', 'sha256:bb'), via=('coati-bench', 'torch'), size=0)]
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
        askers = {name for name in found if not CUDA_BUILD.match(name)}
        more = {item.name for item in locked if item.name not in found and is_asked(item, names, askers)}
        if not more:
            return found
        found |= more


def is_asked(item: Locked, names: set[str], askers: set[str]) -> bool:
    """Whether the project, or one of `askers`, asks for `item`; torch's wish for its CUDA packages does not count."""
    askers = askers - {"torch"} if CUDA_BUILD.match(item.name) else askers
    return any(name not in names or name in askers for name in item.via)


def cpu_build(torch: str) -> Locked | None:
    """Return torch's CPU build that pip is configured to find, or that the last lock names."""
    wanted = f"{torch}+cpu"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        arguments = f"-m pip install -q --dry-run --no-deps --ignore-installed --report {report} torch=={wanted}".split()
        done = subprocess.run([sys.executable, *arguments], text=True, capture_output=True, check=False)
        if done.returncode == 0:
            info = json.loads(report.read_text())["install"][0]["download_info"]
            path = Path(unquote(urlsplit(info["url"]).path))
            if info["url"].startswith("file:"):
                value = hashlib.sha256(path.read_bytes()).hexdigest()
                return Locked("torch", wanted, (f"sha256:{value}",), ("coati-bench",), path.stat().st_size)
    last = ENVS / "cpu-torch-cpu.lock"
    kept = parse(last.read_text())[0]._replace(size=read_bytes(last)) if last.exists() else None
    return kept if kept and kept.version == wanted else None


def read_bytes(lock: Path) -> int:
    """The size in the head of a lock."""
    return int(re.search(r"^# bytes: (\d+)$", lock.read_text(), re.MULTILINE).group(1))


def write(what: str, items: list[Locked]) -> str:
    """Return the text of a lock."""
    lines = [f"# {what}", "# Made by envs/lock.py from pyproject.toml; do not edit. Size of the files for CPython 3.11 on Linux x86_64:"]
    lines.append(f"# bytes: {sum(item.size for item in items)}")
    for item in sorted(items):
        lines.append(f"{item.name}=={item.version} \\\n    " + " \\\n    ".join(f"--hash={value}" for value in item.hashes))
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
