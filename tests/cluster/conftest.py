"""A real Slurm for the tests of this folder, which run only when asked for: `make test-cluster`, `make test-cluster-long`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster_disk import SmallDisk, small_disk, unmount
from cluster_hosts import NoClusterError, check
from cluster_slurm import Slurm, install
from cluster_suite import Bench, wait_until

from bench.launch.queue import PLUGIN

ASKED = os.environ.get("COATI_BENCH_CLUSTER", "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what was not asked for, with the command that asks for it."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            wanted = "long" if item.path.stem.endswith("_long") else "short"
            if wanted != ASKED:
                target = "test-cluster-long" if wanted == "long" else "test-cluster"
                item.add_marker(pytest.mark.skip(reason=f"`make {target}` runs it, as root: network namespaces and a real Slurm"))


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A controller and three hosts. What keeps them from coming up is this machine's affair, so it skips the tests and is told."""
    if importlib.util.find_spec(PLUGIN) is None:
        pytest.skip("no cluster can be simulated here: no snakemake-executor-plugin-slurm; `make install-slurm` installs it")
    folder = Path(tempfile.mkdtemp(prefix="cbn-slurm-", dir="/tmp"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(unmount, folder)
        try:
            check()
            install()
            cluster = stack.enter_context(Slurm(folder))
        except NoClusterError as problem:
            pytest.skip(f"no cluster can be simulated here: {problem}")
        yield cluster


@pytest.fixture
def bench(slurm: Slurm, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """`coati-bench` on the login node; afterwards nothing of it may run on any host."""
    yield from _bench(slurm, tmp_path, tmp_path_factory)


@pytest.fixture
def disk(slurm: Slurm) -> Iterator[SmallDisk]:
    """A disk of 64 MiB that all hosts see."""
    with small_disk(slurm.disks.path, "small", megabytes=64) as made:
        yield made


@pytest.fixture
def bench_on_disk(slurm: Slurm, disk: SmallDisk, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """As `bench`, the results on the small disk."""
    yield from _bench(slurm, tmp_path, tmp_path_factory, disk.path)


def _bench(slurm: Slurm, folder: Path, temporary: pytest.TempPathFactory, results: Path | None = None) -> Iterator[Bench]:
    made = Bench(slurm, folder, cache=temporary.getbasetemp() / "cache", results=results)
    yield made
    if made.is_over():
        wait_until(lambda: not slurm.hosts.with_text("bench.worker", "bench.launch"), 20, made.said)
    made.leave()
    assert slurm.hosts.with_text("bench.worker", "bench.launch", "coati-bench") == []
