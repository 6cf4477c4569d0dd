"""Teach trained dense models of the digit scenes Gaze: by distillation, and by next tokens.

    python -m benchmarks.gazify --teachers runs/dense-0 runs/dense-1 runs/dense-2 [--json=FILE]

A teacher is a run of ``gaze-jax train --config=digits --config.arm=dense --config.seed=N``. Every student
starts from its teacher with a new context token, so step 0 is Gaze without training. Measured on test scenes
that no run has seen, teacher-forced: the KL divergence of the next-token distributions from the dense
teacher's, the accuracy with Gaze, and that of the same parameters attended to densely. Means over teachers
with 95 % intervals.
"""

import argparse
import contextlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.digits import summary
from configs import digits
from gaze_jax.convert.origin import open_start
from gaze_jax.corpora.digits import DigitScenes, DigitsConfig, sequence_lengths
from gaze_jax.corpora.phrases import build_tokenizer
from gaze_jax.data.pipeline import Bucket, PipelineConfig, training_iterator
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train.config import Experiment, parse
from gaze_jax.train.losses import Batch, Metrics, distillation_loss, next_token_loss
from gaze_jax.train.pipeline import make_processor, open_data
from gaze_jax.train.start import Start, initial_params
from gaze_jax.train.step import TrainState, compile_step, init_state, put_batch
from gaze_jax.train.teacher import Teacher, make_teacher

OBJECTIVES = {"distill": 1.0, "next_token": 0.0}
"""Name of an objective -> its region_weight."""

_TEST_SEED = 20_260_103
"""Not the seed of any training run."""


def experiment_of(teacher: Path, objective: str, top_k: int, args: argparse.Namespace) -> Experiment:
    """A run that starts from a teacher: Gaze from the first step on, at a fifth of the digits' rates."""
    config = digits.get_config()
    config.init_from = str(teacher)
    config.seed = 1000
    config.steps, config.batch_size = max(args.steps), args.batch_size
    config.model.gaze.top_k = top_k
    config.objective.name, config.objective.region_weight = objective, OBJECTIVES[objective]
    config.schedule.dense_until = config.schedule.sparse_from = 0.0
    config.optimizer.learning_rate, config.optimizer.adam_learning_rate = 1e-3, 6e-4
    config.optimizer.warmup_steps = 1
    return parse(config)


def scenes_of(experiment: Experiment, count: int) -> list[dict[str, np.ndarray]]:
    """``count`` batches of test scenes, the same for every run."""
    assert isinstance(experiment.data, DigitsConfig)
    layout = experiment.model.layout
    longest = sequence_lengths(experiment.data, build_tokenizer()).sample
    bucket = Bucket(regions=layout.regions, text=longest + layout.context_tokens, images=1)
    source = DigitScenes(experiment.data, _TEST_SEED, "test")
    config = PipelineConfig(batch_size=32, seed=0, bucket=bucket)
    with contextlib.closing(
        training_iterator(source, make_processor(experiment), config, stop=count)
    ) as batches:
        return list(itertools.islice(batches, count))


Measure = Callable[[TrainState], dict[str, float]]


def measure_of(experiment: Experiment, teacher: Teacher, batches: list[Batch]) -> Measure:
    """A function that measures parameters on test scenes."""
    model = experiment.model
    assert model.gaze.top_k is not None, "a student selects"
    fraction = jnp.float32(model.gaze.top_k / model.layout.regions)

    @jax.jit
    def both(params: Any, batch: Batch, teacher: Teacher) -> tuple[Metrics, Metrics]:
        routed = distillation_loss(params, batch, fraction, model, teacher, 1.0)[1]
        return routed, next_token_loss(params, batch, None, model)[1]

    def measure(state: TrainState) -> dict[str, float]:
        found = jax.device_get([both(state.params, batch, teacher) for batch in batches])
        names = ("kl", "region_kl", "accuracy")
        means = {name: float(np.mean([routed[name] for routed, _ in found])) for name in names}
        return means | {"dense_accuracy": float(np.mean([dense["accuracy"] for _, dense in found]))}

    return measure


def train(experiment: Experiment, start: Start, args: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Train once; what was measured, by step."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    teacher = make_teacher(experiment, start.config, start.load(mesh), mesh)
    measure = measure_of(
        experiment, teacher, [put_batch(each, mesh) for each in scenes_of(experiment, args.test_batches)]
    )
    data = open_data(experiment, start, Path("/nonexistent"))
    rows = {}
    with contextlib.closing(data.batches_from(0)) as batches:
        batch = put_batch(next(batches), mesh)
        params = initial_params(start, experiment.model, mesh, experiment.seed, batch)
        state = init_state(experiment, mesh, params)
        taught = teacher if experiment.objective.name == "distill" else None
        step_once = compile_step(experiment, mesh, batch, taught)
        for step in range(experiment.steps + 1):
            if step in args.steps:
                rows[step] = measure(state)
            if step == experiment.steps:
                return rows
            state, _ = step_once(state, batch)
            if step + 1 < experiment.steps:
                batch = put_batch(next(batches), mesh)
    raise AssertionError("the loop returns at its last step")


def gather(found: dict[tuple[str, int], list[dict[int, dict[str, float]]]]) -> list[dict[str, Any]]:
    """A row for every objective, number of regions and step: means over teachers."""
    rows = []
    for (objective, top_k), runs in found.items():
        for step in runs[0]:
            values = {name: [run[step][name] for run in runs] for name in runs[0][step]}
            means = {
                name: summary(each, highest=np.inf if "kl" in name else 1.0) for name, each in values.items()
            }
            rows.append({"objective": objective, "top_k": top_k, "step": step} | means)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    print(f"{'objective':<11}{'regions':>8}{'step':>6}{'KL':>24}{'accuracy':>24}{'dense accuracy':>24}")
    for row in rows:
        cells = [
            f"{row[name]['mean']:.4f} [{row[name]['ci'][0]:.4f}, {row[name]['ci'][1]:.4f}]"
            for name in ("kl", "accuracy", "dense_accuracy")
        ]
        print(f"{row['objective']:<11}{row['top_k']:>8}{row['step']:>6}" + "".join(f"{c:>24}" for c in cells))


def main(argv: list[str] | None = None) -> None:
    """Train every student, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--teachers", nargs="+", type=Path, required=True, help="folders of dense runs")
    parser.add_argument("--top_ks", nargs="+", type=int, default=[2, 1], help="regions of 16")
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 50, 200, 500], help="when to measure")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--test_batches", type=int, default=8, help="of 32 scenes")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/gazify.json"))
    args = parser.parse_args(argv)
    if len(args.teachers) < 2:
        parser.error("an interval needs at least two teachers")
    found: dict[tuple[str, int], list[dict[int, dict[str, float]]]] = {}
    for top_k, teacher, objective in itertools.product(args.top_ks, args.teachers, OBJECTIVES):
        experiment = experiment_of(teacher, objective, top_k, args)
        measured = train(experiment, open_start(str(teacher)), args)
        print(objective, teacher, f"{top_k} regions", json.dumps(measured[experiment.steps]), flush=True)
        found.setdefault((objective, top_k), []).append(measured)
    rows = gather(found)
    show(rows)
    settings = {"batch_size": args.batch_size, "test_scenes": 32 * args.test_batches}
    timing.write(str(args.json), timing.report("benchmarks.gazify", argv, rows, **settings))


if __name__ == "__main__":
    main()
