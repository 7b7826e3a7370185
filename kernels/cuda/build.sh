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

# The other compiler, which knows no host code: pasted together as kernels/src/cuda/driver.rs does it.
"$tools/bin/python" - "$tools"/lib/python3*/site-packages/nvidia/cu13/lib <<'PYTHON'
import ctypes, re, sys
folder, names = sys.argv[1], re.findall(r'cuda/(\w+\.cuh?)"\)', open("../src/cuda/driver.rs").read())
source = "".join(line for name in names for line in open(name) if not line.startswith("#include"))
ctypes.CDLL(f"{folder}/libnvrtc-builtins.so.13.0", mode=ctypes.RTLD_GLOBAL)
nvrtc, program, size = ctypes.CDLL(f"{folder}/libnvrtc.so.13"), ctypes.c_void_p(), ctypes.c_size_t()
if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"thermocline.cu", 0, None, None) != 0:
    sys.exit("NVRTC does not start")
options = (ctypes.c_char_p * 2)(b"--gpu-architecture=compute_90", b"--std=c++17")
if nvrtc.nvrtcCompileProgram(program, 2, options) != 0:
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    sys.exit(log.value.decode())
PYTHON

"$tools/bin/python" - *.cu *.cuh > thermocline.fatbin.sources <<'PYTHON'
import sys, xxhash
for name in sorted(sys.argv[1:]):
    with open(name, "rb") as file:
        print(xxhash.xxh3_128_hexdigest(file.read()), name)
PYTHON
ls -l thermocline.fatbin
