"""Images with the real podman, docker and Apptainer, and builds as an ordinary user: minutes, so only by `make test-container`."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.container.images import image_named
from bench.container.runtimes import RUNTIME_VARIABLE
from bench.container.site import problem_of

HERE = Path(__file__).parent
ASKED = os.environ.get("COATI_BENCH_CONTAINER") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip these tests where nobody asked for them, with the command that asks."""
    for item in items:
        if item.path.parent == HERE and not ASKED:
            item.add_marker(pytest.mark.skip(reason="`make test-container` runs it: real container runtimes, minutes"))


@pytest.fixture(scope="session")
def dockerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str | None]:
    """DOCKER_HOST of a daemon: the one that runs here, else one started for these tests, where root can; None for neither."""
    if shutil.which("docker") and subprocess.run(["docker", "version"], capture_output=True, check=False).returncode == 0:
        yield os.environ.get("DOCKER_HOST", "")
        return
    if not shutil.which("docker") or not shutil.which("dockerd") or os.geteuid() != 0:
        yield None
        return
    folder = tmp_path_factory.mktemp("dockerd")
    host = f"unix://{folder}/docker.sock"
    places = ["--data-root", str(folder / "data"), "--exec-root", str(folder / "exec"), "--pidfile", str(folder / "pid"), "-H", host]
    with (folder / "log").open("wb") as log:
        daemon = subprocess.Popen(["dockerd", "--iptables=false", "--bridge=none", *places], stdout=log, stderr=log, start_new_session=True)
    try:
        yield host if _answers(host, daemon) else None
    finally:
        daemon.terminate()
        daemon.wait(60)


def _answers(host: str, daemon: subprocess.Popen[bytes], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and daemon.poll() is None:
        if subprocess.run(["docker", "-H", host, "version"], capture_output=True, check=False).returncode == 0:
            return True
        time.sleep(0.2)
    return False


@pytest.fixture(params=["podman", "docker", "apptainer"])
def runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A real runtime that trials are to use."""
    kind: str = request.param
    if kind == "docker":
        host = request.getfixturevalue("dockerd")
        if host is None:
            pytest.skip("docker: no daemon runs here, and none can be started")
        monkeypatch.setenv("DOCKER_HOST", host) if host else None
    if problem := problem_of(kind):
        pytest.skip(f"{kind}: {problem}")
    monkeypatch.setenv(RUNTIME_VARIABLE, kind)
    return kind


@pytest.fixture(scope="session")
def image() -> Path:
    """The squashfs of the cpu image in the user's cache, built with its archive if it is not there."""
    from bench.container.build import build

    if missing := [name for name in ("mmdebstrap", "buildah", "mksquashfs", "unsquashfs") if shutil.which(name) is None]:
        pytest.skip(f"no image can be built: {', '.join(missing)} missing")
    return build(image_named("cpu"), archive=True, any_package=True).squashfs
