"""The cost of converting a checkpoint, compared with plainly reading and writing the same files.

python -m benchmarks.convert --json=benchmarks/results/convert.json

Makes a checkpoint of a published size with random weights, then measures each step in its own process:
seconds without imports, and peak resident memory with them. Rounds interleave the steps.
"""

import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags

_MODEL = flags.DEFINE_string("model", "qwen2.5-0.5b", "Which of gaze_jax.families.DECODERS.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "How many times to measure each step; medians are reported.")
_JSON = flags.DEFINE_string("json", None, "Write the results to this file.")
_DIR = flags.DEFINE_string("dir", None, "Scratch folder with space for four checkpoints; default: a new one.")
_STEP = flags.DEFINE_string("step", None, "Measure this step in this process; used internally.")

BESIDE = {
    "read": "read",
    "plain": "plain",
    "durable": "plain",
    "convert": "plain",
    "back": "plain",
    "load": "read",
    "unchecked": "read",
}
"""Step -> the plain step it is compared with: reading the files, or reading and writing them.

"durable" is "plain" that also waits for the disk, as Orbax does after every file.
"""


def make(directory: Path, model: str) -> None:
    """Make a random-weight checkpoint in bfloat16, in one file like the published small Qwen models."""
    import ml_dtypes
    import numpy as np

    from gaze_jax.convert import shards
    from gaze_jax.convert.source import expected_tensors
    from gaze_jax.families import CONVERSIONS, DECODERS, written_as

    config = DECODERS[model]
    conversion = CONVERSIONS[written_as(config)]
    directory.mkdir(parents=True)
    fields = conversion.write_config(config) | {"dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(fields))
    tensors = expected_tensors(conversion.rules(config), config)
    entries = {name: ("BF16", shape) for name, shape in tensors.items()}
    writers = {shards.SINGLE: shards.Writer(directory / shards.SINGLE, entries, {"format": "pt"})}
    rng = np.random.default_rng(0)
    with shards.writing(writers):
        for name, shape in tensors.items():
            values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
            writers[shards.SINGLE].write(name, values.astype(ml_dtypes.bfloat16))


def measure(step: str, directory: Path) -> dict[str, float]:
    """Run one step in this process."""
    source, gaze, back, plain = (directory / name for name in ("source", "gaze", "back", "plain"))
    if step in ("read", "plain", "durable"):
        import ml_dtypes  # noqa: F401  # without it numpy has no bfloat16
        from safetensors.numpy import load_file, save_file

        def run() -> Any:
            tensors = load_file(source / "model.safetensors")
            if step != "read":
                shutil.rmtree(plain, ignore_errors=True)
                plain.mkdir()
                save_file(tensors, plain / "model.safetensors")
            if step == "durable":
                with (plain / "model.safetensors").open("rb") as file:
                    os.fsync(file.fileno())
            return tensors

    else:
        import jax

        from gaze_jax.convert import run as conversion
        from gaze_jax.convert.checkpoint import load
        from gaze_jax.convert.export import export
        from gaze_jax.convert.load import one_device

        def run() -> Any:
            if step == "convert":
                conversion.write_plan(conversion.plan_directory(source), gaze)
            elif step == "back":
                export(conversion.open_model(gaze), back)
            else:
                return jax.block_until_ready(load(gaze, one_device(), check=step == "load").params)

        if step == "back":
            back.mkdir()
    start = time.perf_counter()
    kept = run()
    seconds = time.perf_counter() - start
    del kept
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {"seconds": seconds, "peak_rss_mb": peak * 1024 / 1e6}


def rounds(directory: Path, count: int) -> dict[str, list[dict[str, float]]]:
    """Measure every step ``count`` times, each in a fresh process, after pending writes are flushed."""
    found: dict[str, list[dict[str, float]]] = {step: [] for step in BESIDE}
    for _ in range(count):
        for name in ("gaze", "back", "plain"):
            shutil.rmtree(directory / name, ignore_errors=True)
        for step in BESIDE:
            os.sync()
            command = [sys.executable, "-m", "benchmarks.convert", f"--step={step}", f"--dir={directory}"]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[step].append(json.loads(out.splitlines()[-1]))
        same = (directory / "back/model.safetensors").read_bytes()
        assert same == (directory / "source/model.safetensors").read_bytes(), "the round trip is not exact"
    return found


def report(directory: Path, found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Report medians and their ratios to the plain steps."""
    from gaze_jax.parallel.mesh import describe_devices

    size = sum(path.stat().st_size for path in (directory / "source").glob("*.safetensors")) / 1e6
    medians = {step: statistics.median(row["seconds"] for row in rows) for step, rows in found.items()}
    rows = {}
    for step, measured in found.items():
        seconds = medians[step]
        rows[step] = {
            "seconds": seconds,
            "seconds_min": min(row["seconds"] for row in measured),
            "seconds_max": max(row["seconds"] for row in measured),
            "mb_per_s": size / seconds,
            "ratio_to_plain": seconds / medians[BESIDE[step]],
            "peak_rss_mb": max(row["peak_rss_mb"] for row in measured),
        }
    return {
        "model": _MODEL.value,
        "checkpoint_mb": size,
        "rounds": len(found["plain"]),
        "steps": rows,
        "date": datetime.date.today().isoformat(),
        "device": describe_devices(),
        "command": f"python -m benchmarks.convert --model={_MODEL.value}",
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':16}{'seconds':>18}{'MB/s':>8}{'x plain':>9}{'peak RSS, MB':>14}"]
    for step, row in result["steps"].items():
        spread = f"{row['seconds']:.2f} [{row['seconds_min']:.2f}, {row['seconds_max']:.2f}]"
        lines.append(
            f"{step:16}{spread:>18}{row['mb_per_s']:>8.0f}{row['ratio_to_plain']:>9.2f}{row['peak_rss_mb']:>14.0f}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    del argv
    if _STEP.value is not None:
        print(json.dumps(measure(_STEP.value, Path(_DIR.value))))
        return
    directory = Path(_DIR.value or tempfile.mkdtemp())
    try:
        make(directory / "source", _MODEL.value)
        result = report(directory, rounds(directory, _ROUNDS.value))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(table(result))
    if _JSON.value is not None:
        Path(_JSON.value).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
