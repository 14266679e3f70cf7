"""What this machine attains at best, measured: matrix products, copies, host links, all-reduce. Torch is imported inside.

Data sheets state what no program reaches; these are what a plain torch call reaches here, today, at this power limit. Rules:

* Fresh random operands (normal), never zeros: a device that multiplies zeros draws less power, clocks higher and flatters itself.
* Every repeat is timed by itself, by device events on a GPU and the monotonic clock on a CPU; reported: the median, and the spread.
* Copies count bytes read and written; links count bytes moved, from and to pinned host memory.
* All-reduce: bus bandwidth = bytes / seconds x 2 (n - 1) / n for n ranks, which any algorithm is bound by (nccl-tests, doc/PERFORMANCE.md).

By hand, over the devices of one node: `torchrun --standalone --nproc-per-node N -m bench.measure.ceilings`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from bench.measure.devices import DeviceRow, device_row
from bench.measure.machine_file import cpu_key, remember_ceilings
from bench.measure.provenance import utc_now

if TYPE_CHECKING:
    import torch

MATRIX_SIZE = {"cuda": 8192, "cpu": 512}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}
LINK_BYTES = 256 << 20
REDUCE_BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}
REPEATS = {"cuda": 20, "cpu": 5}
WARM_UPS = {"cuda": 30, "cpu": 2}
"""Enough for a GPU to leave its idle clocks; a number, not a time, so that ranks agree on it."""
DTYPES = {"cuda": ("fp32", "tf32", "bf16", "fp16"), "cpu": ("fp32", "bf16")}
"""Types that a precision mode multiplies in; fp16 is for GPUs, tf32 is of their tensor cores."""
OPERAND_SETS = 3
"""Repeats take turns on so many sets of operands."""


def measure_ceilings(device: torch.device | str) -> dict[str, Any]:
    """All ceilings of `device` as JSON; collective if a process group exists, whose ranks then each measure their device.

    Keys: device (its name), matrix_flops_per_second {dtype: rate}, copy_bytes_per_second, host_to_device_bytes_per_second,
    device_to_host_bytes_per_second, all_reduce {ranks, bus_bytes_per_second, latency_seconds}, spread {what: (slowest - fastest) /
    median}, sizes, notes {what: why it is null}. What cannot be measured is null with a note, never 0.
    """
    import torch

    device = torch.device(device)
    spread: dict[str, float | None] = {}
    notes: dict[str, str] = {}
    rates: dict[str, float | None] = {}
    for dtype in DTYPES[device.type]:
        rates[dtype], spread[f"matrix {dtype}"] = _measured_matrix_rate(device, dtype, notes)
    copy_rate, spread["copy"] = copy_bandwidth(device)
    links = _links(device, spread, notes)
    return {
        "device": device_name(device),
        "matrix_flops_per_second": rates,
        "copy_bytes_per_second": copy_rate,
        **links,
        "all_reduce": _all_reduce(device, notes),
        "spread": {what: value for what, value in spread.items() if value is not None},
        "sizes": {"matrix": MATRIX_SIZE[device.type], "copy_bytes": COPY_BYTES[device.type], "link_bytes": LINK_BYTES,
                  "reduce_bytes": REDUCE_BYTES[device.type], "repeats": REPEATS[device.type]},
        "notes": notes,
    }  # fmt: skip


def device_name(device: torch.device) -> str:
    """The name that `device_row` knows it by; `cpu` for a CPU."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


# -- matrix products ---------------------------------------------------------------------------------------------


def matrix_rate(device: torch.device | str, dtype: str, *, size: int | None = None) -> float:
    """Median FLOP/s of square matrix products of `dtype` (fp32, tf32, bf16, fp16) on `device`; below a second on a GPU."""
    import torch

    return _matrix_rate(torch.device(device), dtype, size)[0]


def _measured_matrix_rate(device: torch.device, dtype: str, notes: dict[str, str]) -> tuple[float | None, float | None]:
    import torch

    if dtype in ("tf32", "bf16") and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        notes[f"matrix {dtype}"] = f"{device_name(device)} has no matrix units for {dtype}"
        return None, None
    return _matrix_rate(device, dtype, None)


def _matrix_rate(device: torch.device, dtype: str, size: int | None) -> tuple[float, float]:
    import torch

    size = size or MATRIX_SIZE[device.type]
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    operands = [tuple(torch.randn(size, size, device=device, dtype=kind) for _ in range(2)) for _ in range(OPERAND_SETS)]
    result = torch.empty(size, size, device=device, dtype=kind)
    with fp32_products("high" if dtype == "tf32" else "highest"):
        seconds = timed(device, lambda turn: torch.mm(*operands[turn % OPERAND_SETS], out=result))
    return 2.0 * size**3 / median(seconds), _spread(seconds)


@contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """How torch multiplies fp32 inside: `highest` in full, `high` as tf32 where there are tensor cores."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# -- copies and links --------------------------------------------------------------------------------------------


def copy_bandwidth(device: torch.device) -> tuple[float, float]:
    """Bytes/s, read and written, of a copy within the device's memory; and the spread."""
    source, target = _bytes(COPY_BYTES[device.type], device), _bytes(COPY_BYTES[device.type], device)
    seconds = timed(device, lambda _: target.copy_(source))
    return 2.0 * COPY_BYTES[device.type] / median(seconds), _spread(seconds)


def _links(device: torch.device, spread: dict[str, Any], notes: dict[str, str]) -> dict[str, float | None]:
    names = ("host_to_device_bytes_per_second", "device_to_host_bytes_per_second")
    if device.type != "cuda":
        notes["links"] = "a CPU has no link to a device"
        return dict.fromkeys(names)
    import torch

    host, there = _bytes(LINK_BYTES, torch.device("cpu")).pin_memory(), _bytes(LINK_BYTES, device)
    found: dict[str, float | None] = {}
    for name, target, source in zip(names, (there, host), (host, there), strict=True):
        seconds = timed(device, partial(_move, target, source))
        found[name], spread[name.removesuffix("_bytes_per_second")] = LINK_BYTES / median(seconds), _spread(seconds)
    return found


def _move(target: torch.Tensor, source: torch.Tensor, _: int) -> None:
    target.copy_(source, non_blocking=True)


def _bytes(count: int, device: torch.device) -> torch.Tensor:
    import torch

    return torch.randint(0, 256, (count,), dtype=torch.uint8, device=device)


# -- all-reduce --------------------------------------------------------------------------------------------------


def _all_reduce(device: torch.device, notes: dict[str, str]) -> dict[str, float | int] | None:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        notes["all_reduce"] = "no process group with more than one rank"
        return None
    ranks, large = dist.get_world_size(), REDUCE_BYTES[device.type]
    seconds = _reduce_seconds(device, large // 4)
    return {
        "ranks": ranks,
        "bus_bytes_per_second": bus_bandwidth(large, seconds, ranks),
        "latency_seconds": _reduce_seconds(device, 1),
    }


def bus_bandwidth(size_bytes: int, seconds: float, ranks: int) -> float:
    """Bytes/s that each rank's link carries in an all-reduce of `size_bytes`.

    >>> bus_bandwidth(1_000_000, 0.001, 2), bus_bandwidth(1_000_000, 0.001, 4)
    (1000000000.0, 1500000000.0)
    """
    return size_bytes / seconds * 2 * (ranks - 1) / ranks


def _reduce_seconds(device: torch.device, elements: int) -> float:
    """Median seconds of an all-reduce of fp32 elements, on the slowest rank."""
    import torch
    import torch.distributed as dist

    values = torch.randn(elements, device=device)

    def reduce(_: int) -> None:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)  # MAX, not SUM: repeated sums would overflow

    seconds = torch.tensor([median(timed(device, reduce, between=dist.barrier))], dtype=torch.float64, device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds.item())


# -- time --------------------------------------------------------------------------------------------------------


def timed(device: torch.device, work: Callable[[int], Any], between: Callable[[], Any] = lambda: None) -> list[float]:
    """Seconds of each repeat of `work(turn)` after the warm-ups; `between` runs before each, untimed."""
    read = _device_seconds if device.type == "cuda" else _host_seconds
    for turn in range(WARM_UPS[device.type]):
        work(turn)
    seconds = []
    for turn in range(REPEATS[device.type]):
        between()
        seconds.append(read(device, work, turn))
    return seconds


def _device_seconds(device: torch.device, work: Callable[[int], Any], turn: int) -> float:
    import torch

    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work(turn)
        end.record()
        torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000.0


def _host_seconds(device: torch.device, work: Callable[[int], Any], turn: int) -> float:  # noqa: ARG001
    start = time.perf_counter()
    work(turn)
    return time.perf_counter() - start


def _spread(seconds: list[float]) -> float:
    return (max(seconds) - min(seconds)) / median(seconds)


# -- words -------------------------------------------------------------------------------------------------------


def bench_text(ceilings: dict[str, Any], power_limit_watts: float | None = None) -> str:
    """Ceilings in words, each beside the data sheet's peak where the device is known."""
    row = device_row(ceilings["device"], power_limit_watts)
    lines = [f"Ceilings of {ceilings['device']} (medians of {ceilings['sizes']['repeats']}; spread = slowest less fastest)"]
    spread = ceilings["spread"]
    for dtype, rate in ceilings["matrix_flops_per_second"].items():
        peak = row.peaks.get(dtype) if isinstance(row, DeviceRow) else None
        what = f"matrix product, {dtype}, {ceilings['sizes']['matrix']}^3"
        size, unit = (1e12, "TFLOP/s") if rate is None or rate >= 1e12 else (1e9, "GFLOP/s")
        lines.append(_line(what, rate, size, unit, peak, spread.get(f"matrix {dtype}"), ceilings["notes"].get(f"matrix {dtype}")))
    bandwidth = row.bandwidth if isinstance(row, DeviceRow) else None
    copied = ceilings["copy_bytes_per_second"]
    lines.append(_line("copy in its memory (read + written)", copied, 1e9, "GB/s", bandwidth, spread.get("copy")))
    for key, what in (("host_to_device", "host to device, pinned"), ("device_to_host", "device to host, pinned")):
        lines.append(_line(what, ceilings[f"{key}_bytes_per_second"], 1e9, "GB/s", None, spread.get(key), ceilings["notes"].get("links")))
    lines.append(_reduce_line(ceilings))
    reason = row.note if isinstance(row, DeviceRow) else f"no data sheet to compare with: {row.reason}"
    return "\n".join([*lines, *([f"  {reason}"] if reason else [])])


def _line(
    what: str, value: float | None, unit_size: float, unit: str, peak: float | None, spread: float | None, why: str | None = None
) -> str:
    if value is None:
        return f"  {what}: none ({why})"
    text = f"  {what}: {value / unit_size:,.2f} {unit}"
    text += f", {value / peak:.0%} of {peak / unit_size:,.1f}" if peak else ""
    return text + (f", spread {spread:.0%}" if spread is not None else "")


def _reduce_line(ceilings: dict[str, Any]) -> str:
    found = ceilings["all_reduce"]
    if found is None:
        return f"  all-reduce: none ({ceilings['notes']['all_reduce']})"
    return (
        f"  all-reduce over {found['ranks']} ranks: bus {found['bus_bytes_per_second'] / 1e9:,.2f} GB/s, "
        f"latency {found['latency_seconds'] * 1e6:,.1f} us"
    )


def run(*, as_json: bool = False, store: bool = True) -> str:
    """Measure this process's device, together with the other ranks if torchrun started it; the text of rank 0, else empty.

    `store`: keep the result in the user's cache for later records (see `machine_file`).
    """
    import torch
    import torch.distributed as dist

    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks > 1:
        on_gpu = device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    try:
        found = {**_slowest(measure_ceilings(device), ranks), "measured": utc_now(), "torch": torch.__version__}
    finally:
        if ranks > 1:
            dist.destroy_process_group()
    if store:
        remember_ceilings(found, device_key(device))
    if rank != 0:
        return ""
    return json.dumps(found, indent=1) if as_json else bench_text(found)


def device_key(device: torch.device) -> str:
    """What its ceilings are kept by: the UUID as NVML writes it, or the host's name for a CPU."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else cpu_key()


def _slowest(found: dict[str, Any], ranks: int) -> dict[str, Any]:
    """The least of every rate over the ranks' devices, since the slowest one sets the pace; theirs stay under `per_rank`."""
    import torch.distributed as dist

    if ranks == 1:
        return found
    everyone: list[dict[str, Any]] = [{}] * ranks
    dist.all_gather_object(everyone, found)
    rates = {dtype: _least(one["matrix_flops_per_second"][dtype] for one in everyone) for dtype in found["matrix_flops_per_second"]}
    links = {name: _least(one[name] for one in everyone) for name in found if name.endswith("_bytes_per_second")}
    kept = ("device", "matrix_flops_per_second", "copy_bytes_per_second", "spread")
    return {**found, "matrix_flops_per_second": rates, **links, "per_rank": [{name: one[name] for name in kept} for one in everyone]}


def _least(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return min(known, default=None)


if __name__ == "__main__":
    text = run(as_json="--json" in sys.argv[1:])
    if text:
        print(text)  # noqa: T201
