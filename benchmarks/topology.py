"""The published stages compiled for TPU slices, without a TPU: what `gaze-jax topology` says of each.

    python -m benchmarks.topology --json=benchmarks/results/topology.json [--only=SUBSTRING]

Needs the extra tpu-aot. A program takes one to three minutes; the file is written after each command.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import timing

CASES = (
    ("configs/cambrian_video.py:4b", "v5e:16x16", 4, 64, 256, ""),
    ("configs/cambrian_video.py:4b", "v5p:4x4x8", 2, 64, 128, "--nodense_row"),
    ("configs/cambrian_video.py:4b", "v6e:16x16", 4, 64, 256, "--nodense_row"),
    ("configs/cambrian_video.py:4b", "v5e:2x4", 1, 8, 8, "--nodense_row"),
    ("configs/cambrian_video.py:7b", "v5e:16x16", 4, 64, 256, "--nodense_row"),
    ("configs/cambrian_image.py:4b", "v5e:16x16", 4, 64, 256, "--nodense_row"),
)
"""Config, topology, mesh.data, mesh.fsdp, batch_size, and another flag."""


def run(case: tuple[str, str, int, int, int, str], folder: Path) -> list[dict[str, Any]]:
    """The rows of one command, which prints its table."""
    config, topology, data, fsdp, batch, flag = case
    path = folder / "rows.json"
    command = [sys.executable, "-m", "gaze_jax", "topology", f"--config={config}"]
    command += [f"--topology={topology}", f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}"]
    command += [f"--config.batch_size={batch}", f"--json={path}", *([flag] if flag else [])]
    status = subprocess.run(command, check=False).returncode
    if status > 1:
        raise SystemExit(f"{' '.join(command)} ended with status {status}.")
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose config or topology has this in it")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if args.only in f"{case[0]} {case[1]}":
                rows += run(case, Path(folder))
                timing.write(args.json, timing.report("benchmarks.topology", argv, rows))


if __name__ == "__main__":
    main()
