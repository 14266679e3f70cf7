"""What a run needs of this machine, checked before anything is started, and files that look finished and are not. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path

from bench.container.fit import best, fits, problem
from bench.container.images import image_named, images
from bench.container.runtime import find_image
from bench.container.runtimes import ARCHIVE, SQUASHFS, choose
from bench.data.manifest import load_manifest
from bench.errors import BenchError, MachineError, UserError
from bench.launch.inputs import read_done
from bench.layout import Layout
from bench.matrix import Block, Plan
from bench.measure.host import Host, look
from bench.needs import needs, weights_on_disk_bytes

GIB = 1 << 30
SPARE_BYTES = 1 * GIB
"""Disk for records, logs and the report."""


def check_readiness(plan: Plan, root: Path) -> None:
    """Raise MachineError with everything that this machine lacks for `plan`, whose results would go to `root`."""
    host = look(root)
    check_images(plan)
    lacks = [
        *_lacks_devices(plan, host),
        *_lacks_memory(plan, host),
        *_lacks_disk(plan, host),
        *_lacks_runtime(plan),
        *_lacks_driver(plan, host),
    ]
    if lacks:
        raise MachineError(
            "\n  ".join([f"this machine cannot run the suite {plan.suite}:", *lacks, "`coati-bench doctor` says what it has"])
        )


def _lacks_devices(plan: Plan, host: Host) -> list[str]:
    wanted = max((cell.world_size for cell in plan.cells.values() if cell.settings.device == "cuda"), default=0)
    lacks = []
    if wanted > len(host.devices):
        seen = f"{len(host.devices)}" if host.devices else f"none ({host.no_devices or 'the driver counts 0'})"
        lacks.append(
            f"its cells compute on CUDA devices; seen: {seen}; needed: {wanted} NVIDIA device{'s' * (wanted > 1)} "
            "(`device: cpu` in the settings runs small models without)"
        )
    here = any(cell.settings.device == "cuda" and cell.settings.container == "none" for cell in plan.cells.values())
    if here and host.versions.get("torch") and host.versions.get("cuda") is None:
        lacks.append(f"torch must be a CUDA build; seen: {host.versions['torch']}; `python3 envs/install.py --family cuda` installs one")
    return lacks


def _lacks_memory(plan: Plan, host: Host) -> list[str]:
    """Host memory for the states of CPU cells, by theory; of devices it is a measurement whether a cell fits."""
    on_cpu = [cell for cell in plan.cells.values() if cell.settings.device == "cpu"]
    wanted = max((cell.world_size * theory.state_bytes for cell in on_cpu if (theory := needs(cell))), default=0)
    if wanted <= host.memory_bytes:
        return []
    return [f"the states of its largest CPU cell need {wanted / GIB:.1f} GiB; seen: {host.memory_bytes / GIB:.1f} GiB of memory"]


def _lacks_disk(plan: Plan, host: Host) -> list[str]:
    wanted = weights_on_disk_bytes(plan) + SPARE_BYTES
    if wanted <= host.disk_free_bytes:
        return []
    return [f"weights and records need {wanted / GIB:.1f} GiB of disk; seen: {host.disk_free_bytes / GIB:.1f} GiB free"]


def forget_unfinished(plan: Plan, layout: Layout) -> list[str]:
    """Remove the files that say that something is finished when it is not any more; return what, in words.

    Blocks whose records are gone; and what a missing block needs: manifests whose data is gone, warm starts that failed or are
    gone. Without that, Snakemake would take those files for the thing itself.
    """
    forgotten = []
    for block in plan.blocks:
        if layout.block(block.block_id).exists() and not _has_records(layout, block):
            layout.block(block.block_id).unlink()
            forgotten.append(f"records of block {block.block_id} are gone; it runs again")
    for warm in plan.warm:
        done = layout.warm(warm.key) / "done.json"
        problem = _warm_problem(done)
        if problem and _is_asked_for(plan, layout, warm.key):
            done.unlink()
            forgotten.append(f"warm start {warm.key} {problem}; it is made again")
    for name in plan.data:
        if _data_is_gone(layout.data(name)) and any(name in block.data for block in _missing(plan, layout)):
            layout.data(name).unlink()
            forgotten.append(f"data {name} is no longer where it was; it is fetched again")
    return forgotten


def check_images(plan: Plan) -> None:
    """Raise UserError for an image that can never be: an unknown name, or a file that is not there or was changed."""
    for setting in _containers(plan):
        if setting.endswith((SQUASHFS, ARCHIVE)):
            find_image(setting)
        else:
            image_named(setting)


def _lacks_runtime(plan: Plan) -> list[str]:
    if not _containers(plan):
        return []
    try:
        choose()
    except MachineError as problem:
        return [f"its cells run in an image: {problem}"]
    return []


def _lacks_driver(plan: Plan, host: Host) -> list[str]:
    """Images, known by name, that cannot use the devices that are here; whether there are enough is said apart."""
    on_cuda = {cell.settings.container for cell in plan.cells.values() if cell.settings.device == "cuda"} & images().keys()
    lacks = [f"the image {name} has torch's CPU build; its cells compute on CUDA devices" for name in on_cuda if not image_named(name).cuda]
    problems = {name: problem(image_named(name), host.devices) for name in sorted(on_cuda) if host.devices}
    if any(problems.values()):
        fitting = best(fits(host.devices)).image
        other = f"`--container {fitting.name}` fits" if fitting.cuda else "no image fits"
        lacks += [f"the image {name} {said}; {other} this machine" for name, said in problems.items() if said]
    return lacks


def forget_lost_images(plan: Plan, layout: Layout) -> list[str]:
    """Remove the notes of images that were built and are gone, or that were built from other locks; return what, in words."""
    forgotten = []
    for name in _containers(plan) & images().keys():
        if layout.image(name).exists():
            try:
                find_image(name)
            except UserError:
                layout.image(name).unlink()
                forgotten.append(f"image {name} is not there any more, or of other locks; it is built again")
    return forgotten


def _containers(plan: Plan) -> set[str]:
    return {cell.settings.container for cell in plan.cells.values()} - {"none"}


def _missing(plan: Plan, layout: Layout) -> list[Block]:
    return [block for block in plan.blocks if not layout.block(block.block_id).exists()]


def _warm_problem(done: Path) -> str | None:
    """Why a warm start that was made cannot be used, or None; one that was not made yet has no problem."""
    content = read_done(done)
    if content is None:
        return "cannot be read" if done.exists() else None
    if content["outcome"] != "ok":
        return f"ended as {content['outcome']}"
    return None if (done.parent / "weights").is_dir() else "lost its weights"


def _data_is_gone(manifest: Path) -> bool:
    if not manifest.exists():
        return False
    try:
        known = load_manifest(manifest)
        return Path(known.path).stat().st_size != known.bytes
    except (BenchError, OSError):
        return True


def _has_records(layout: Layout, block: Block) -> bool:
    """Whether the block's file can be read and every record of it is there."""
    try:
        listed = {entry["cell_id"] for entry in json.loads(layout.block(block.block_id).read_text(encoding="utf-8"))["records"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return listed >= set(block.cells) and all(layout.record(cell_id, block.trial).exists() for cell_id in block.cells)


def _is_asked_for(plan: Plan, layout: Layout, key: str) -> bool:
    """Whether a block that is still to be run begins from this warm start, or from one that begins from it."""
    asked = any(key in starts.values() for block in _missing(plan, layout) for starts in block.starts.values())
    return asked or any(_is_asked_for(plan, layout, warm.key) for warm in plan.warm if key in warm.starts.values())
