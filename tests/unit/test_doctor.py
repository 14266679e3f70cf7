"""The doctor: what is missing is named with what would be right, and so are build locks."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench.doctor import GIB, abilities, run_doctor
from bench.measure import host as host_module
from bench.measure.build_locks import BuildLock
from bench.measure.host import PROGRAMS, Host, look, nearest
from bench.measure.kernels import HYBRID_ADAM

DEVICE = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * GIB, "driver": "580.1"}
FULL = Host(
    versions={"python": "3.11.7", "torch": "2.11.0+cu130", "cuda": "13.0", "transformers": "4.51.3", "peft": "0.13.2",
              "colossalai": "0.5.0", "snakemake": "9.27.1",
              "deepspeed": "0.19.8", "lightning-fabric": "2.6.6"},
    cores=16, memory_bytes=128 * GIB, memory_available_bytes=120 * GIB, shared_memory_free_bytes=64 * GIB, disk_free_bytes=100 * GIB,
    devices=[DEVICE, DEVICE], no_devices=None, nvcc="13.0", kernels=[], build_locks=[],
    programs={name: f"/usr/bin/{name}" for name in PROGRAMS},
)  # fmt: skip


def missing(**changes: Any) -> dict[str, str]:
    """Ability -> what it needs, for a full machine with `changes`; abilities that need nothing are left out."""
    return {item.name: "; ".join(item.needs) for item in abilities(dataclasses.replace(FULL, **changes)) if not item.possible}


def test_a_full_machine_can_do_everything() -> None:
    assert missing() == {}


def test_without_a_device_only_the_cpu_is_left() -> None:
    needs = missing(devices=[], no_devices="NVML: Driver Not Loaded", versions={**FULL.versions, "torch": "2.13.0+cpu", "cuda": None})
    assert "quick start, on the CPU" not in needs
    assert needs["one CUDA device (the reference suites)"] == (
        "1 NVIDIA device with a driver; seen: NVML: Driver Not Loaded; "
        "a CUDA build of torch (python3 envs/install.py --family cuda); seen: torch 2.13.0+cpu"
    )


@pytest.mark.parametrize(
    ("changes", "ability", "need"),
    [
        ({"versions": {**FULL.versions, "colossalai": None}}, "quick start, on the CPU", "the package colossalai (make install)"),
        ({"memory_available_bytes": GIB}, "quick start, on the CPU", "4 GiB of free memory; seen: 1.0"),
        ({"disk_free_bytes": GIB // 2}, "quick start, on the CPU", "1 GiB of free disk; seen: 0.5"),
        ({"devices": [DEVICE]}, "several CUDA devices of this machine", "2 NVIDIA devices with a driver; seen: 1"),
        ({"shared_memory_free_bytes": 64 << 20}, "several CUDA devices of this machine", "seen: 0.06"),
        ({"devices": [{**DEVICE, "memory_bytes": 8 * GIB}] * 2}, "one CUDA device (the reference suites)", "a device of 24 GiB"),
        ({"nvcc": None}, "ColossalAI's own kernels", "nvcc of the CUDA toolkit that torch was built with"),
        ({"nvcc": "12.4"}, "ColossalAI's own kernels", "nvcc of CUDA 13.0, as torch was built with; seen: 12.4"),
        ({"programs": {**FULL.programs, "ninja": None}}, "ColossalAI's own kernels", "ninja on the PATH"),
        ({"versions": {**FULL.versions, "deepspeed": None}}, "strategies that are extras", "(make install-deepspeed)"),
        ({"programs": {**FULL.programs, "chromium": None}}, "tests of the report in a browser", "chromium"),
    ],
)
def test_what_is_missing_is_named(changes: dict[str, Any], ability: str, need: str) -> None:
    found = next(text for name, text in missing(**changes).items() if name.startswith(ability))
    assert need in found


def test_kernels_that_are_compiled_need_no_compiler() -> None:
    assert missing(nvcc=None, kernels=list(HYBRID_ADAM)) == {}


def test_the_text_names_build_locks_with_their_age(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    held = BuildLock(path=Path("/cache/x/lock"), inode=1, age_seconds=70.2, builder=17, stale=False)
    left = BuildLock(path=Path("/cache/y/lock"), inode=2, age_seconds=4000.0, builder=None, stale=True)
    monkeypatch.setattr("bench.doctor.look", lambda _: dataclasses.replace(FULL, build_locks=[held, left]))
    assert run_doctor() == 0
    text = capsys.readouterr().out
    assert "Note: build lock /cache/x/lock, 70 s old: process 17 is building" in text
    assert "Warning: build lock /cache/y/lock, 4000 s old: its build died" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "HybridAdam's (cpu_adam_x86, fused_optim_cuda) will be compiled at first use, about 2 minutes; nvcc 13.0"),
        ({"kernels": ["fused_optim_cuda"]}, "HybridAdam's (cpu_adam_x86) will be compiled"),
        ({"kernels": list(HYBRID_ADAM), "nvcc": None}, "HybridAdam's are built; nvcc none"),
        ({"nvcc": None}, "HybridAdam's (cpu_adam_x86, fused_optim_cuda) are not built, and cannot be here; nvcc none"),
        ({"devices": []}, "are not built, and cannot be here"),
    ],
)
def test_the_text_says_whether_hybridadams_kernels_are_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr("bench.doctor.look", lambda _: dataclasses.replace(FULL, **changes))
    run_doctor()
    assert said in capsys.readouterr().out


def test_the_exit_code_says_whether_the_quick_start_can_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("bench.doctor.look", lambda _: FULL)
    assert run_doctor() == 0
    assert "NVIDIA H100 80GB HBM3, 80 GiB, driver 580.1" in capsys.readouterr().out
    monkeypatch.setattr("bench.doctor.look", lambda _: dataclasses.replace(FULL, memory_available_bytes=0))
    assert run_doctor() == 3
    assert "no   quick start, on the CPU" in capsys.readouterr().out


def test_json_has_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_doctor(format="json") in (0, 3)
    content = json.loads(capsys.readouterr().out)
    assert content["host"]["versions"]["colossalai"] == "0.5.0"
    assert {"name", "needs", "possible"} == set(content["abilities"][0])


def test_a_look_at_this_machine_has_what_can_be_checked_otherwise(tmp_path: Path) -> None:
    seen = look(tmp_path / "not" / "there")
    assert seen.cores == len(os.sched_getaffinity(0))
    assert 0 < seen.memory_available_bytes <= seen.memory_bytes
    assert abs(seen.disk_free_bytes - os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize) < GIB
    assert nearest(tmp_path / "not" / "there") == tmp_path


def test_a_control_groups_limit_is_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{GIB}\n", encoding="ascii")
    monkeypatch.setattr(host_module, "_CGROUP_LIMITS", (str(tmp_path / "memory.max"),))
    assert look(tmp_path).memory_bytes == GIB
