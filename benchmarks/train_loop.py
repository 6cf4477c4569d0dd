"""What the training loop costs beside its step, and what memory saving and restoring takes.

python -m benchmarks.train_loop --json=benchmarks/results/train_loop.json

overhead: the loop with a row of metrics every 25 steps, a checkpoint every 50 and the hand-off of batches
    from the host, over the same compiled step called in a row on batches that are on the device. Rounds of
    both alternate; a ratio is the median of the rounds'. Batches are made before: how fast they are made is
    measured by benchmarks.data_pipeline.
memory: the most memory of a process beyond what it had, while it saves or restores a state, over the bytes
    of the state. Each is a process of its own.

Nothing else may run.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import timing
from benchmarks.data_pipeline import processor_name
from configs import digits
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train import checkpoint, loop
from gaze_jax.train.config import Experiment, parse
from gaze_jax.train.pipeline import RunData, open_data
from gaze_jax.train.step import TrainState, abstract_state, compile_step, init_state, put_batch

OVERHEAD = 0.03
"""Most time of the loop beside its steps, as a fraction of theirs."""
SAVING, RESTORING = 2.0, 4.0
"""Most memory of saving beyond the state, and of restoring with the state, in sizes of the state."""

PARTS = ("overhead", "memory")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
      steps: of a run, after which it has written its last checkpoint.
      rounds: of runs, and of as many bare steps.
      megabytes: of the state that is saved and restored.
    """

    steps: int = 100
    rounds: int = 5
    megabytes: int = 1000


QUICK = Sizes(steps=4, rounds=2, megabytes=20)

Seconds = tuple[float, float]
"""On the clock, and of the processor."""


def experiment_of(sizes: Sizes, *, quick: bool = False) -> Experiment:
    """The digits config, or a small part of it."""
    config = digits.get_config()
    config.steps, config.log_every, config.checkpoint_every = sizes.steps, 25, 50
    config.optimizer.warmup_steps = 1
    if quick:
        config.optimizer.name, config.optimizer.adam_learning_rate, config.batch_size = "adamw", None, 8
        config.model.decoder.depth = config.model.vision.depth = 1
        config.log_every = config.checkpoint_every = 2
    return parse(config)


class Made:
    """Batches that were made before, in turn."""

    def __init__(self, batches: list[dict[str, np.ndarray]]):
        self._batches: Iterator[dict[str, np.ndarray]] = (each for _ in iter(int, 1) for each in batches)

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._batches)

    def close(self) -> None:
        """Nothing to stop."""

    def summary(self) -> str:
        return ""


def clocks() -> Seconds:
    times = os.times()
    return time.perf_counter(), times.user + times.system


def since(start: Seconds) -> Seconds:
    now = clocks()
    return now[0] - start[0], now[1] - start[1]


def overhead(sizes: Sizes, *, quick: bool) -> list[dict[str, Any]]:
    """Rounds of bare steps and of the loop, by the clock and by the processor's time."""
    experiment = experiment_of(sizes, quick=quick)
    mesh = make_mesh(experiment.mesh)
    data = open_data(experiment, None, Path("/nowhere"))
    batches = data.batches_from(0)
    made = [next(batches) for _ in range(min(4, sizes.steps))]
    batches.close()
    on_device = [put_batch(each, mesh) for each in made]
    step = compile_step(experiment, mesh, on_device[0])
    pairs = []
    for number in range(sizes.rounds + 1):
        state = init_state(experiment, mesh)
        jax.block_until_ready(state)
        start = clocks()
        for at in range(sizes.steps):
            state, _ = step(state, on_device[at % len(on_device)])
        jax.block_until_ready(state)
        bare = since(start)
        whole = run_of(experiment, data, made, step)
        if number:  # the first round fills caches
            pairs.append((bare, whole))
            print(f"  bare {bare[0]:.3f} s, loop {whole[0]:.3f} s", flush=True)
    rows = []
    for name, which in (("overhead, by the clock", 0), ("overhead, by the processor's time", 1)):
        ratios = [whole[which] / bare[which] - 1 for bare, whole in pairs]
        found = statistics.median(ratios)
        row = {"name": name, "value": found, "target": OVERHEAD, "met": found <= OVERHEAD, "ratios": ratios}
        row["bare_step_seconds"] = statistics.median(bare[which] for bare, _ in pairs) / sizes.steps
        rows.append(row | {"steps": sizes.steps, "checkpoint_every": experiment.checkpoint_every})
    return rows


def run_of(experiment: Experiment, data: RunData, made: list[Any], step: Any) -> Seconds:
    """A run in an empty folder, from its first step until all is written."""
    begun: list[Seconds] = []

    def timed(state: Any, batch: Any) -> Any:
        if not begun:
            jax.block_until_ready(state)
            begun.append(clocks())
        return step(state, batch)

    ready = dataclasses.replace(data, batches_from=lambda first: Made(made))
    before = loop.compile_step, loop.open_data, loop.print_once
    loop.compile_step = lambda *_: timed  # type: ignore[assignment]
    loop.open_data = lambda *_: ready  # type: ignore[assignment]
    loop.print_once = lambda text: None
    try:
        with tempfile.TemporaryDirectory() as folder:
            assert loop.train(experiment, folder)
            return since(begun[0])
    finally:
        loop.compile_step, loop.open_data, loop.print_once = before


def memory(sizes: Sizes) -> list[dict[str, Any]]:
    """Saving and restoring, each in a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for act, bound in (("save", SAVING), ("restore", RESTORING)):
            command = [
                sys.executable,
                "-m",
                "benchmarks.train_loop",
                f"--child={act}/{sizes.megabytes}/{folder}",
            ]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            ratio = (found["peak"] - found["before"]) / found["state"]
            row = {"name": f"memory, {act}", "value": ratio, "target": bound, "met": ratio <= bound}
            rows.append(row | {"state_bytes": found["state"], "before_bytes": found["before"]})
    return rows


def sized(megabytes: int) -> Experiment:
    """A run whose state has about so many bytes: parameters and AdamW's two moments, in float32."""
    config = digits.get_config()
    config.optimizer.name, config.optimizer.adam_learning_rate = "adamw", None
    config.model.decoder.mlp_dim = 1024
    config.model.decoder.width = config.model.vision.width = 256
    # A layer has three products with the MLP and, of 4 and 2 heads of 24, those of attention.
    layer = 3 * 256 * 1024 + 2 * 256 * 24 * (4 + 2)
    config.model.decoder.depth = max(1, round(megabytes * 1e6 / 12 / layer))
    return parse(config)


def random_state(experiment: Experiment, mesh: Any) -> TrainState:
    """A state of noise, which does not compress, without its initialisers."""
    rng = np.random.default_rng(0)

    def values(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.ndim == 0:
            return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        return jax.device_put(rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(values, abstract_state(experiment, mesh))


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status, such as VmRSS."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def child(act: str, megabytes: int, folder: Path) -> dict[str, int]:
    """Save a state, or restore it: memory before, the most meanwhile, and the bytes of the state."""
    experiment = sized(megabytes)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    data = open_data(experiment, None, folder)
    with checkpoint.open_manager(folder, 1) as manager:
        if act == "save":
            state = random_state(experiment, mesh)
            jax.block_until_ready(state)

            def work() -> None:
                checkpoint.save(manager, state, experiment, data.fingerprint, data.tokenizer, [])
                manager.wait_until_finished()
        else:
            state = abstract_state(experiment, mesh)

            def work() -> None:
                assert checkpoint.restore(manager, experiment, mesh, data.fingerprint) is not None

        return {
            "state": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
            **peak(work),
        }


def peak(work: Callable[[], None]) -> dict[str, int]:
    """Resident bytes before ``work``, and the most while it ran."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is from now on
    before = resident("VmRSS")
    work()
    return {"before": before, "peak": resident("VmHWM")}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="few steps and a small state: a trial of the script"
    )
    parser.add_argument("--only", type=timing.listed(PARTS), default=list(PARTS), help="some of the parts")
    parser.add_argument("--megabytes", type=int, help="of the state that is saved and restored")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args(argv)
    if args.child:
        act, megabytes, folder = args.child.split("/", 2)
        print(json.dumps(child(act, int(megabytes), Path(folder))))
        return
    sizes = QUICK if args.quick else Sizes()
    if args.megabytes:
        sizes = dataclasses.replace(sizes, megabytes=args.megabytes)
    before = os.getloadavg()[0]
    rows = []
    if "overhead" in args.only:
        rows += overhead(sizes, quick=args.quick)
    if "memory" in args.only:
        rows += memory(sizes)
    for row in rows:
        met = "met" if row["met"] else "MISSED"
        print(f"{row['name']:36} {row['value']:8.3f}  at most {row['target']:g}  {met}")
    result = timing.report("benchmarks.train_loop", argv, rows)
    timing.write(args.json, result | {"cpu": processor_name(), "load_before": before})


if __name__ == "__main__":
    main()
