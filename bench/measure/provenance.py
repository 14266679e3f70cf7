"""Where a number comes from: versions, source, machines, devices and environment. Torch-free."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import runpy
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from bench.measure.machine_file import known_ceilings
from bench.measure.node import boot_id, device_numa_node, fabric, network, numa, operating_system, processors
from bench.measure.nvml import describe_devices, describe_links

SOURCE_TREE = Path(__file__).resolve().parents[2]

IMAGE_VARIABLE = "COATI_BENCH_IMAGE"
"""What a launch says inside an image: RUNTIME:FILE. podman and docker say nothing of it themselves."""

IMAGE_HOME = Path("/opt/coati-bench")
"""Where an image keeps this package, and beside it what it was made from."""
ENVIRONMENT_FILE = "environment.digest"
"""There: the digest of the environment that the image was built on."""

PACKAGES = (
    "torch", "transformers", "peft", "colossalai", "accelerate", "tokenizers", "safetensors", "numpy", "triton", "flash-attn", "pydantic",
    "snakemake", "deepspeed", "lightning-fabric", "bitsandbytes",
)  # fmt: skip

RECORDED = re.compile(
    r"(OMP|MKL|KMP|OPENBLAS|NCCL|GLOO|CUBLAS|CUDNN|PYTORCH|NVSHMEM|TORCH_NCCL|TORCH_CUDA|TORCH_SYMM_MEM)_[A-Z0-9_]+"
    r"|CUDA_(VISIBLE_DEVICES|DEVICE_ORDER|LAUNCH_BLOCKING|MODULE_LOADING)"
    r"|NVIDIA_(VISIBLE_DEVICES|TF32_OVERRIDE)|TF_CPP_MIN_LOG_LEVEL|TORCH_SHOW_CPP_STACKTRACES|TORCH_DISTRIBUTED_DEBUG|TOKENIZERS_PARALLELISM"
    r"|HF_HUB_OFFLINE|HF_DATASETS_OFFLINE|TRANSFORMERS_OFFLINE|PYTHONHASHSEED|TP_SOCKET_IFNAME"
    r"|SLURM_(JOB_ID|JOB_NAME|JOB_NODELIST|JOB_NUM_NODES|JOB_PARTITION|CPUS_PER_TASK|MEM_PER_NODE|GPUS_ON_NODE|CLUSTER_NAME|RESTART_COUNT)"
)
"""Environment variables that change what is measured, or say where; nothing else of the environment enters a record."""

_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY")


def is_recorded(variable: str) -> bool:
    """Whether this environment variable is in the allow-list.

    >>> is_recorded("NCCL_DEBUG"), is_recorded("AWS_SECRET_ACCESS_KEY"), is_recorded("NCCL_AUTH_TOKEN")
    (True, False, False)
    """
    return RECORDED.fullmatch(variable) is not None and not _SECRET.search(variable.replace("TOKENIZERS", ""))


def environment(variables: dict[str, str]) -> dict[str, str]:
    """The part of `variables` that is recorded, in order."""
    return {key: value for key, value in sorted(variables.items()) if is_recorded(key)}


def utc_now() -> str:
    """The time, ISO 8601, UTC, whole milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@cache
def versions() -> dict[str, str | None]:
    """Version of Python, of each package that matters (null: not installed), and of CUDA, NCCL and cuDNN as torch was built with."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {name: _version(name) for name in PACKAGES}
    found |= {"cuda": _cuda_of_torch(), "nccl": _nvidia_package("nccl"), "cudnn": _nvidia_package("cudnn")}
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_of_torch() -> str | None:
    """The CUDA version in torch/version.py, read without importing torch (seconds)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(spec.submodule_search_locations[0]) / "version.py"
    return runpy.run_path(str(file)).get("cuda") if file.exists() else None


def _nvidia_package(library: str) -> str | None:
    names = [f"nvidia-{library}-cu{major}" for major in (13, 12, 11)]
    return next((version for name in names if (version := _version(name))), None)


@cache
def source() -> dict[str, Any]:
    """What code ran: commit, sha256 of the uncommitted changes (null: none), and sha256 over every file of the package.

    Without git, or outside a checkout, `commit` is null and `package_sha256` still tells versions apart. Read once a process.
    """
    commit = _git("rev-parse", "HEAD")
    diff = _git("diff", "HEAD", "--", "bench") if commit else None
    return {
        "commit": commit.strip() if commit else None,
        "dirty_diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
        "package_sha256": _package_sha256(),
        "locks": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((SOURCE_TREE / "envs").glob("*.lock"))},
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(SOURCE_TREE), *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _package_sha256() -> str:
    total = hashlib.sha256()
    for path in sorted((SOURCE_TREE / "bench").rglob("*.py")):
        total.update(f"{path.relative_to(SOURCE_TREE)}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()


@cache
def code_identity() -> dict[str, str | None]:
    """What tells this node's code from another's: sha256 over the package, the image's name (its digest is part of it) and its locks."""
    return {"package_sha256": _package_sha256(), "container": _container(), "container_locks_sha256": _container_locks()}


@cache
def machine() -> dict[str, Any]:
    """What this node is: system, CPU, NUMA, memory, network, container, devices and how they are linked, and what was measured of it.

    Call it on every node.
    """
    devices, nodes = describe_devices(), numa()
    return {
        "hostname": platform.node(),
        "operating_system": operating_system(),
        "kernel": platform.release(),
        "boot_id": boot_id(),
        "architecture": platform.machine(),
        **processors(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "numa_nodes": len(nodes) or None,
        "numa": nodes,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "container": _container(),
        "container_runtime": container_runtime(),
        "container_locks_sha256": _container_locks(),
        "container_environment": _container_environment(),
        "network": network(),
        "fabric": fabric(),
        "devices": [{**device, "numa_node": device_numa_node(device["pci_bus"])} for device in devices],
        "links": describe_links(),
        "ceilings": known_ceilings(devices),
    }


def _container() -> str | None:
    """Name of the image that this process runs in (its digest is part of the name), or null.

    By Apptainer itself, which says so inside; under podman and docker by the launch, which starts the image by its digest.
    """
    said = os.environ.get(IMAGE_VARIABLE, "").partition(":")[2]
    image = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER") or said
    return Path(image).name if image else container_runtime()


def container_runtime() -> str | None:
    """What runs the image that this process runs in, or null."""
    if os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER"):
        return "apptainer"
    if said := os.environ.get(IMAGE_VARIABLE, "").partition(":")[0]:
        return said
    return next((name for path, name in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman")) if Path(path).exists()), None)


def _container_locks() -> str | None:
    """sha256 over the locks that this process's image was made from, as they lie inside, or null."""
    try:
        return locks_sha256(IMAGE_HOME)
    except OSError:
        return None


def locks_sha256(home: Path) -> str:
    """sha256 over the requirement files that an image was made from, in its folder `home`. Raises OSError where they are missing."""
    return hashlib.sha256(b"".join((home / "locks" / name).read_bytes() for name in ("wheels.txt", "sources.txt"))).hexdigest()


def _container_environment() -> str | None:
    """Digest of the environment that this process's image was built on, as it lies inside, or null: images of older builds do not say."""
    try:
        return (IMAGE_HOME / ENVIRONMENT_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def image_flags(provenance: Mapping[str, Any]) -> list[str]:
    """What a reader must know of the image of a trial: another environment than the committed one, or than the one that was launched."""
    image = provenance.get("image")
    if not image:
        return []
    found = [] if image.get("environment_committed", True) else ["environment not the committed one"]
    seen = [(node["node"], node.get("container_environment")) for node in provenance.get("machines") or []]
    launched = image.get("environment_digest")
    others = [f"node {node} saw {short_digest(digest)}" for node, digest in seen if digest not in (None, launched)]
    return found + ([f"environment not the one launched, {short_digest(launched)}: {', '.join(others)}"] if launched and others else [])


def short_digest(digest: str) -> str:
    """The part of a digest that names files and folders.

    >>> short_digest("sha256:0123456789abcdef")
    '0123456789ab'
    """
    return digest.removeprefix("sha256:")[:12]
