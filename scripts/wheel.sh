#!/usr/bin/env bash
# Builds the wheel, installs it into an empty environment, and uses it from another folder: what a user of pip gets.
#   scripts/wheel.sh [--python=VERSION]
# GAZE_PYTHON: see scripts/environment.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
gaze_python_of "$@"

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
# Built from a copy: setuptools leaves a build folder behind, whose old files would be in the next wheel.
mkdir "$scratch/source" "$scratch/elsewhere"
(cd "$root" && cp -r configs gaze_jax pallas_kernels setup.py pyproject.toml requirements.txt README.md LICENSE NOTICE "$scratch/source")

# A library that was built in place is none of the wheel's sources.
find "$scratch/source" -name '*.so' -delete

base="$(find_python)"
"$base" -m venv "$scratch/venv"
bin="$scratch/venv/bin"
"$bin/python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$scratch" "$scratch/source"
"$bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/$(gaze_constraints "$bin/python")" "$scratch"/gaze_jax-*.whl

cd "$scratch/elsewhere"
export JAX_PLATFORMS=cpu
say() {
  echo "== $*"
  "$@"
}
if command -v c++ >/dev/null; then
  say "$bin/python" -c "from pallas_kernels.gaze_decode.native import library; print(library.instruction_set())"
fi
say "$bin/gaze-jax" --help
for command in train eval generate convert view; do
  "$bin/gaze-jax" "$command" -h >"$scratch/help.txt"
done
"$bin/python" -c "import gaze_jax; help(gaze_jax.load)" >"$scratch/help.txt"
grep --quiet "Load a checkpoint" "$scratch/help.txt"
say "$bin/gaze-jax" train --config=digits --workdir=run --config.steps=2 --config.optimizer.warmup_steps=1 \
  --config.batch_size=4 --config.eval.samples=2
say "$bin/gaze-jax" generate --checkpoint=run --image=run/scene.png --question="Transcribe the digits from top to bottom." \
  --max_tokens=2 --out=answer.gaze
say "$bin/gaze-jax" view answer.gaze --out=page
say "$bin/gaze-jax" convert --from=run --to=back --format=hf
test -s page/answer.html -a -s back/gaze.json
