"""The installer: it takes what fits, says what it does, and never installs what is not locked."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"envs_{name}", ROOT / "envs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def installer() -> ModuleType:
    return load("install")


def wheel(folder: Path, name: str, version: str) -> str:
    """Write a wheel with nothing in it and return its sha256."""
    import hashlib

    file = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(file.read_bytes()).hexdigest()


class Project:
    """A project with locks of its own, whose registry is a folder of wheels."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *, cpu_build: bool) -> None:
        self.root, self.wheels, self.venv = root, root / "wheels", root / "venv"
        self.wheels.mkdir()
        (root / "envs").mkdir()
        (root / "bench").mkdir()
        shutil.copy(ROOT / "envs" / "install.py", root / "envs")
        self.lock("cpu", {"tool": "1.0"})
        self.lock("cpu-torch-cuda", {"torch": "2.0", "triton": "3.0"})
        self.lock("cpu-torch-cpu", {"torch": "2.0+cpu"})
        self.lock("sdist", {})
        if not cpu_build:
            (self.wheels / "torch-2.0+cpu-py3-none-any.whl").unlink()
        (root / "bench" / "__init__.py").touch()
        self.write_project("1")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(self.wheels))
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")

    def write_project(self, version: str) -> None:
        (self.root / "pyproject.toml").write_text(
            f'[project]\nname = "coati-bench"\nversion = "{version}"\n[build-system]\nrequires = []\nbuild-backend = "backend"\n'
            f'backend-path = ["backend"]\n',
            encoding="utf-8",
        )
        backend = self.root / "backend"
        backend.mkdir(exist_ok=True)
        (backend / "backend.py").write_text(
            "import zipfile\n"
            "def build_editable(folder, config_settings=None, metadata_directory=None):\n"
            f"    name, info = 'coati_bench-{version}-py3-none-any.whl', 'coati_bench-{version}.dist-info'\n"
            "    with zipfile.ZipFile(f'{folder}/{name}', 'w') as archive:\n"
            f"        archive.writestr(f'{{info}}/METADATA', 'Metadata-Version: 2.1\\nName: coati-bench\\nVersion: {version}\\n')\n"
            "        archive.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n')\n"
            "        archive.writestr(f'{info}/entry_points.txt', '[console_scripts]\\ncoati-bench = bench:main\\n')\n"
            "        archive.writestr(f'{info}/RECORD', '')\n"
            "    return name\n",
            encoding="utf-8",
        )

    def lock(self, name: str, packages: dict[str, str], sha256: str | None = None) -> None:
        lines = ["# bytes: 1000000"]
        for package, version in packages.items():
            lines.append(f"{package}=={version} \\\n    --hash=sha256:{sha256 or wheel(self.wheels, package, version)}")
        (self.root / "envs" / f"{name}.lock").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def install(self, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(self.root / "envs" / "install.py"), "--family", "cpu", "--into", str(self.venv), *more]
        return subprocess.run(command, text=True, capture_output=True, check=False)

    def installed(self) -> dict[str, str]:
        command = [str(self.venv / "bin" / "python"), "-m", "pip", "list", "--format", "json"]
        listed = json.loads(subprocess.run(command, text=True, capture_output=True, check=True).stdout)
        return {item["name"]: item["version"] for item in listed if item["name"] not in ("pip", "setuptools", "coati-bench")}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Project:
    return Project(tmp_path, monkeypatch, cpu_build=getattr(request, "param", True))


def test_the_cpu_build_is_taken_where_pip_finds_it_and_a_second_install_does_nothing(project: Project) -> None:
    first = project.install()
    assert first.returncode == 0, first.stdout + first.stderr
    assert "family cpu, torch 2.0+cpu, 2 MB in wheels" in first.stdout
    assert project.installed() == {"tool": "1.0", "torch": "2.0+cpu"}
    second = project.install()
    assert second.stdout == "venv is up to date (cpu, torch 2.0+cpu); nothing to do\n"


@pytest.mark.parametrize("project", [False], indirect=True)
def test_without_a_cpu_build_the_cuda_build_is_announced_and_installed(project: Project) -> None:
    done = project.install()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No CPU build of torch is to be had here, only the CUDA build" in done.stdout
    assert project.installed() == {"tool": "1.0", "torch": "2.0", "triton": "3.0"}


def test_a_changed_lock_is_followed_and_leftovers_are_removed(project: Project) -> None:
    project.install()
    project.lock("cpu", {"instrument": "2.0"})
    done = project.install()
    assert "removing what the locks no longer have: tool" in done.stdout
    assert project.installed() == {"instrument": "2.0", "torch": "2.0+cpu"}


def test_an_extra_is_installed_when_asked_for_and_kept_by_later_installs(project: Project) -> None:
    project.lock("shovel", {"shovel": "3.0", "handle": "1.0"})
    assert project.install("--extra", "shovel").returncode == 0
    assert project.installed() == {"tool": "1.0", "torch": "2.0+cpu", "shovel": "3.0", "handle": "1.0"}
    assert project.install().stdout == "venv is up to date (cpu, torch 2.0+cpu, shovel); nothing to do\n"
    project.lock("shovel", {"shovel": "3.1"})
    project.install()
    assert project.installed() == {"tool": "1.0", "torch": "2.0+cpu", "shovel": "3.1"}


def test_an_extra_that_has_no_lock_is_a_wrong_call(project: Project) -> None:
    done = project.install("--extra", "spade")
    assert done.returncode == 2
    assert "spade" in done.stderr


def test_a_file_that_is_not_the_locked_one_is_refused(project: Project) -> None:
    project.lock("cpu", {"tool": "1.0"}, sha256="0" * 64)
    done = project.install()
    assert done.returncode == 3
    assert "coati-bench cannot be installed: a downloaded file is not the locked one" in done.stderr
    assert not (project.venv / "coati-bench-installed.json").exists()


def test_a_registry_that_does_not_answer_is_said_so(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    done = project.install()
    assert done.returncode == 3
    assert "the package registry does not answer" in done.stderr


def test_a_folder_that_is_no_virtual_environment_is_left_alone(project: Project) -> None:
    project.venv.mkdir()
    (project.venv / "thesis.txt").write_text("years of work", encoding="utf-8")
    done = project.install()
    assert done.returncode == 3
    assert "is there and is no virtual environment" in done.stderr
    assert (project.venv / "thesis.txt").read_text(encoding="utf-8") == "years of work"


def test_two_installs_at_once_do_not_mix(project: Project, installer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    project.install()
    project.lock("cpu", {"tool": "1.1"})
    with (project.venv / "install.lock").open("w") as lock:
        installer.take(lock, project.venv)
        done = project.install()
    assert done.returncode == 3
    assert f"another install is working on {project.venv}" in done.stderr


def test_an_old_python_is_told_which_one_would_do(installer: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(installer.sys, "version_info", (3, 9, 2))
    monkeypatch.setattr(installer.sys, "argv", ["install.py"])
    assert installer.main() == 3
    assert "Python is too old" in capsys.readouterr().err


def test_too_little_disk_is_said_before_anything_is_downloaded(installer: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(installer.CannotError, match=r"too little space .* free: [\d.]+ GB; needed: about 2500001.0 GB"):
        installer.check_space(tmp_path, 10**15)


def locks() -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "envs").glob("*.lock")}


def test_every_locked_requirement_is_exact_and_hashed_and_names_no_address() -> None:
    extras = {"deepspeed.lock", "fabric.lock", "slurm.lock", "sbom.lock"}
    assert set(locks()) == {"cpu.lock", "cpu-torch-cpu.lock", "cpu-torch-cuda.lock", "cuda.lock", "upstream.lock", "sdist.lock", *extras}
    for text in locks().values():
        requirements = load("lock").parse(text)
        assert requirements
        assert all(item.hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in item.hashes) for item in requirements)
        assert "://" not in text
        assert not re.search(r"^-", text, re.MULTILINE)


def test_the_family_upstream_installs_its_older_torch_and_no_other(project: Project) -> None:
    project.lock("upstream", {"torch": "1.5", "triton": "1.0"})
    done = project.install("--family", "upstream")
    assert done.returncode == 0, done.stderr
    assert "family upstream, torch 1.5" in done.stdout
    assert project.installed() == {"torch": "1.5", "triton": "1.0"}
    assert "up to date (upstream, torch 1.5)" in project.install("--family", "upstream").stdout


def test_one_family_alone_cannot_change_the_sources_that_all_share() -> None:
    lock, sources = load("lock"), (ROOT / "envs" / "sdist.lock").read_text(encoding="utf-8")
    lock.check_sources(sources)
    with pytest.raises(SystemExit, match=r"(?s)the sources would change for every family: .*without --family all locks are made anew"):
        lock.check_sources(sources.replace("0.5.0", "0.5.1"))


def test_an_extra_brings_nothing_that_a_family_has() -> None:
    versions = {name: load("lock").versions(text) for name, text in locks().items()}
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in load("install").extras():
        assert {re.match(r"[\w-]+", requirement)[0] for requirement in asked[name]} <= versions[f"{name}.lock"].keys()
        assert not versions[f"{name}.lock"].keys() & (
            versions["cpu.lock"].keys() | versions["cuda.lock"].keys() | versions["sdist.lock"].keys()
        )


def test_the_families_differ_in_torch_only() -> None:
    versions = {name: load("lock").versions(text) for name, text in locks().items()}
    cuda = load("lock").CUDA_BUILD
    common = {name: version for name, version in versions["cuda.lock"].items() if not cuda.match(name)}
    assert {name for name in common if common[name] != {**versions["cpu.lock"], **versions["cpu-torch-cuda.lock"]}.get(name)} <= {
        "torch",
        "setuptools",
    }
    assert versions["cpu-torch-cpu.lock"] == {"torch": versions["cpu-torch-cuda.lock"]["torch"] + "+cpu"}
    for name, version in {"transformers": "4.51.3", "peft": "0.13.2"}.items():
        assert versions["cpu.lock"][name] == versions["cuda.lock"][name] == version
    assert versions["sdist.lock"]["colossalai"] == "0.5.0"


def test_upstream_is_within_colossalais_own_limits_and_else_what_cuda_locks() -> None:
    versions = {name: load("lock").versions(text) for name, text in locks().items()}
    upstream = versions["upstream.lock"]
    limits = [Requirement(line) for line in importlib.metadata.requires("colossalai") or []]
    assert next(limit for limit in limits if limit.name == "torch").specifier.contains(upstream["torch"])
    assert all(limit.specifier.contains(upstream[limit.name]) for limit in limits if limit.name in upstream)
    assert upstream["nvidia-cuda-runtime-cu12"].startswith("12.4.")
    cuda = load("lock").CUDA_BUILD
    others = {name: version for name, version in versions["cuda.lock"].items() if not cuda.match(name)}
    assert {name for name, version in others.items() if upstream.get(name) != version} == {"torch", "sympy"}


def test_locked_packages_take_the_torch_of_upstream() -> None:
    """The lock overrides every package's wish for a torch; of those that are installed here, none wants a newer one."""
    upstream = load("lock").versions((ROOT / "envs" / "upstream.lock").read_text(encoding="utf-8"))
    for name in upstream:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            wishes = [Requirement(line) for line in importlib.metadata.requires(name) or []]
            for wish in wishes:
                if wish.name == "torch" and wish.marker is None:
                    assert wish.specifier.contains(upstream["torch"]), (name, str(wish))


def test_a_package_that_only_torchs_cuda_build_asks_for_is_told_apart() -> None:
    lock = load("lock")
    locked = [
        lock.Locked("torch", "2.0", (), ("coati-bench",)), lock.Locked("numpy", "2.0", (), ("torch",)),
        lock.Locked("triton", "3.0", (), ("torch",)), lock.Locked("cuda-toolkit", "13.0", (), ("torch",)),
        lock.Locked("nvidia-cublas", "13.0", (), ("cuda-toolkit",)), lock.Locked("nvidia-ml-py", "13.0", (), ("coati-bench",)),
        lock.Locked("importlib-metadata", "8.0", (), ("triton",)),
    ]  # fmt: skip
    assert lock.reachable(locked) == {"torch", "numpy", "nvidia-ml-py"}


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl", True),
        ("torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl", False),
        ("torch-2.13.0-cp311-none-macosx_11_0_arm64.whl", False),
        ("psutil-7.2.2-cp36-abi3-manylinux2010_x86_64.manylinux_2_12_x86_64.whl", True),
        ("numpy-2.4.6-cp311-cp311-musllinux_1_2_x86_64.whl", False),
        ("tqdm-4.70.1-py3-none-any.whl", True),
    ],
)
def test_sizes_count_the_file_for_the_target(name: str, fits: bool) -> None:
    assert load("lock").fits(name) is fits
