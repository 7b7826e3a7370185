#!/usr/bin/env bash
# Compiles the kernels into thermocline.fatbin, which the crate includes, and notes the sources that it was made from.
# Run after every change of a .cu or .cuh file and commit what it writes; kernels/tests/fatbin.rs checks that.
# Needs python3 with venv and pip, and a package index that pip reaches; neither a GPU nor a CUDA toolkit.
#
# Further arguments go to nvcc: `build.sh --resource-usage` shows registers and spills.
set -euo pipefail
cd "$(dirname "$0")"

tools=${XDG_CACHE_HOME:-$HOME/.cache}/thermocline/nvcc-13.0.88
if [ ! -e "$tools/complete" ]; then
    python3 -m venv --clear "$tools"
    # nvcc takes its parts as it finds them: all are pinned to one release. 13.0 is the newest that drivers of the 580
    # branch accept.
    "$tools/bin/pip" install --quiet --disable-pip-version-check \
        nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 \
        nvidia-cuda-cccl==13.0.85 nvidia-cuda-nvrtc==13.0.88 xxhash==3.5.0
    touch "$tools/complete"
fi
nvcc=$(echo "$tools"/lib/python3*/site-packages/nvidia/cu13/bin/nvcc)

# No -ftz=true and no --use_fast_math: see small_integer in platform.cuh.
"$nvcc" -std=c++17 -O3 --fatbin --compress-mode=size \
    -gencode arch=compute_80,code=sm_80 -gencode arch=compute_89,code=sm_89 -gencode arch=compute_90,code=sm_90 \
    -gencode arch=compute_120,code=sm_120 -gencode arch=compute_80,code=compute_80 \
    "$@" -o thermocline.fatbin thermocline.cu

"$tools/bin/python" - *.cu *.cuh > thermocline.fatbin.sources <<'PYTHON'
import sys, xxhash
for name in sorted(sys.argv[1:]):
    with open(name, "rb") as file:
        print(xxhash.xxh3_128_hexdigest(file.read()), name)
PYTHON
ls -l thermocline.fatbin
