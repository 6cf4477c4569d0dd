#!/usr/bin/env bash
# Trains the digit-scene example from nothing: sets up what is missing, then runs train.py.
#   scripts/digits.sh [WORKDIR] [FLAGS OF train.py ...]
# WORKDIR defaults to runs/digits in the checkout. GAZE_VENV and GAZE_PYTHON: see scripts/environment.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

workdir="$root/runs/digits"
if [[ $# -gt 0 && $1 != -* ]]; then
  workdir="$1"
  shift
  # A bucket's address has a scheme and is nobody's relative path.
  [[ $workdir == /* || $workdir == *://* ]] || workdir="$PWD/$workdir"
fi

gaze_environment ""
cd "$root"
exec "$python" train.py --config=configs/digits.py --workdir="$workdir" "$@"
