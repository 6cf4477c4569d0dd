"""The published stages compiled for TPU slices, without a TPU: what `gaze-jax topology` says of each.

    python -m benchmarks.topology --json=benchmarks/results/topology.json [--only=SUBSTRING]

Needs the extra tpu-aot. A program takes one to three minutes; the file is written after each command.
"""

import argparse
import dataclasses
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import timing
from gaze_jax.parallel.mesh import AXES

VIDEO, IMAGE = "configs/cambrian_video.py", "configs/cambrian_image.py"
FRAMES_64 = ("row.regions=1024", "row.images=64", "max_frames=64")
FRAMES_128 = ("row.regions=2048", "row.images=128", "max_frames=128")
# 1,050,624 visual tokens; the text stream holds eight context tokens of each frame and the conversation.
FRAMES_1824 = ("row.regions=29184", "row.images=1824", "max_frames=1824", "row.text=16384")
DECODE = ("--nodense_row", "--program=decode", "--config.model.gaze.decode_implementation=tpu")
DECODE += ("--config.model.param_dtype=bfloat16",)


@dataclasses.dataclass(frozen=True)
class Case:
    """One command.

    Attributes:
      config, topology: its flags.
      mesh: sizes of data, fsdp, tensor and context.
      batch_size: rows of a step.
      data: changes of the config's data.
      flags: other flags.
    """

    config: str
    topology: str
    mesh: tuple[int, int, int, int]
    batch_size: int
    data: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """The words after ``gaze-jax topology``."""
        sizes = zip(AXES, self.mesh, strict=True)
        words = [f"--config={self.config}", f"--topology={self.topology}"]
        words += [f"--config.mesh.{name}={size}" for name, size in sizes if size > 1 or name != "context"]
        words += [f"--config.batch_size={self.batch_size}", *(f"--config.data.{each}" for each in self.data)]
        return [*words, *self.flags]


CASES = (
    Case(f"{VIDEO}:4b", "v5e:16x16", (4, 64, 1, 1), 256),
    Case(f"{VIDEO}:4b", "v5p:4x4x8", (2, 64, 1, 1), 128),
    Case(f"{VIDEO}:4b", "v6e:16x16", (4, 64, 1, 1), 256),
    Case(f"{VIDEO}:4b", "v5e:2x4", (1, 8, 1, 1), 8),
    Case(f"{VIDEO}:4b", "v5e:16x16", (8, 32, 1, 1), 256),
    Case(f"{VIDEO}:4b", "v5e:16x16", (4, 16, 4, 1), 64),
    Case(f"{VIDEO}:4b", "v5e:16x16", (4, 64, 1, 1), 256, flags=("--effort=0",)),
    Case(f"{VIDEO}:4b", "v5p:4x4x8", (2, 64, 1, 1), 128, FRAMES_128),
    Case(f"{VIDEO}:4b", "v6e:16x16", (4, 64, 1, 1), 256, FRAMES_128),
    # A v5e is too small for such a sample: four chips share one.
    Case(f"{VIDEO}:4b", "v5e:16x16", (4, 16, 1, 4), 64, FRAMES_128),
    Case(f"{VIDEO}:4b", "v5e:4x4", (1, 1, 1, 16), 1, FRAMES_64),
    Case(f"{VIDEO}:4b", "v5e:4x4", (1, 16, 1, 1), 16, FRAMES_64),
    Case(f"{VIDEO}:4b", "v5p:4x4x4", (1, 1, 1, 64), 1, FRAMES_64),
    Case(f"{VIDEO}:4b", "v5p:4x4x4", (1, 64, 1, 1), 64, FRAMES_64),
    Case(f"{VIDEO}:4b", "v5e:4x4", (1, 1, 1, 16), 1, FRAMES_1824, DECODE),
    Case(
        f"{VIDEO}:4b",
        "v5e:2x4",
        (1, 1, 1, 8),
        1,
        FRAMES_1824,
        (*DECODE, "--config.model.gaze.visual_dtype=int8"),
    ),
    Case(f"{VIDEO}:7b", "v5e:16x16", (4, 64, 1, 1), 256),
    Case(f"{VIDEO}:7b", "v5p:4x4x8", (2, 64, 1, 1), 128),
    Case(f"{VIDEO}:7b", "v6e:16x16", (4, 64, 1, 1), 256),
    Case(f"{IMAGE}:4b", "v5e:16x16", (4, 64, 1, 1), 256),
    Case(f"{IMAGE}:4b", "v5p:4x4x8", (2, 64, 1, 1), 128),
    Case(f"{IMAGE}:4b", "v6e:16x16", (4, 64, 1, 1), 256),
    Case(f"{IMAGE}:7b", "v5e:16x16", (4, 64, 1, 1), 256),
    Case(f"{IMAGE}:7b", "v5p:4x4x8", (2, 64, 1, 1), 128),
    Case(f"{IMAGE}:7b", "v6e:16x16", (4, 64, 1, 1), 256),
    # The fewest chips of each kind that hold the step.
    Case(f"{IMAGE}:4b", "v5e:2x4", (1, 8, 1, 1), 8),
    Case(f"{IMAGE}:4b", "v5p:2x2x1", (1, 4, 1, 1), 4),
    Case(f"{IMAGE}:4b", "v6e:2x2", (1, 4, 1, 1), 4),
    Case(f"{IMAGE}:7b", "v5e:4x4", (1, 16, 1, 1), 16),
    Case(f"{IMAGE}:7b", "v5p:2x2x1", (1, 4, 1, 1), 4),
    Case(f"{IMAGE}:7b", "v6e:2x4", (1, 8, 1, 1), 8),
    Case(f"{VIDEO}:4b", "v5p:2x2x1", (1, 4, 1, 1), 4),
    Case(f"{VIDEO}:4b", "v6e:2x2", (1, 4, 1, 1), 4),
    Case(f"{VIDEO}:7b", "v5e:4x4", (1, 16, 1, 1), 16),
    Case(f"{VIDEO}:7b", "v5p:2x2x1", (1, 4, 1, 1), 4),
    Case(f"{VIDEO}:7b", "v6e:2x4", (1, 8, 1, 1), 8),
    Case(f"{VIDEO}:4b", "v5e:2x4", (1, 1, 1, 8), 1, FRAMES_128),
    Case(f"{VIDEO}:4b", "v5p:2x2x1", (1, 4, 1, 1), 4, FRAMES_128),
    Case(f"{VIDEO}:4b", "v6e:2x4", (1, 2, 1, 4), 2, FRAMES_128),
    Case(f"{VIDEO}:7b", "v5e:16x16", (4, 16, 1, 4), 64, FRAMES_128),
    Case(f"{VIDEO}:7b", "v5p:4x4x8", (2, 64, 1, 1), 128, FRAMES_128),
    Case(f"{VIDEO}:7b", "v6e:16x16", (4, 32, 1, 2), 128, FRAMES_128),
    Case(f"{VIDEO}:7b", "v5e:4x4", (1, 1, 1, 16), 1, FRAMES_128),
    Case(f"{VIDEO}:7b", "v5p:2x2x1", (1, 4, 1, 1), 4, FRAMES_128),
    Case(f"{VIDEO}:7b", "v6e:2x4", (1, 2, 1, 4), 2, FRAMES_128),
)


def run(case: Case, folder: Path) -> list[dict[str, Any]]:
    """The rows of one command, which prints its table."""
    path = folder / "rows.json"
    command = [sys.executable, "-m", "gaze_jax", "topology", *case.command]
    status = subprocess.run([*command, f"--json={path}"], check=False).returncode
    if status > 1:
        raise SystemExit(f"{' '.join(command)} ended with status {status}.")
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    today = datetime.date.today().isoformat()
    return [row | {"flags": case.command, "date": today} for row in rows]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose flags have this in them; other rows stay")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args(argv)
    old: list[dict[str, Any]] = []
    if args.only and args.json is not None and args.json.exists():
        old = json.loads(args.json.read_text(encoding="utf-8"))["rows"]
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if args.only in " ".join(case.command):
                old = [row for row in old if row["flags"] != case.command] + run(case, Path(folder))
                report = timing.report("benchmarks.topology", argv, old)
                timing.write(None if args.json is None else str(args.json), report)


if __name__ == "__main__":
    main()
