"""Compile ColossalAI's kernels that its optimizers HybridAdam and FusedAdam need, ahead of time: stage `kernels` of an image.

    python compile_kernels.py FOLDER        TORCH_CUDA_ARCH_LIST says for which devices, CUDA_HOME where the compiler is

The sources and flags are those of ColossalAI's extension classes, but for what would make the result depend on this machine:
`-march=native` and the query of the device that is here; and without debug information, which holds paths.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from colossalai.kernel.extensions import CpuAdamX86Extension, FusedOptimizerCudaExtension
from setuptools import Distribution
from torch.utils.cpp_extension import BuildExtension, CUDAExtension

PROCESSOR = "x86-64-v3"
"""AVX2 and FMA, the widest that the sources have code for; processors from 2013 on have them."""
DROPPED = ("-march=native", "-g", "-lcudart", "-lcublas", "-std=c++14")
"""Flags of the sources' authors that go: see above; two are the linker's and the last is overruled by another."""

SAME_NAMES = ("--objdir-as-tempdir", "--frandom-seed=0")
"""nvcc's, so that no name of a temporary file and no random number comes into a module."""


def main() -> None:
    """Compile both into the folder."""
    output = Path(sys.argv[1])
    include = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "include"
    extensions = [extension_of(CpuAdamX86Extension(), include), extension_of(FusedOptimizerCudaExtension(), include)]
    command = BuildExtension.with_options(use_ninja=True)(Distribution({"name": "kernels", "ext_modules": extensions}))
    command.build_lib, command.build_temp = str(output), str(output / "temp")
    command.ensure_finalized()
    command.run()


def extension_of(kernel: CpuAdamX86Extension | FusedOptimizerCudaExtension, include: Path) -> CUDAExtension:
    """What setuptools compiles, under the name by which ColossalAI looks for what is prebuilt."""
    cxx = [flag for flag in kernel.cxx_flags() if flag not in DROPPED] + [f"-march={PROCESSOR}", "-g0"]
    return CUDAExtension(
        name=kernel.prebuilt_import_path, sources=kernel.sources_files(), include_dirs=[*kernel.include_dirs(), str(include)],
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "--use_fast_math", "-DCOLOSSAL_WITH_CUDA", *SAME_NAMES]},
        extra_link_args=["-Wl,--build-id=none", "-s"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
