# ColossalAI's kernels that HybridAdam and FusedAdam need, compiled in the environment, which stays as it is; what comes out lies in
# /opt/kernels/out. It runs as root of that, without a network; the compiler's checked wheels lie in /compiler.
set -eu
umask 022
export PATH=/opt/venv/bin:$PATH LANG=C.UTF-8 HOME=/opt/kernels TMPDIR=/opt/kernels/tmp PYTHONDONTWRITEBYTECODE=1
mkdir $TMPDIR
python -m pip install -q --no-deps --no-compile --no-index --no-cache-dir --root-user-action ignore --find-links /compiler --require-hashes \
    --target /opt/kernels/toolkit -r /opt/kernels/compiler.txt
export CUDA_HOME=/opt/kernels/toolkit/nvidia/cu13 TORCH_CUDA_ARCH_LIST=$ARCHITECTURES FORCE_CUDA=1 PYTHONHASHSEED=0
# The wheels have no libcudart.so without a version, by which the linker looks for it.
mkdir $CUDA_HOME/lib64
ln -s ../lib/libcudart.so.13 $CUDA_HOME/lib64/libcudart.so
cd /opt/kernels
python compile_kernels.py /opt/kernels/out 2>&1
