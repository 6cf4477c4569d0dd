#!/usr/bin/env bash
# Every check of a change: ruff, ruff format, mypy and the tests, after setting up what is missing.
#   scripts/test.sh [--python=VERSION] [ARGUMENTS OF pytest ...]
# --python=3.13 uses that Python, an environment of its own (.venv-3.13) and its constraints.
# All four run even if one fails; the status is pytest's, or 1 if only another check failed.
# The tests compare with PyTorch. For its small CPU build, install torch into the environment beforehand.
# GAZE_VENV and GAZE_PYTHON: see scripts/environment.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

gaze_python_of "$@"
gaze_environment data,dev,docs,parity,video
cd "$root"

failed=()
check() {
  echo "== $*"
  "$python" -m "$@" || failed+=("$1${2:+ $2}")
}
check ruff check .
check ruff format --check .
check mypy

echo "== pytest"
status=0
"$python" -m pytest -n 2 --dist loadgroup -q "${arguments[@]}" || status=$?

if [[ ${#failed[@]} -gt 0 ]]; then
  echo "Failed besides the tests: $(IFS=,; echo "${failed[*]}")" >&2
  [[ $status -ne 0 ]] || status=1
fi
exit "$status"
