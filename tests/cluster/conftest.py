"""A real Slurm for the tests of this folder, which run only when asked for: `make test-cluster`, `make test-cluster-long`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster_hosts import missing
from cluster_slurm import Slurm, install
from cluster_suite import Bench

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
    """A controller and three hosts."""
    if problem := missing() or install():
        pytest.skip(f"no cluster can be simulated here: {problem}")
    folder = Path(tempfile.mkdtemp(prefix="cbn-slurm-", dir="/tmp"))
    try:
        with Slurm(folder) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def bench(slurm: Slurm, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """`coati-bench` on the login node; afterwards nothing of it may run on any host."""
    made = Bench(slurm, tmp_path, cache=tmp_path_factory.getbasetemp() / "cache")
    yield made
    made.leave()
    assert slurm.hosts.with_text("bench.worker", "bench.launch", "coati-bench") == []
