"""Images by an ordinary user: the build from nothing, under subordinate ids, and what is said where it cannot be."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.container.images import committed, image_named
from bench.container.site import BUILD_PROGRAMS, namespaces_problem, rootless_problems
from bench.container.wheelhouse import image_wheelhouse
from bench.layout import cache_folder

TREE = Path(__file__).parents[2]
PYTHON = Path("/usr/bin/python3")
"""The system's, since this environment's may lie where only root may go."""


class Ordinary:
    """A user with a home folder, a checkout of this project and a cache in it."""

    def __init__(self, name: str) -> None:
        self.name, self.home = name, Path(pwd.getpwnam(name).pw_dir)
        self.checkout, self.cache = self.home / "checkout", self.home / "cache"
        shutil.copytree(TREE, self.checkout, ignore=shutil.ignore_patterns(".*", "results", "__pycache__", "*.egg-info"))
        self.own(self.home)

    def own(self, path: Path) -> None:
        subprocess.run(["chown", "-R", f"{self.name}:", str(path)], check=True)

    def line(self, *words: str, within: tuple[str, ...] = ()) -> list[str]:
        """`coati-bench` as that user, with that user's environment and nothing of this one's."""
        path = f"{self.checkout}:{sysconfig.get_path('purelib')}"
        variables = {"HOME": self.home, "USER": self.name, "LANG": "C.UTF-8", "PYTHONPATH": path, "COATI_BENCH_CACHE": self.cache,
                     "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}  # fmt: skip
        user = ["setpriv", "--reuid", self.name, "--regid", self.name, "--init-groups", "env", "-i", "-C", str(self.home)]
        return [*user, *(f"{key}={value}" for key, value in variables.items()), *within, str(PYTHON), "-m", "bench", *words]

    def run(self, *words: str, within: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.line(*words, within=within), capture_output=True, text=True, check=False, timeout=2400)


@pytest.fixture(scope="module")
def user() -> Iterator[Ordinary]:
    """Made for these tests and removed after them."""
    if problem := lacking():
        pytest.skip(f"no ordinary user can build an image here: {problem}")
    name = f"coati{uuid.uuid4().hex[:8]}"
    subprocess.run(["useradd", "--create-home", "--base-dir", "/var/tmp", name], check=True)
    try:
        subprocess.run(["usermod", "--add-subuids", "900000000-900065535", "--add-subgids", "900000000-900065535", name], check=True)
        yield Ordinary(name)
    finally:
        subprocess.run(["userdel", "--remove", name], check=False, capture_output=True)


def lacking() -> str:
    """Why there can be no such user, or nothing."""
    if os.geteuid() != 0:
        return "root makes the user; seen: uid " + str(os.geteuid())
    missing = [name for name in (*BUILD_PROGRAMS, "useradd", "setpriv", "unshare") if shutil.which(name) is None]
    problems = [*missing, *rootless_problems()]
    version = subprocess.run([PYTHON, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True, check=False).stdout
    if version.strip() != str(sys.version_info[:2]):
        problems.append(f"{PYTHON} of this environment's version")
    return "; ".join(problems)


def test_without_user_namespaces_the_build_says_what_would_be_right(user):
    script = 'echo 0 >/proc/sys/user/max_user_namespaces && exec setpriv --inh-caps=-all --ambient-caps=-all "$@"'
    # inside a namespace the sysctl is that namespace's own: it forbids further ones, and nothing else on this machine
    done = user.run(
        "container", "build", "cpu", within=("unshare", "--user", "--map-current-user", "--keep-caps", "sh", "-c", script, "sh")
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "missing: user namespaces; seen: sysctl user.max_user_namespaces=0" in done.stderr
    assert "coati-bench container verify FILE" in done.stderr
    assert not list(user.cache.rglob("*.sqfs"))
    assert namespaces_problem() is None


def test_an_ordinary_user_builds_the_committed_image(user):
    house = image_wheelhouse(image_named("cpu"), cache_folder() / "images" / "wheelhouse")
    shutil.copytree(house, user.cache / "images" / "wheelhouse" / house.name)
    user.own(user.cache)
    done = user.run("container", "build", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    (note,) = (path for path in (user.cache / "images").glob("coati-bench-cpu-*.json"))
    built, wanted = json.loads(note.read_text()), committed("cpu")
    assert built["inputs"] == wanted["inputs"]
    assert built["environment_digest"] == wanted["digest"], done.stdout
    assert Path(built["squashfs"]).owner() == user.name
    listed = subprocess.run(["unsquashfs", "-lls", "-d", "", built["squashfs"]], capture_output=True, text=True, check=True).stdout
    assert " /opt/venv/bin/python" in listed
    assert not [line for line in listed.splitlines() if line[:1] in "bc"]
