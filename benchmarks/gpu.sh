#!/usr/bin/env bash
# Everything that wants a GPU, in the order of its worth, inside MINUTES (10 unless told) on one H100:
#   benchmarks/gpu.sh [--digits [FLAGS OF benchmarks/digits.py ...]]
# 1. tests of the GPU kernels, compiled: 1.5 minutes   2. tuning of the decode kernel's tiles: 2 minutes
# 3. benchmarks/decode.py: 4 minutes                   4. benchmarks/prefill.py: 1.5 minutes
# These need jax (0.10.2 or later, with CUDA) and numpy; the tests pytest and hypothesis. With --digits
# it then trains configs/digits_24.py, all four arms over three seeds, which takes longer than the rest
# of 10 minutes and needs the cuda and dev extras.
# A stage has its minutes from the last one's end; of other MINUTES each has its part. What fails or runs out
# of time does not stop the next; what was measured is kept shape by shape. Logs and single results:
# runs/gpu. Status 1 if any part failed.
#   GPU_DRY_RUN=1 benchmarks/gpu.sh    the same parts at toy sizes, without a GPU
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

minutes=${MINUTES:-10}
dry=${GPU_DRY_RUN:-}
begun=$SECONDS
failed=()
out=runs/gpu
results=benchmarks/results
quick=()
[[ $dry ]] && { quick=(--quick); results=$out; }
mkdir -p "$out" "$results"

if [[ ! $dry ]]; then
  python -c 'import jax; assert jax.default_backend() == "gpu", f"no GPU: jax runs on {jax.default_backend()}"' || exit 1
  nvidia-smi --query-gpu=name,driver_version,clocks.max.mem --format=csv 2>/dev/null || true
fi
python -c 'import jax, numpy; print("jax", jax.__version__, "numpy", numpy.__version__, jax.devices())'

importable() { python -c "import $1" 2>/dev/null; }

# stage SECONDS: what follows may take this long, of 600 s in all.
until=$begun
stage() {
  until=$((SECONDS + $1 * minutes / 10))
  ((until < begun + minutes * 60)) || until=$((begun + minutes * 60))
}

# part NAME SECONDS COMMAND...: run it with a limit of its own and of what its stage has left; keep its log.
part() {
  local name=$1 limit=$2 left=$((until - SECONDS))
  shift 2
  ((left < limit)) && limit=$left
  if ((limit < 10)); then
    echo "== $name: no time left"
    failed+=("$name (no time)")
    return
  fi
  echo "== $name: at most $limit s"
  local at=$SECONDS
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n 40
  local status=${PIPESTATUS[0]}
  echo "== $name: status $status after $((SECONDS - at)) s"
  ((status == 0)) || failed+=("$name ($status)")
}

# gather FILE PARTS...: one report of the reports there are, rows joined.
gather() {
  python - "$@" <<'PYTHON'
import json, pathlib, sys

into, *parts = map(pathlib.Path, sys.argv[1:])
reports = [json.loads(path.read_text()) for path in parts if path.exists()]
if reports:
    rows = [row for report in reports for row in report["rows"]]
    commands = [report["command"] for report in reports]
    into.write_text(json.dumps({**reports[0], "command": commands, "rows": rows}, indent=2) + "\n")
PYTHON
}

# bench NAME SECONDS SHAPES FLAGS...: a run of benchmarks/NAME.py per shape, its own file each.
bench() {
  local name=$1 limit=$2 shapes=$3 files=() shape file
  shift 3
  for shape in $shapes; do
    file="$out/${name}_$(tr '/ ' '__' <<<"$shape $*" | tr -d -- '-=,').json"
    files+=("$file")
    rm -f "$file"
    part "$(basename "$file" .json)" "$limit" python -m "benchmarks.$name" --shapes="$shape" --json="$file" "$@" "${quick[@]}"
    gather "$results/${name}_gpu.json" "$out/${name}"_*.json
  done
}

stage 90
if ! importable pytest || ! importable hypothesis; then
  echo "== tests: pytest or hypothesis is missing here, so the kernels' tests do not run"
  failed+=("tests (no pytest)")
elif [[ $dry ]]; then
  part tests 300 env JAX_PLATFORMS=cpu python -m pytest -q tests/kernels/test_decode_gpu.py -k lowers_for_cuda
else
  part tests 90 env JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false python -m pytest -q -m gpu tests/kernels
fi

stage 120
tiles=()
[[ $dry ]] && { cp pallas_kernels/gaze_decode/gpu_tiles.json "$out/tiles.json"; tiles=(--tiles="$out/tiles.json" --seconds=1); }
part tune 120 python -m benchmarks.tune_decode --json="$results/tune_decode.json" "${tiles[@]}" "${quick[@]}"

rm -f "$out"/decode_*.json "$out"/prefill_*.json
if [[ $dry ]]; then
  stage 240
  bench decode 120 "71/2/1" --impl=xla
  stage 90
  bench prefill 120 "71/2/1" --impl=xla
else
  # The shapes that the claims are about first; each has what one before it left.
  few=(--impl=xla,gpu --seconds=8)
  stage 240
  bench decode 60 "147456/4096/410 36864/1024/102 9216/256/40" --heads=qwen3-4b --batch=1,8 --dtype=bfloat16 "${few[@]}"
  bench decode 45 "147456/4096/410 36864/1024/102" --heads=qwen3-4b --batch=1 --dtype=int8 --impl=gpu --seconds=8
  bench decode 45 "19980/555/55 4608/128/13 36864/1024/20" --heads=qwen3-4b --batch=1,8 --dtype=bfloat16 "${few[@]}"
  stage 90
  bench prefill 60 "36864/1024/102 36864/1024/20" --heads=qwen3-4b --dtype=bfloat16 --seconds=15
fi

if [[ ${1:-} == --digits ]]; then
  shift
  if importable absl && importable grain && importable ml_collections && importable optax; then
    python -m benchmarks.digits --config=configs/digits_24.py --workdir=runs/arms_24 \
      --result=benchmarks/results/digits_24.json --plot=docs/images/digits_24.png "$@" || failed+=(digits)
  else
    echo "== digits: absl, grain, ml_collections or optax is missing here, so nothing is trained"
    failed+=("digits (no packages)")
  fi
fi

echo "== $((SECONDS - begun)) s; failed: ${failed[*]:-nothing}"
((${#failed[@]} == 0))
