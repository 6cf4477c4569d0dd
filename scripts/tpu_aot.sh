#!/usr/bin/env bash
# Compiles the TPU kernels for v5e, v5p and v6e, in an environment of its own that has libtpu; no TPU needed.
#   scripts/tpu_aot.sh [ARGUMENTS OF benchmarks/tpu_aot.py ...]
# GAZE_VENV (default .venv-aot in the checkout) and GAZE_PYTHON: see scripts/environment.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

GAZE_VENV="${GAZE_VENV:-$root/.venv-aot}"
gaze_environment dev,tpu-aot
cd "$root"
# Without these libtpu looks for the machine that it believes to run on.
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost
export ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_ACCELERATOR_TYPE=v5litepod-4
exec "$python" -m benchmarks.tpu_aot "$@"
