"""What this machine has, what that allows, and what would be needed for the rest. Torch-free.

Exit code 0 where at least the quick start can run, else 3.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.container.fit import fit_lines, fits, fits_to_json, image_line
from bench.container.site import ways
from bench.errors import MachineError
from bench.measure.ceilings import bench_text
from bench.measure.host import Host, look
from bench.measure.kernels import BUILD_MINUTES, not_built
from bench.measure.machine_file import ceilings_folder
from bench.measure.nvml import all_devices, visible
from bench.measure.provenance import SOURCE_TREE
from bench.record import write_json
from bench.strategies.base import all_strategies
from bench.strategies.requirement import Requirement

GIB = 1 << 30
QUICK_MEMORY, QUICK_DISK = 4 * GIB, 1 * GIB
"""What the quick start needs (seen: 1.6 GiB of memory at its peak, 60 MiB of results)."""
REFERENCE_MEMORY = 24 * GIB
"""Of one device, for a BLOOM-560m with a PPO of four models in 16-bit (theory: 13 GiB of states)."""
SHARED_MEMORY = 1 * GIB
"""NCCL's buffers for the ranks of one machine; containers often give 64 MiB."""
BENCH_SECONDS = 600.0
"""Longest measurement of ceilings (a GPU needs half a minute)."""
NEEDED = ("torch", "transformers", "peft", "colossalai", "snakemake")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ability:
    """Something that one may want to do here."""

    name: str
    needs: list[str]
    """What is missing, and where it would come from; empty where it can be done."""

    @property
    def possible(self) -> bool:
        """Whether nothing is missing."""
        return not self.needs


def run_doctor(*, format: str = "text", folder: Path = Path("results")) -> int:  # noqa: A002 (the option's name)
    """Print what this machine has and allows; 0, or 3 where not even the quick start can run."""
    host = look(folder)
    able = abilities(host)
    if format == "json":
        items = [{**asdict(item), "possible": item.possible} for item in able]
        content = {
            "host": asdict(host), "abilities": items, "images": fits_to_json(fits(host.devices)), "ways": [way._asdict() for way in ways()],
        }  # fmt: skip
        print(json.dumps(content, indent=1, default=str))
    else:
        print("\n".join([*_seen(host), "", *_allowed(able), "", *_images(host), "", *_ways(), *_warnings(host)]))
    return 0 if able[0].possible else 3


def run_bench(*, format: str = "text", output: Path | None = None, ranks: int | None = None) -> int:  # noqa: A002
    """Measure what the devices attain (`bench.measure.ceilings`), keep it for later records, print it.

    `ranks` processes measure together, one on each device; by default one for each CUDA device, else one on the CPU. `output`: write the
    JSON there too. Raises MachineError if a device is in use or the measurement fails.
    """
    devices = visible(all_devices())
    if problem := next(filter(None, (device.busy() for device in devices)), None):
        raise MachineError(f"{problem}; what it attains now says little; idle devices would be right")
    found = _measure(ranks or len(devices) or 1)
    if output is not None:
        write_json(found, output)
    kept = f"Kept in {ceilings_folder()}; later records of this machine carry it."
    print(json.dumps(found, indent=1) if format == "json" else f"{bench_text(found)}\n{kept}")
    return 0


def _measure(ranks: int) -> dict[str, Any]:
    """Ceilings, by processes of their own: torch is loaded there, and a device is left as it was found."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    line = [sys.executable, *launcher, "-m", "bench.measure.ceilings", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE_TREE), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=BENCH_SECONDS, check=False, env=environment)
    except subprocess.TimeoutExpired:
        raise MachineError(f"the ceilings were not measured within {BENCH_SECONDS:g} s by {ranks} processes; fewer ranks may do") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MachineError(f"the ceilings cannot be measured; exit code {done.returncode}: {last}; `coati-bench doctor` says what is there")
    return dict(json.loads(done.stdout))


def abilities(host: Host) -> list[Ability]:
    """What can be done on `host`; the quick start first."""
    return [
        Ability(name="quick start, on the CPU", needs=_base(host)),
        Ability(name="one CUDA device (the reference suites)", needs=[*_base(host), *_cuda(host, 1)]),
        Ability(name="several CUDA devices of this machine", needs=[*_base(host), *_cuda(host, 2), *_shared_memory(host)]),
        Ability(name="ColossalAI's own kernels on CUDA (gemini, optimizer hybrid)", needs=[*_cuda(host, 1), *_kernels(host)]),
        Ability(name=f"strategies that are extras ({', '.join(_of_extras())})", needs=_extras(host)),
        Ability(
            name="tests of the report in a browser", needs=[] if host.programs["chromium"] else ["chromium (Debian: apt install chromium)"]
        ),
    ]


def _base(host: Host) -> list[str]:
    needs = [f"the package {name} (make install)" for name in NEEDED if host.versions.get(name) is None]
    if host.memory_available_bytes < QUICK_MEMORY:
        needs.append(f"{QUICK_MEMORY / GIB:.0f} GiB of free memory; seen: {host.memory_available_bytes / GIB:.1f}")
    if host.disk_free_bytes < QUICK_DISK:
        needs.append(f"{QUICK_DISK / GIB:.0f} GiB of free disk; seen: {host.disk_free_bytes / GIB:.1f}")
    return needs


def _cuda(host: Host, devices: int) -> list[str]:
    needs = []
    if len(host.devices) < devices:
        seen = host.no_devices or f"{len(host.devices)}"
        needs.append(f"{devices} NVIDIA device{'s' * (devices > 1)} with a driver; seen: {seen}")
    elif (largest := max(device["memory_bytes"] or 0 for device in host.devices)) < REFERENCE_MEMORY:
        needs.append(f"a device of {REFERENCE_MEMORY / GIB:.0f} GiB for the reference suites; seen: {largest / GIB:.0f} GiB")
    if host.versions.get("torch") and host.versions.get("cuda") is None:
        needs.append(f"a CUDA build of torch (python3 envs/install.py --family cuda); seen: torch {host.versions['torch']}")
    return needs


def _shared_memory(host: Host) -> list[str]:
    if host.shared_memory_free_bytes >= SHARED_MEMORY:
        return []
    seen = host.shared_memory_free_bytes / GIB
    return [f"{SHARED_MEMORY / GIB:.0f} GiB free in /dev/shm (containers: --shm-size or --ipc=host); seen: {seen:.2f}"]


def _kernels(host: Host) -> list[str]:
    if not not_built(host.kernels):
        return []
    needs = []
    if host.nvcc is None:
        needs.append("nvcc of the CUDA toolkit that torch was built with (CUDA_HOME)")
    elif (cuda := host.versions.get("cuda")) and cuda.split(".")[0] != host.nvcc.split(".")[0]:
        needs.append(f"nvcc of CUDA {cuda}, as torch was built with; seen: {host.nvcc}")
    return needs + [f"{name} on the PATH" for name in ("c++ compiler", "ninja") if host.programs[name] is None]


def _of_extras() -> dict[str, Requirement]:
    """Strategy -> the optional package that it needs."""
    return {name: item for name, kind in sorted(all_strategies().items()) for item in kind.requires if item.extra}


def _extras(host: Host) -> list[str]:
    absent = dict.fromkeys(item for item in _of_extras().values() if not host.versions.get(item.package))
    return [f"{item.package} {item.at_least} or newer (make install-{item.extra})" for item in absent]


def _seen(host: Host) -> list[str]:
    names = ("python", "torch", "cuda", "transformers", "peft", "colossalai", "snakemake")
    devices = [f"{item['name']}, {(item['memory_bytes'] or 0) / GIB:.0f} GiB, driver {item['driver']}" for item in host.devices]
    free, total, shared = (size / GIB for size in (host.memory_available_bytes, host.memory_bytes, host.shared_memory_free_bytes))
    rows = {
        "software": ", ".join(f"{name} {host.versions.get(name) or 'none'}" for name in names),
        "processor": f"{host.cores} cores",
        "memory": f"{free:.1f} of {total:.1f} GiB free; /dev/shm {shared:.1f} GiB",
        "disk": f"{host.disk_free_bytes / GIB:.1f} GiB free for results",
        "CUDA devices": "; ".join(devices) or f"none ({host.no_devices or 'NVML counts 0'})",
        "kernels": _kernels_text(host),
        "programs": ", ".join(f"{name} {path or 'none'}" for name, path in host.programs.items()),
    }
    return ["This machine", *(f"  {name:<13} {text}" for name, text in rows.items())]


def _kernels_text(host: Host) -> str:
    """Whether HybridAdam's kernels are there, or what happens at its first use."""
    absent, nvcc = not_built(host.kernels), f"nvcc {host.nvcc or 'none'}"
    if not absent:
        return f"HybridAdam's are built; {nvcc}"
    if host.devices and not _kernels(host):
        return f"HybridAdam's ({', '.join(absent)}) will be compiled at first use, about {BUILD_MINUTES} minutes; {nvcc}"
    return f"HybridAdam's ({', '.join(absent)}) are not built, and cannot be here; {nvcc}"


def _allowed(able: list[Ability]) -> list[str]:
    lines = ["What can be done here"]
    for item in able:
        lines.append(f"  {'yes' if item.possible else 'no ':<4} {item.name}")
        lines += [f"         needs {need}" for need in item.needs]
    return lines


def _images(host: Host) -> list[str]:
    found = fits(host.devices)
    return [image_line(found), *(f"  {line}" for line in fit_lines(found))]


def _ways() -> list[str]:
    lines = ["Ways to images and trials in them (containers/README.md)"]
    for way in ways():
        lines.append(f"  {'no ' if way.needs else 'yes':<4} {way.name}{f' ({way.note})' if way.note else ''}")
        lines += [f"         needs {need}" for need in way.needs]
    return lines


def _warnings(host: Host) -> list[str]:
    return [f"{'Note' if lock.builder else 'Warning'}: {lock}" for lock in host.build_locks]
