"""Make .venv from the hashed locks: `make install`. Standard library only; repeatable; no network but the package registry.

    python3 envs/install.py                    the family that fits this machine
    python3 envs/install.py --family cpu --into /somewhere/venv
    python3 envs/install.py --extra deepspeed  an optional extra as well; later installs keep it

Which files pip finds is pip's configuration. Where that has a CPU build of torch, it is taken (a fifth of the size); else
torch comes as the CUDA build of some gigabytes, which also runs on machines without a GPU. Exit code 3: this machine cannot.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes.util
import fcntl
import hashlib
import json
import os
import platform
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVS = ROOT / "envs"
UNPACKED, BESIDES = 2.5, 1_000_000_000
"""Disk needed: so many times the bytes of the wheels, and so many bytes besides (seen: 0.5 GB -> 2.1 GB, 3.1 GB -> 5.9 GB)."""
LOCKED = ["--require-hashes", "--no-deps", "--only-binary", ":all:"]
TICK_SECONDS = 15.0
FOUND = re.compile(r"^(?:Collecting|Requirement already satisfied|Obtaining|Processing) ", re.MULTILINE)
DOING = re.compile(r"^ *(?:Collecting|Downloading|Processing|Building|Installing) ")


class CannotError(Exception):
    """What this machine cannot do; the text says what is wrong, what was seen and what would be right."""


def main() -> int:
    """Install; 0 when all is there, 2 for a wrong call, 3 where this machine cannot, 130 when interrupted."""
    parser = argparse.ArgumentParser(description="Install coati-bench and what it needs into a virtual environment, from hashed locks.")
    parser.add_argument(
        "--family", choices=["auto", "cpu", "cuda", "upstream"], default="auto", help="auto: cuda where an NVIDIA driver is"
    )
    parser.add_argument("--into", type=Path, default=ROOT / ".venv", metavar="FOLDER", help="the virtual environment (default .venv)")
    parser.add_argument("--extra", action="append", default=[], choices=extras(), help="install this optional extra too; repeatable")
    options = parser.parse_args()
    try:
        check_machine()
        install(options.into.resolve(), family_here() if options.family == "auto" else options.family, options.extra)
    except CannotError as error:
        print(f"coati-bench cannot be installed: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def check_machine() -> None:
    """Raise CannotError unless this interpreter and system will do."""
    if sys.version_info < (3, 11):  # noqa: UP036 (this file is run by whatever Python is there)
        raise CannotError(
            f"Python is too old; seen: {platform.python_version()} at {sys.executable}; "
            "give another one, for example: make install PYTHON=python3.11"
        )
    if platform.system() != "Linux":
        raise CannotError(f"the packages are for Linux; seen: {platform.system()}")
    for module, package in (("venv", "python3-venv"), ("ensurepip", "python3-venv"), ("ssl", "a Python built with OpenSSL")):
        try:
            __import__(module)
        except ImportError:
            raise CannotError(
                f"Python's module {module} is missing at {sys.executable}; on Debian and Ubuntu: apt install {package}"
            ) from None
    if platform.machine() != "x86_64" or sys.version_info >= (3, 13):
        print(f"note: tested on x86_64 with Python 3.11 and 3.12, this is {platform.machine()} with {platform.python_version()}; going on")


def family_here() -> str:
    """`cuda` where the NVIDIA driver's library and a device node are, else `cpu`."""
    has_driver = ctypes.util.find_library("nvidia-ml") is not None or shutil.which("nvidia-smi") is not None
    return "cuda" if has_driver and Path("/dev/nvidiactl").exists() else "cpu"


def extras() -> list[str]:
    """The optional extras, by their locks."""
    families = ("cpu", "cuda", "sdist", "upstream")
    return sorted(path.stem for path in ENVS.glob("*.lock") if path.stem.split("-")[0] not in families)


def read_stamp(venv: Path) -> dict:
    """What the last install left in `venv`; empty where none ended well."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(stamp_path(venv).read_text())
    return {}


def install(venv: Path, family: str, extra: list[str]) -> None:
    """Bring `venv` to what the locks say, with the extras that it has and these; does nothing if it is there already."""
    stamp = read_stamp(venv)
    chosen = sorted({*extra, *(name for name in stamp.get("extras", []) if name in extras())})
    wanted = {
        "family": family, "python": platform.python_version(), "root": str(ROOT), "locks": hash_of_inputs(family, chosen), "extras": chosen,
    }  # fmt: skip
    if {key: stamp.get(key) for key in wanted} == wanted and (venv / "bin" / "coati-bench").exists():
        print(f"{shown(venv)} is up to date ({', '.join([family, 'torch ' + stamp['torch'], *chosen])}); nothing to do")
        return
    make_venv(venv)
    with (venv / "install.lock").open("w") as lock:
        take(lock, venv)
        locks, torch, size = choose(venv, family)
        check_space(venv, size)
        print(f"{shown(venv)}: family {family}, torch {torch}, {size / 1e6:,.0f} MB in wheels (less what pip has in its cache)", flush=True)
        started = time.monotonic()
        stamp_path(venv).unlink(missing_ok=True)
        requirements = [part for name in locks for part in ("-r", str(ENVS / name))]
        pip_install(venv, "packages", [*requirements, *LOCKED], count(locks))
        sources = ["-r", str(ENVS / "sdist.lock"), "--require-hashes", "--no-deps", "--no-build-isolation"]
        pip_install(venv, "packages that exist as source only", sources, count(["sdist.lock"]))
        for name in chosen:
            lock_file = ["-r", str(ENVS / f"{name}.lock"), "--require-hashes", "--no-deps", "--no-build-isolation"]
            pip_install(venv, f"extra {name}", lock_file, count([f"{name}.lock"]))
        pip_install(venv, "coati-bench itself", ["--no-deps", "--no-build-isolation", "-e", str(ROOT)], 1)
        remove_others(venv, [*locks, "sdist.lock", *(f"{name}.lock" for name in chosen)])
        stamp_path(venv).write_text(json.dumps({**wanted, "torch": torch}, indent=1) + "\n")
        print(f"installed in {time.monotonic() - started:.0f} s: {shown(venv / 'bin' / 'coati-bench')}")


def stamp_path(venv: Path) -> Path:
    """The file that says what was installed; written last."""
    return venv / "coati-bench-installed.json"


def hash_of_inputs(family: str, chosen: list[str]) -> str:
    """sha256 over everything that decides what is installed."""
    names = {"cpu": ["cpu.lock", "cpu-torch-cpu.lock", "cpu-torch-cuda.lock"], "cuda": ["cuda.lock"], "upstream": ["upstream.lock"]}[family]
    paths = [*(ENVS / name for name in [*names, "sdist.lock", *(f"{name}.lock" for name in chosen)]), ROOT / "pyproject.toml"]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths if path.exists())).hexdigest()


def make_venv(venv: Path) -> None:
    """Create `venv`, or make it anew if it is of another Python or broken."""
    python = venv / "bin" / "python"
    if python.exists():
        probe = [str(python), "-c", "import sys, pip; print('%d.%d.%d' % sys.version_info[:3])"]
        seen = subprocess.run(probe, text=True, capture_output=True, check=False).stdout.strip()
        if seen == platform.python_version():
            return
        print(f"{shown(venv)} is of Python {seen or '(broken)'}; making it anew with {platform.python_version()}")
    elif venv.exists() and any(venv.iterdir()):
        raise CannotError(f"{venv} is there and is no virtual environment; move it away, or give another folder by --into")
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], text=True, capture_output=True, check=False)
    if done.returncode:
        raise CannotError(f"{sys.executable} -m venv {venv} failed: {(done.stdout + done.stderr).strip()[-500:]}")


def take(lock: object, venv: Path) -> None:
    """Hold the install lock of `venv`, or raise CannotError if another install holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise CannotError(f"another install is working on {venv}; wait for it to end") from None


def choose(venv: Path, family: str) -> tuple[list[str], str, int]:
    """Return (locks, version of torch, bytes of wheels) for `family`, by what pip finds."""
    cpu = ["cpu.lock", "cpu-torch-cpu.lock" if finds_cpu_build(venv) else "cpu-torch-cuda.lock"] if family == "cpu" else []
    locks = cpu or [f"{family}.lock"]
    if "cpu-torch-cuda.lock" in locks:
        print(
            "No CPU build of torch is to be had here, only the CUDA build: it runs without a GPU too, but is large. "
            "Where pip finds the wheel of envs/cpu-torch-cpu.lock (PIP_FIND_LINKS=FOLDER), most of it is saved. Going on."
        )
    texts = [(ENVS / name).read_text() for name in locks]
    size = sum(int(re.search(r"^# bytes: (\d+)$", text, re.MULTILINE).group(1)) for text in texts)
    return locks, re.search(r"^torch==(\S+)", texts[-1], re.MULTILINE).group(1), size


def finds_cpu_build(venv: Path) -> bool:
    """Whether pip finds the CPU build of torch that is locked; CannotError if it reaches nothing."""
    lock = ENVS / "cpu-torch-cpu.lock"
    if not lock.exists():
        return False
    done = pip(venv, ["install", "--dry-run", "--ignore-installed", *LOCKED, "-r", str(lock)])
    if done.returncode:
        check_reached(done.stdout + done.stderr)
    return done.returncode == 0


def names_in(lock: Path) -> list[str]:
    """Names in a lock, in pip's spelling."""
    return re.findall(r"^([a-z0-9-]+)==", lock.read_text().replace("_", "-"), re.MULTILINE)


def count(locks: list[str]) -> int:
    """Number of packages in the locks."""
    return sum(len(names_in(ENVS / name)) for name in locks)


def check_space(venv: Path, size: int) -> None:
    """Raise CannotError unless the disk has room for the wheels and what they unpack to."""
    free, needed = shutil.disk_usage(venv).free, int(size * UNPACKED) + BESIDES
    if free < needed:
        raise CannotError(f"too little space at {venv}; free: {free / 1e9:.1f} GB; needed: about {needed / 1e9:.1f} GB")


def pip_environment() -> dict[str, str]:
    """The environment for pip: its configuration stays in force but for what would move the install or loosen the locks."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in {"PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_REQUIRE_VIRTUALENV", "PYTHONPATH"}
    }
    return {**environment, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_CONSTRAINT": os.devnull, "PIP_USER": "0"}


def pip(venv: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run pip and return what it said."""
    command = [str(venv / "bin" / "python"), "-m", "pip", *arguments]
    return subprocess.run(command, text=True, capture_output=True, check=False, env=pip_environment(), cwd=ROOT)


def pip_install(venv: Path, what: str, arguments: list[str], packages: int) -> None:
    """Run `pip install` with a line of progress now and then; its whole output goes to install.log in `venv`."""
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--progress-bar", "off", *arguments]
    log = venv / "install.log"
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=pip_environment(), cwd=ROOT)
        try:
            text = follow(process, what, packages, file)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.wait():
        check_reached(text)
        raise CannotError(f"pip failed on {what} (whole output: {log}):\n" + "\n".join(text.splitlines()[-15:]))


def follow(process: subprocess.Popen[bytes], what: str, packages: int, file: object) -> str:
    """Copy pip's output to `file`, say every TICK_SECONDS what it is at, and return the output."""
    text, seen, last = "", 0, "starting"
    started = said = time.monotonic()
    while True:
        ready, _, _ = select.select([process.stdout], [], [], 1.0)
        chunk = os.read(process.stdout.fileno(), 65536).decode(errors="replace") if ready else None
        if chunk == "":
            print(f"  {what}: done after {time.monotonic() - started:.0f} s", flush=True)
            return text
        if chunk:
            text += chunk
            file.write(chunk)
            file.flush()
            seen = len(FOUND.findall(text))
            last = ([line.strip() for line in text.splitlines() if DOING.match(line)] or [last])[-1]
        if time.monotonic() - said >= TICK_SECONDS:
            said = time.monotonic()
            print(f"  {what}: {min(seen, packages)} of {packages} found, {said - started:.0f} s: {last[:90]}", flush=True)


def check_reached(output: str) -> None:
    """Raise CannotError if pip's output says that the registry or the disk failed, with what would be right."""
    if "No space left on device" in output:
        raise CannotError("the disk is full; free some space and run the same command again")
    if re.search(
        r"Failed to establish a new connection|Temporary failure in name resolution|NewConnectionError|ConnectTimeout|ReadTimeout", output
    ) or ("from versions: none" in output and "Retrying" in output):
        raise CannotError(
            "the package registry does not answer; seen: " + " ".join(output.strip().splitlines()[-1:])[:300] + "; "
            "pip must reach a registry, a mirror or a folder of wheels (see `pip config list`)"
        )
    if "DO NOT MATCH THE HASHES" in output:
        raise CannotError(
            "a downloaded file is not the locked one (see the hashes above); clear pip's cache (`pip cache purge`) and try again\n"
            + output[-800:]
        )


def remove_others(venv: Path, locks: list[str]) -> None:
    """Uninstall what neither the locks nor the virtual environment itself brought: leftovers of an older lock."""
    listed = json.loads(pip(venv, ["list", "--format", "json"]).stdout)
    keep = {name for lock in locks for name in names_in(ENVS / lock)} | {"pip", "coati-bench", "uv"}
    others = [item["name"] for item in listed if re.sub(r"[-_.]+", "-", item["name"]).lower() not in keep]
    if others:
        print(f"  removing what the locks no longer have: {', '.join(others)}")
        pip(venv, ["uninstall", "-y", "-q", *others])


def shown(path: Path) -> str:
    """The path as one would type it from the project's folder."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    sys.exit(main())
