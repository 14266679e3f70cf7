"""What a block or a warm start asks of a scheduler, from the plan. Torch-free.

The names are those of snakemake-executor-plugin-slurm; a site's profile replaces any of them (`set-resources`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from bench.cell import Cell
from bench.needs import needs
from bench.suite import Limits

GIB = 1 << 30
RANK_BYTES = 3 * GIB
"""Host memory of a rank before it holds anything: Python, torch, the frameworks and CUDA's context."""

UNKNOWN_BYTES = 32 * GIB
"""Host memory of a rank whose model has no shape before it is loaded."""

SPARE_MINUTES = 10
"""Beside the trials' own limits: start of the job, imports, records. So a trial's limit is always met before the allocation's."""

CORES = {"cpu": 1, "cuda": 4}
"""Cores for each rank, by device."""


class Allocation(NamedTuple):
    """One allocation of so many nodes, one task on each."""

    nodes: int
    tasks: int
    """One launcher on each node."""
    mpi: str
    """`srun` where the block starts a step over several nodes itself; empty otherwise. Either way the plugin puts no srun around it."""
    cpus_per_task: int
    mem_mb: int
    """Of one node."""
    runtime: int
    """Minutes: as long as all trials may take by their own limits."""
    gres: str
    """Devices of one node; empty on the CPU."""
    tasks_per_gpu: int
    """0: else the plugin asks for as many tasks for each device as there are nodes."""


def allocation(cells: Sequence[Cell], limits: Limits, tries: int = 1) -> Allocation:
    """What trials of `cells`, one after the other, need; all have the same number of nodes and of processes per node."""
    nodes, processes = cells[0].nodes, cells[0].processes_per_node
    on_gpu = any(cell.settings.device == "cuda" for cell in cells)
    return Allocation(
        nodes=nodes,
        tasks=nodes,
        mpi="srun" if nodes > 1 else "",
        cpus_per_task=processes * CORES["cuda" if on_gpu else "cpu"],
        mem_mb=math.ceil(processes * max(map(host_bytes, cells)) / (1 << 20)),
        runtime=math.ceil(len(cells) * tries * limits.timeout_seconds / 60) + SPARE_MINUTES,
        gres=f"gpu:{processes}" if on_gpu else "",
        tasks_per_gpu=0,
    )


def host_bytes(cell: Cell) -> int:
    """Host memory of a rank: its states twice over (offloading keeps them there, and a checkpoint is written from a copy), or what
    loading the whole model in fp32 takes, whichever is more.
    """
    theory = needs(cell)
    return UNKNOWN_BYTES if theory is None else RANK_BYTES + max(2 * theory.state_bytes, 8 * theory.parameters)
