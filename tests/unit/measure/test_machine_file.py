"""What was measured of a machine is kept, and every later record of it carries it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import doctor
from bench.errors import MachineError
from bench.layout import CACHE_VARIABLE
from bench.measure import nvml, provenance
from bench.measure.machine_file import ceilings_file, cpu_key, known_ceilings, remember_ceilings
from bench.report.ceilings import read_ceilings
from tests.fake_nvml import FakeNvml

H100 = {"device": "NVIDIA H100 80GB HBM3", "matrix_flops_per_second": {"bf16": 7.5e14}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "cache"


def test_ceilings_are_found_again_by_the_device_s_uuid():
    remember_ceilings(H100, "GPU-1")
    assert known_ceilings([{"uuid": "GPU-0"}]) is None
    found = known_ceilings([{"uuid": "GPU-0"}, {"uuid": "GPU-1"}])
    assert found == {"schema": "coati-bench/ceilings/1", **H100}


def test_visible_devices_come_first(monkeypatch: pytest.MonkeyPatch):
    for number in (0, 1):
        remember_ceilings({**H100, "number": number}, f"GPU-{number}")
    devices = [{"uuid": "GPU-0"}, {"uuid": "GPU-1"}]
    assert known_ceilings(devices)["number"] == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    assert known_ceilings(devices)["number"] == 1


def test_without_devices_they_are_the_cpu_s_and_a_broken_file_is_none():
    assert known_ceilings([]) is None
    remember_ceilings({"device": "cpu"}, cpu_key())
    assert known_ceilings([])["device"] == "cpu"
    for content in ("{", "[]", '{"schema": "other"}'):
        ceilings_file(cpu_key()).write_text(content)
        assert known_ceilings([]) is None


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`doctor --bench` of two ranks on the CPU; its cache and its output."""
    folder = tmp_path_factory.mktemp("measured")
    line = [sys.executable, "-m", "bench", "doctor", "--bench", "--ranks", "2", "--output", str(folder / "out.json")]
    environment = {**provenance_environment(), CACHE_VARIABLE: str(folder / "cache")}
    done = subprocess.run(line, check=True, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.startswith("Ceilings of cpu")
    assert "all-reduce over 2 ranks" in done.stdout
    return folder


def provenance_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(provenance.SOURCE_TREE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_doctor_measures_all_ranks_and_takes_the_slowest(measured: Path):
    found = json.loads((measured / "out.json").read_text())
    assert len(found["per_rank"]) == 2
    for dtype, rate in found["matrix_flops_per_second"].items():
        assert rate == min(one["matrix_flops_per_second"][dtype] for one in found["per_rank"])
    assert found["copy_bytes_per_second"] == min(one["copy_bytes_per_second"] for one in found["per_rank"])
    assert found["all_reduce"]["ranks"] == 2
    assert found["measured"].endswith("Z")


def test_the_report_reads_what_doctor_wrote(measured: Path):
    assert read_ceilings([measured / "out.json"])["cpu"].keys() == {"fp32", "bf16"}


def test_a_machine_is_described_with_what_was_measured_of_it(measured: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(measured / "cache"))
    monkeypatch.setattr(provenance, "describe_devices", list)
    provenance.machine.cache_clear()
    ceilings = provenance.machine()["ceilings"]
    provenance.machine.cache_clear()
    assert ceilings["all_reduce"]["ranks"] == 2
    assert ceilings["matrix_flops_per_second"]["fp32"] > 0


def test_a_device_in_use_is_not_measured(monkeypatch: pytest.MonkeyPatch):
    driver = FakeNvml()
    driver.pids = [17]
    monkeypatch.setattr(nvml, "load_nvml", lambda: (driver, None))
    with pytest.raises(MachineError, match="in use by process 17; what it attains now says little; idle devices would be right"):
        doctor.run_bench()


def test_a_measurement_that_fails_is_told_with_its_last_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no\n"))
    with pytest.raises(MachineError, match="exit code 1: RuntimeError: no; `coati-bench doctor` says what is there"):
        doctor.run_bench(ranks=1)
