"""Facts of one node from the files of Linux's sysfs and procfs: processors, NUMA, network, scheduler. Torch-free.

Every function takes the root of the file system, so that tests can lay out another machine; what is not there is null or left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path("/")

_SCHEDULERS = {
    "slurm": ("SLURM_JOB_ID", {"array_task": "SLURM_ARRAY_TASK_ID", "step": "SLURM_STEP_ID", "partition": "SLURM_JOB_PARTITION",
                               "nodes": "SLURM_JOB_NODELIST", "cluster": "SLURM_CLUSTER_NAME",
                               "restarts": "SLURM_RESTART_COUNT"}),
    "pbs": ("PBS_JOBID", {"array_task": "PBS_ARRAY_INDEX", "partition": "PBS_QUEUE"}),
    "lsf": ("LSB_JOBID", {"array_task": "LSB_JOBINDEX", "partition": "LSB_QUEUE", "nodes": "LSB_HOSTS"}),
    "flux": ("FLUX_JOB_ID", {}),
    "oar": ("OAR_JOB_ID", {}),
}  # fmt: skip
"""Scheduler -> the variable with its job's id, and what else of the job is kept."""


def scheduler_job(variables: Mapping[str, str]) -> dict[str, str] | None:
    """Which scheduler's job this is, by the environment; None outside of one.

    >>> scheduler_job({"SLURM_JOB_ID": "77", "SLURM_JOB_PARTITION": "gpu"})
    {'scheduler': 'slurm', 'job': '77', 'partition': 'gpu'}
    """
    for name, (identity, more) in _SCHEDULERS.items():
        if identity in variables:
            return {
                "scheduler": name,
                "job": variables[identity],
                **{key: variables[variable] for key, variable in more.items() if variable in variables},
            }
    return None


def processors(root: Path = ROOT) -> dict[str, Any]:
    """Model, sockets, governor and highest clock of the CPU, and the cores that the control group allows."""
    text = _read(root / "proc/cpuinfo") or ""
    models = re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    frequency = root / "sys/devices/system/cpu/cpu0/cpufreq"
    kilohertz = _number(frequency / "cpuinfo_max_freq")
    return {
        "cpu": models[0].strip() if models else None,
        "sockets": len(set(re.findall(r"^physical id\s*:\s*(\d+)$", text, re.MULTILINE))) or None,
        "cpu_governor": _read(frequency / "scaling_governor"),
        "cpu_highest_megahertz": None if kilohertz is None else kilohertz // 1000,
        "cpu_quota_cores": _quota(_read(root / "sys/fs/cgroup/cpu.max")),
    }


def numa(root: Path = ROOT) -> list[dict[str, Any]]:
    """NUMA nodes: number, processors (as the kernel lists them), memory in bytes."""
    found = []
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        size = re.search(r"MemTotal:\s*(\d+) kB", _read(folder / "meminfo") or "")
        memory = None if size is None else int(size[1]) * 1024
        found.append({"node": int(folder.name.removeprefix("node")), "cpus": _read(folder / "cpulist"), "memory_bytes": memory})
    return sorted(found, key=lambda item: item["node"])


def network(root: Path = ROOT) -> list[dict[str, Any]]:
    """Network interfaces: name, state, speed, driver, MTU, NUMA node; without the loopback and virtual ones (no driver) that are down."""
    found = []
    for folder in sorted((root / "sys/class/net").glob("*")):
        driver, state = _target(folder / "device/driver"), _read(folder / "operstate")
        if folder.name == "lo" or not folder.is_dir() or (driver is None and state == "down"):
            continue
        speed = _number(folder / "speed")
        found.append(
            {"name": folder.name, "state": state, "megabits_per_second": speed if speed and speed > 0 else None,
             "driver": driver, "mtu": _number(folder / "mtu"), "numa_node": _numa_node(folder / "device")}
        )  # fmt: skip
    return found


def fabric(root: Path = ROOT) -> list[dict[str, Any]]:
    """Ports of RDMA adapters (InfiniBand, RoCE): adapter, port, link layer, state, rate, adapter's type, firmware, NUMA node."""
    found = []
    for port in sorted((root / "sys/class/infiniband").glob("*/ports/*")):
        adapter = port.parent.parent
        found.append(
            {"adapter": adapter.name, "port": int(port.name), "link_layer": _read(port / "link_layer"), "state": _read(port / "state"),
             "rate": _read(port / "rate"), "type": _read(adapter / "hca_type"), "firmware": _read(adapter / "fw_ver"),
             "numa_node": _numa_node(adapter / "device")}
        )  # fmt: skip
    return found


def device_numa_node(pci_bus: str | None, root: Path = ROOT) -> int | None:
    """NUMA node of the PCI device at `pci_bus` as NVML writes it (eight digits of domain; sysfs has four)."""
    return None if pci_bus is None else _numa_node(root / "sys/bus/pci/devices" / pci_bus.lower()[-12:])


def boot_id(root: Path = ROOT) -> str | None:
    """Which start of which kernel this is (proc(5), random/boot_id): hosts that share it are parts of one machine."""
    return _read(root / "proc/sys/kernel/random/boot_id")


def operating_system(root: Path = ROOT) -> str | None:
    """Name and version of the distribution."""
    found = re.search(r'^PRETTY_NAME="?([^"\n]+)', _read(root / "etc/os-release") or "", re.MULTILINE)
    return found[1] if found else None


def _numa_node(device: Path) -> int | None:
    """The kernel writes -1 where there is no affinity."""
    number = _number(device / "numa_node")
    return number if number is not None and number >= 0 else None


def _quota(text: str | None) -> float | None:
    quota, _, period = (text or "max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _target(link: Path) -> str | None:
    return link.resolve().name if link.exists() else None


def _number(path: Path) -> int | None:
    with suppress(ValueError, TypeError):
        return int(_read(path))  # type: ignore[arg-type]
    return None


def _read(path: Path) -> str | None:
    """Content of a small file; None where it is missing or the kernel refuses (the speed of a link that is down)."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
