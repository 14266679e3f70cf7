"""ColossalAI's kernels of an image: compiled once in its environment, kept by what decides them, known by their own hash. Torch-free."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.cell import canonical_json
from bench.container.buildah import Tree
from bench.container.images import DEFINITIONS, Image
from bench.container.inputs import KERNEL_FILES, kernel_inputs, text_digest
from bench.container.manifest import Layer
from bench.container.requirements import compiler_requirements
from bench.container.wheelhouse import compiler_wheelhouse
from bench.data.cache import sha256_of
from bench.errors import MachineError

NOTE = "kernels.json"
FAT_BINARY, PTX = struct.pack("<I", 0xBA55ED50), 1
"""The mark of a fat binary, and the kind of its entries that is PTX."""


class Kernels(NamedTuple):
    """Compiled modules."""

    digest: str
    """sha256 over the modules' names and contents; it is committed."""
    inputs: dict[str, str]
    modules: dict[str, str]
    """File name -> sha256."""

    @classmethod
    def of(cls, note: Mapping[str, Any]) -> Kernels:
        """What `_asdict` gave."""
        return cls(note["digest"], dict(note["inputs"]), dict(note["modules"]))

    def to_json(self) -> dict[str, Any]:
        """As the note beside an image has it."""
        return self._asdict()


def kernels_for(image: Image, tree: Tree, environment: Layer, scratch: Path, folder: Path) -> tuple[Kernels, Path] | None:
    """The image's kernels and their folder, compiled in `tree`, which holds the `environment`, unless `folder` has them; None without any.

    Raises MachineError, also for modules that are not those that were compiled, and if the environment is not the same afterwards.
    """
    if image.compiler is None:
        return None
    inputs = kernel_inputs(image)
    kept = folder / f"kernels-{image.name}-{text_digest(canonical_json(inputs))[:12]}"
    if not (kept / NOTE).exists():
        compile_kernels(image, tree, scratch, folder / "wheelhouse")
        if (seen := tree.layer()) != environment:
            raise MachineError(
                f"image {image.name}: compiling kernels changed the environment; seen: {seen.digest}; {environment.digest} would be right"
            )
        found = kernels_in(scratch / "kernels", inputs)
        (scratch / "kernels" / NOTE).write_text(json.dumps(found.to_json(), indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(kept, ignore_errors=True)
        (scratch / "kernels").rename(kept)
    return read_kernels(kept), kept


def kernels_in(folder: Path, inputs: dict[str, str]) -> Kernels:
    """The modules that lie in a folder, decided by `inputs`."""
    modules = {path.name: sha256_of(path) for path in sorted(folder.glob("*.so"))}
    return Kernels(f"sha256:{text_digest(canonical_json(modules))}", inputs, modules)


def read_kernels(folder: Path) -> Kernels:
    """The kernels in a folder. Raises MachineError if one is not what was compiled."""
    kernels = Kernels.of(json.loads((folder / NOTE).read_text(encoding="utf-8")))
    for name, wanted in kernels.modules.items():
        seen = sha256_of(folder / name) if (folder / name).exists() else "no such file"
        if seen != wanted:
            raise MachineError(f"{folder / name}: not the kernel that was compiled; seen: {seen}; {wanted} would be right; remove {folder}")
    return kernels


def compile_kernels(image: Image, tree: Tree, scratch: Path, wheelhouse: Path) -> None:
    """Compile the image's kernels in `tree` into `scratch`/kernels; raises MachineError."""
    context, output = scratch / "kernel-context", scratch / "kernels"
    context.mkdir()
    output.mkdir()
    for name in KERNEL_FILES:
        shutil.copy(DEFINITIONS / name, context / name)
    (context / "compiler.txt").write_text(compiler_requirements(image), encoding="utf-8")
    mounts = {context: "/opt/kernels", compiler_wheelhouse(image, wheelhouse): "/compiler:ro"}
    script = KERNEL_FILES[0]
    tree.run(["sh", f"/opt/kernels/{script}"], mounts, what=script, variables={"ARCHITECTURES": architecture_list(image)})
    for path in (context / "out" / "colossalai" / "_C").glob("*.so"):
        shutil.copy(path, output / path.name)
    if not list(output.glob("*.so")):
        raise MachineError(f"image {image.name}: no kernel came out of {script}; its output says why")
    check_architectures(image, {name for path in output.glob("*.so") for name in architectures_in(path.read_bytes())})


def check_architectures(image: Image, seen: set[str]) -> None:
    """Raise MachineError unless there is code for all of the image's architectures."""
    wanted = {word for name in image.architectures for word in {name, name.rstrip("+")}}
    if absent := wanted - seen:
        raise MachineError(
            f"image {image.name}: its kernels have no code for {', '.join(sorted(absent))}; seen: {', '.join(sorted(seen)) or 'none'}; "
            f"{', '.join(image.architectures)} would be right"
        )


def architectures_in(module: bytes) -> set[str]:
    """Compute capabilities that a module has code for, with a `+` those for which it has PTX.

    nvcc puts both into fat binaries: a head of 16 bytes (mark, version, its own size, bytes that follow), then entries, whose heads
    begin with kind (1: PTX, 2: machine code), version, size of the head and of the code, and have the capability at byte 28. NVIDIA
    publishes no description; `cuobjdump --list-elf --list-ptx` lists the same.
    """
    found, place = set(), module.find(FAT_BINARY)
    while place >= 0:
        _, head, size = struct.unpack_from("<HHQ", module, place + 4)
        at, end = place + head, place + head + size
        while at < end:
            kind, _, head, size = struct.unpack_from("<HHIQ", module, at)
            (number,) = struct.unpack_from("<I", module, at + 28)
            found.add(f"{number // 10}.{number % 10}{'+' if kind == PTX else ''}")
            at += head + size
        place = module.find(FAT_BINARY, end)
    return found


def architecture_list(image: Image) -> str:
    """The image's architectures as torch's TORCH_CUDA_ARCH_LIST has them.

    >>> from bench.container.images import image_named
    >>> architecture_list(image_named("current"))
    '7.5;8.0;8.6;9.0;10.0;12.0+PTX'
    """
    return ";".join(name.replace("+", "+PTX") for name in image.architectures)
