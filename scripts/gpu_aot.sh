#!/usr/bin/env bash
# Compiles the GPU kernel to machine code of an H100, in an environment of its own with CUDA's compiler; no GPU needed.
#   scripts/gpu_aot.sh [ARGUMENTS OF benchmarks/gpu_aot.py ...]
# GAZE_VENV (default .venv-gpu-aot in the checkout) and GAZE_PYTHON: see scripts/environment.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

GAZE_VENV="${GAZE_VENV:-$root/.venv-gpu-aot}"
gaze_environment gpu-aot
cd "$root"
# The assembler ptxas, which the wheel of nvcc has.
PATH="$(dirname "$(find "$(dirname "$python")/../lib" -name ptxas -print -quit)"):$PATH"
export PATH JAX_PLATFORMS=cpu
exec "$python" -m benchmarks.gpu_aot "$@"
