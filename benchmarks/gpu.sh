#!/usr/bin/env bash
# Trains configs/digits_24.py on one GPU, all four arms over three seeds, and gathers the results.
#   benchmarks/gpu.sh [FLAGS OF benchmarks/digits.py ...]
# Needs the cuda and dev extras in the environment that `python` belongs to.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python -c 'import jax; assert jax.default_backend() == "gpu", f"no GPU: jax runs on {jax.default_backend()}"'
exec python -m benchmarks.digits --config=configs/digits_24.py --workdir=runs/arms_24 \
  --result=benchmarks/results/digits_24.json --plot=docs/images/digits_24.png "$@"
