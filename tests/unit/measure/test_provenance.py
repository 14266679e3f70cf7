"""What a record says of where it comes from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from bench.measure import provenance
from bench.report.analysis import CellResult
from bench.report.inventory import Row
from bench.report.registry import Trial
from tests.unit.report.trial_factory import make_cell, make_record


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NCCL_SOCKET_IFNAME", True),
        ("OMP_NUM_THREADS", True),
        ("NCCL_NVLS_ENABLE", True),
        ("TORCH_SYMM_MEM_DISABLE_MULTICAST", True),
        ("NVSHMEM_DISABLE_NVLS", True),
        ("PYTORCH_CUDA_ALLOC_CONF", True),
        ("CUDA_VISIBLE_DEVICES", True),
        ("SLURM_JOB_ID", True),
        ("TOKENIZERS_PARALLELISM", True),
        ("SLURM_JWT", False),
        ("HF_TOKEN", False),
        ("AWS_SECRET_ACCESS_KEY", False),
        ("NCCL_PASSWORD", False),
        ("HOME", False),
        ("XNCCL_DEBUG", False),
    ],
)
def test_only_variables_that_change_a_measurement_are_recorded_and_never_secrets(name, expected):
    assert provenance.is_recorded(name) is expected
    assert provenance.environment({name: "x"}) == ({name: "x"} if expected else {})


def test_versions_are_those_installed_and_torch_is_not_imported_for_them():
    code = "import sys; from bench.measure import provenance as p; p.versions(); p.machine(); p.source(); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(provenance.SOURCE_TREE)},
    )
    assert done.stdout.strip() == "False"
    found = provenance.versions()
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["flash-attn"] is None


def test_this_machine_has_a_name_cores_and_memory():
    found = provenance.machine()
    assert found["hostname"]
    assert found["usable_cores"] == len(os.sched_getaffinity(0))
    assert found["memory_bytes"] > 1 << 28


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A checkout with one file of the package and one lock."""
    for name, text in (("bench/a.py", "1\n"), ("envs/cpu.lock", "x==1\n")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(provenance, "SOURCE_TREE", tmp_path)
    provenance.source.cache_clear()
    yield tmp_path
    provenance.source.cache_clear()


def test_a_clean_checkout_is_its_commit_and_a_changed_one_also_its_difference(tree):
    clean = provenance.source()
    assert re.fullmatch("[0-9a-f]{40}", clean["commit"])
    assert clean["dirty_diff_sha256"] is None
    assert clean["locks"] == {"cpu.lock": hashlib.sha256(b"x==1\n").hexdigest()}
    (tree / "bench" / "a.py").write_text("2\n")
    provenance.source.cache_clear()
    changed = provenance.source()
    assert changed["commit"] == clean["commit"]
    assert re.fullmatch("[0-9a-f]{64}", changed["dirty_diff_sha256"])
    assert changed["package_sha256"] != clean["package_sha256"]


def test_outside_a_checkout_the_package_is_known_by_its_files(tmp_path, monkeypatch):
    (tmp_path / "bench").mkdir()
    monkeypatch.setattr(provenance, "SOURCE_TREE", tmp_path)
    provenance.source.cache_clear()
    found = provenance.source()
    provenance.source.cache_clear()
    assert (found["commit"], found["dirty_diff_sha256"], found["locks"]) == (None, None, {})
    assert re.fullmatch("[0-9a-f]{64}", found["package_sha256"])


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """An image's own folder, as it is seen inside."""
    monkeypatch.setattr(provenance, "IMAGE_HOME", tmp_path)
    provenance.machine.cache_clear()
    yield tmp_path
    provenance.machine.cache_clear()


def test_an_image_says_inside_which_environment_it_was_built_on_and_an_older_one_does_not(inside):
    assert provenance.machine()["container_environment"] is None
    (inside / "environment.digest").write_text("sha256:0123\n")
    provenance.machine.cache_clear()
    assert provenance.machine()["container_environment"] == "sha256:0123"


def provenance_of(*seen, committed=True):
    image = {"environment_digest": "sha256:0123456789abcdef", "environment_committed": committed}
    return {"image": image, "machines": [{"node": node, "container_environment": digest} for node, digest in enumerate(seen)]}


def test_another_environment_than_the_committed_one_is_flagged():
    assert provenance.image_flags(provenance_of("sha256:0123456789abcdef")) == []
    assert provenance.image_flags(provenance_of(committed=False)) == ["environment not the committed one"]


def test_another_environment_inside_than_the_one_launched_is_flagged_with_its_nodes():
    found = provenance.image_flags(provenance_of("sha256:0123456789abcdef", "sha256:feedfeedfeedfeed", None))
    assert found == ["environment not the one launched, 0123456789ab: node 1 saw feedfeedfeed"]


@pytest.mark.parametrize("older", [{}, {"image": None}, {"image": {"digest": "sha256:0123"}, "machines": [{"node": 0}]}])
def test_records_without_an_image_or_of_older_images_are_not_flagged(older):
    assert provenance.image_flags(older) == []


def test_the_report_shows_what_an_images_provenance_flags():
    """The record has these flags from its assembly (test_assemble.py)."""
    record = replace(make_record(make_cell()), flags=["indicative", *provenance.image_flags(provenance_of(committed=False))])
    result = CellResult(record.parsed_cell, (Trial(Row(record, record.parsed_cell, "0.json")),), (), (), ())
    assert result.flags == ("indicative", "environment not the committed one")


def test_time_is_utc_and_sorts_as_text():
    first, second = provenance.utc_now(), provenance.utc_now()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first)
    assert first <= second
