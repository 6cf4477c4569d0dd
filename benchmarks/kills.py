"""A training run that is killed (SIGKILL) at random moments of its saves, again and again, until it is done.

python -m benchmarks.kills --json=benchmarks/results/kills.json

The run is `gaze-jax train` on digit scenes, in a process of its own, that saves after every step and keeps
two checkpoints, so that most of its time is saving. Half of the kills are at a random moment, the others when
a part of a save is seen on the disk. After each kill: which part it hit, by what it left behind; whether the
newest checkpoint is no older than the last that was seen committed; and whether it loads, with every digest.
At the end the run must have the bits of one that nobody killed, and the same metrics.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from benchmarks import timing
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train import checkpoint
from gaze_jax.train.pipeline import open_data

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ["-m", "gaze_jax", "train", "--config=tests/helpers/tiny_config.py", "--config.mesh.fsdp=1"]
COMMAND += ["--config.checkpoint_every=1", "--config.log_every=4", "--config.eval.samples=2"]
KEPT = 2
PARTS = ("no save", "writing", "commit", "deletion")
"""What a kill can hit: nothing of a save; its files, not all there; all of them there,
and the folder without its name; or an older checkpoint that is being deleted."""
AIMS = (None, "writing", None, "commit", None, "deletion")
"""When a kill is sent, in turn: at a random moment, or when that part is seen on the disk."""
PATIENCE_FOR_A_PART = 10.0
"""Seconds after which a part that is not seen is hit no more, and the kill is sent."""
PATIENCE = 300.0


def start(workdir: Path, steps: int, cache: Path) -> "subprocess.Popen[str]":
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    return subprocess.Popen(
        [sys.executable, *COMMAND, f"--config.steps={steps}", f"--workdir={workdir}"],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def complete(process: "subprocess.Popen[str]") -> None:
    out, _ = process.communicate(timeout=PATIENCE)
    if process.returncode:
        raise RuntimeError(f"the run ended with status {process.returncode}:\n{out}")


def committed(workdir: Path) -> int:
    """The newest step that has its final name; 0 if none has."""
    folder = workdir / checkpoint.FOLDER
    names = os.listdir(folder) if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


def hit(workdir: Path, whole: Mapping[str, int]) -> str:
    """One of :data:`PARTS`, by what a killed run left behind.

    Args:
      workdir: of the run.
      whole: files of each item of a checkpoint that is whole.
    """
    folder = workdir / checkpoint.FOLDER
    for path in folder.iterdir():
        if path.name.endswith(checkpoint.UNFINISHED):
            there = files(path)
            missing = (there.get(name, 0) < count for name, count in whole.items() if name)
            return "writing" if any(missing) else "commit"
    steps = [path for path in folder.iterdir() if path.name.isdecimal()]
    damaged = any(files(path) != whole for path in steps)
    return "deletion" if damaged or len(steps) > KEPT else "no save"


def files(folder: Path) -> dict[str, int]:
    """Item of a checkpoint -> number of its files; the folder's own are of item ""."""
    found: Counter[str] = Counter()
    for path in folder.rglob("*"):
        if path.is_file():
            inner = path.relative_to(folder).parts
            found[inner[0].split(".")[0] if len(inner) > 1 else ""] += 1
    return dict(found)


def content(workdir: Path) -> tuple[int, Any, bytes, bytes]:
    """The newest step, a digest of each of its arrays, and the bytes of the metrics and the evaluation."""
    with checkpoint.open_manager(workdir) as manager:
        step = manager.latest_step()
        meta = checkpoint._meta(manager, step)
    rows, results = (workdir / name for name in ("metrics.jsonl", "eval.json"))
    return step, meta["leaves"], rows.read_bytes(), results.read_bytes()


def load(workdir: Path) -> int:
    """Restore the newest checkpoint as a run does, digests and all; its step."""
    experiment, _ = checkpoint.read_run(workdir)
    data = open_data(experiment, None, workdir)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with checkpoint.open_manager(workdir) as manager:
        found = checkpoint.restore(manager, experiment, mesh, data.fingerprint)
    assert found is not None
    return int(found.state.step)


def seen_part(workdir: Path, whole: Mapping[str, int]) -> str | None:
    """:func:`hit` of a run that goes on; None if files went while they were counted."""
    try:
        return hit(workdir, whole)
    except OSError:
        return None


def kill(
    workdir: Path, steps: int, cache: Path, aim: str | None, delay: float, whole: Mapping[str, int]
) -> tuple[int, bool]:
    """Let the run go on until it has saved something new, and kill it.

    Args:
      workdir, steps, cache: of the run.
      aim: kill when this part of a save is seen; None: ``delay`` seconds later.
      delay: in seconds.
      whole: as for :func:`hit`.

    Returns:
      The newest step seen committed before the kill, and whether the run was done by then.
    """
    before = committed(workdir)
    process = start(workdir, steps, cache)
    deadline = time.monotonic() + PATIENCE
    while committed(workdir) == before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    if aim is None:
        time.sleep(delay)
    deadline = time.monotonic() + PATIENCE_FOR_A_PART
    while aim and seen_part(workdir, whole) != aim and time.monotonic() < deadline:
        pass
    seen = committed(workdir)
    process.send_signal(signal.SIGKILL)
    out, _ = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL) or seen == before:
        raise RuntimeError(f"the run ended with status {process.returncode}:\n{out}")
    return seen, process.returncode == 0


def measure(kills: int, steps: int, seed: int) -> list[dict[str, Any]]:
    """A row for each kill, and one for the end."""
    rng, rows = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        whole, killed, cache = (Path(folder) / name for name in ("whole", "killed", "cache"))
        started = time.monotonic()
        complete(start(whole, steps, cache))
        print(f"{steps} steps without a kill: {time.monotonic() - started:.1f} s", flush=True)
        parts = files(whole / checkpoint.FOLDER / str(steps))
        for number in range(1, kills + 1):
            aim = AIMS[(number - 1) % len(AIMS)]
            seen, done = kill(killed, steps, cache, aim, rng.uniform(0.0, 1.5), parts)
            newest, part = committed(killed), hit(killed, parts)
            row = {
                "kill": number,
                "aim": aim or "random",
                "part": part,
                "seen": seen,
                "newest": newest,
                "loaded": load(killed),
            }
            row["kept"] = seen <= newest == row["loaded"]
            rows.append(row)
            kept = "kept" if row["kept"] else "LOST"
            print(f"kill {number:3}  at {row['aim']:9} hit {part:9} newest {newest:4}  {kept}", flush=True)
            if done:
                raise RuntimeError(f"the run was done after {number} kills; give it more --steps")
        complete(start(killed, steps, cache))
        same = content(killed) == content(whole)
        rows.append({"kill": "none", "newest": committed(killed), "same_bits": same})
    print("the end is that of the run without a kill" if same else "THE END DIFFERS", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--steps", type=int, default=150, help="of the run; each kill lets it do a few")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, within what the machine does")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args(argv)
    rows = measure(args.kills, args.steps, args.seed)
    kills = rows[:-1]
    counts = Counter(row["part"] for row in kills)
    print(", ".join(f"{counts[part]} {part}" for part in PARTS))
    total = {
        "kills": len(kills),
        "parts": {part: counts[part] for part in PARTS},
        "kept": sum(row["kept"] for row in kills),
        "same_bits": rows[-1]["same_bits"],
    }
    timing.write(args.json, timing.report("benchmarks.kills", argv, rows, total=total))
    if total["kept"] < len(kills) or not total["same_bits"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
