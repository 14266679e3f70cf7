"""A trial's step for sites whose Slurm runs containers by Enroot and Pyxis. Rendered, UNTESTED: no such site was at hand. Torch-free.

Options as its wiki has them (NVIDIA/pyxis, Usage, November 2025); Enroot takes a squashfs as it is. srun starts the container on every
node, in it torchrun's agent.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from bench.container.runtime import PYTHON, container_of
from bench.errors import UserError
from bench.trial import Trial

WARNING = "untested: rendered from the documentation of Pyxis; no site with Enroot was at hand. Compare it with your site's own examples."
PORT = 29500


def pyxis_line(trial: Trial, trial_file: Path, *, port: int = PORT) -> str:
    """The line to type inside an allocation, where HEAD is the first node's host name. Raises UserError for a trial without an image."""
    container = container_of(trial)
    if container is None:
        raise UserError(
            f"{trial_file}: its ranks run in no image; seen: container none; a suite run with `--container IMAGE` would be right"
        )
    path = container.variables({})["PYTHONPATH"]
    nodes = str(trial.parsed_cell.nodes)
    step = [
        "srun", "--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node", "1", "--kill-on-bad-exit=1",
        f"--container-image={container.image}", f"--container-mounts={','.join(bind.option for bind in container.mounts)}",
        "--container-readonly", "--no-container-mount-home", "--no-container-entrypoint",
        "bash", "-c",
    ]  # fmt: skip
    # bash expands the variables and the number of cores inside the step, on every node
    cell = trial.parsed_cell
    threads = f"$(( $(nproc) / {cell.processes_per_node} ))" if cell.settings.device == "cuda" else "1"
    variables = f"PYTHONPATH={shlex.quote(path)} OMP_NUM_THREADS={threads} HF_HUB_OFFLINE=1"
    agent = f"exec env {variables} {PYTHON} {_agent(trial, trial_file, port)}"
    return f"{shlex.join(step)} {shlex.quote(agent)}"


def _agent(trial: Trial, trial_file: Path, port: int) -> str:
    cell = trial.parsed_cell
    return (
        f'-m torch.distributed.run --nnodes {cell.nodes} --node-rank "$SLURM_PROCID" --nproc-per-node {cell.processes_per_node} '
        f'--master-addr "$HEAD" --master-port {port} --max-restarts 0 -m bench.launch.rank {shlex.quote(str(trial_file))} bench.worker'
    )
