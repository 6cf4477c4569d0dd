"""The training loop: batches in, checkpoints and metrics out; it can be killed and restarted at any time."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from gaze_jax.corpora.digits import DigitsConfig
from gaze_jax.parallel import rules
from gaze_jax.parallel.mesh import make_mesh
from gaze_jax.train import (
    checkpoint,
    evaluation,
    lock,
    lora,
    metrics,
    profiling,
    stopping,
    tensorboard,
    timing,
)
from gaze_jax.train.config import Experiment, profiled
from gaze_jax.train.corpus import Progress, no_progress
from gaze_jax.train.evaluation import Evaluated, Evaluator, OnEvaluation
from gaze_jax.train.losses import Batch, Metrics
from gaze_jax.train.pipeline import Batches, RunData, open_data
from gaze_jax.train.recompiles import Recompiles
from gaze_jax.train.skipping import SkippedSteps
from gaze_jax.train.start import Start, check_start, initial_params
from gaze_jax.train.step import (
    TrainState,
    averaged_params,
    check_mesh,
    compile_step,
    init_state,
    put_batch,
)
from gaze_jax.train.teacher import Teacher, check_same, make_teacher
from gaze_jax.train.utilisation import model_flops, peak_of


def print_once(text: str) -> None:
    """Print from the first process only."""
    if jax.process_index() == 0:
        print(text, flush=True)


@dataclasses.dataclass(frozen=True)
class _Run:
    """The constant parts of a run."""

    data: RunData
    start: Start | None
    teacher: Teacher | None
    workdir: Path
    mesh: Mesh
    manager: ocp.CheckpointManager
    on_evaluation: OnEvaluation
    events: tensorboard.Events | None = None

    @property
    def experiment(self) -> Experiment:
        return self.data.experiment

    def restored(self) -> checkpoint.Restored | None:
        """The newest checkpoint; None if there is none."""
        return checkpoint.restore(self.manager, self.experiment, self.mesh, self.data.fingerprint)

    def fresh(self, batch: Batch) -> TrainState:
        """The state before the first step, whose batch may show where new parameters begin."""
        if self.start is None:
            return init_state(self.experiment, self.mesh)
        new = check_start(self.start, self.experiment.model)
        print_once(f"from {self.start.name}" + (f"; new: {', '.join(new)}" if new else ""))
        params = initial_params(self.start, self.experiment.model, self.mesh, self.experiment.seed, batch)
        return init_state(self.experiment, self.mesh, params)

    def newest(self) -> int | None:
        """The step of the newest checkpoint that is whole."""
        self.manager.wait_until_finished()
        return cast(int | None, self.manager.latest_step())

    def save(self, state: TrainState, window: list[metrics.Row], skipped_in_a_row: int) -> None:
        data = self.data
        checkpoint.save(
            self.manager,
            state,
            self.experiment,
            data.fingerprint,
            data.tokenizer,
            window,
            skipped_in_a_row,
        )

    def log(self, step: int, window: list[metrics.Row], stopwatch: timing.Stopwatch) -> None:
        row = metrics.mean(window)
        if jax.process_index() == 0:
            metrics.append(self.workdir / metrics.FILE, {"step": step, **row})
        if self.events is not None:
            self.events.training({"step": step, **row})
        alike = isinstance(self.experiment.data, DigitsConfig)
        print_once(stopwatch.line(step, row, self.experiment.model.layout.regions if alike else None))

    def evaluate(self, evaluator: Evaluator, step: int, state: TrainState) -> None:
        """Evaluate the state after ``step``, and let it be drawn."""
        params = averaged_params(state.params, state.average)
        row = {"step": step, **evaluator.measure(params)}
        trace = evaluator.trace(params)
        print_once(evaluation.line(step, row))
        if jax.process_index() == 0:
            metrics.append(self.workdir / evaluation.FILE, row)
            if self.events is not None:
                self.events.evaluation(row)
            self.on_evaluation(Evaluated(self.workdir, step, row, trace))


def train(
    experiment: Experiment,
    workdir: str | Path,
    start: Start | None = None,
    progress: Progress = no_progress,
    on_evaluation: OnEvaluation = lambda evaluated: None,
) -> bool:
    """Train to the end, starting from the newest checkpoint in ``workdir`` if there is one.

    Two runs of one experiment are bit-identical, however often either was interrupted.

    Args:
      experiment: from :func:`gaze_jax.train.config.parse`.
      workdir: gets ``checkpoints/``, ``metrics.jsonl``, ``timing.jsonl`` and ``evaluation.jsonl``, and what
        ``start`` keeps.
      start: the checkpoint that ``experiment.init_from`` names.
      progress: shows how many records of a corpus are measured.
      on_evaluation: called after each evaluation, by the first process.

    Returns:
      True if all steps are done; False if SIGTERM stopped the run, after saving.

    Raises:
      UserError: another run has the workdir, it holds a checkpoint of another config, its disk is full, the
        data cannot be used, or the loss is not finite.
    """
    began, workdir = time.time(), Path(workdir)
    mesh = make_mesh(experiment.mesh)
    check_mesh(experiment, mesh)
    if experiment.tensorboard:
        tensorboard.check()
    if start is not None:
        check_start(start, experiment.model)
    # Mistakes are found before the workdir is made.
    data = open_data(experiment, start, workdir, progress)
    with lock.only_run(workdir, print_once):
        return _train(data, workdir, start, mesh, began, on_evaluation)


def _train(
    data: RunData,
    workdir: Path,
    start: Start | None,
    mesh: Mesh,
    began: float,
    on_evaluation: OnEvaluation,
) -> bool:
    """:func:`train`, in a workdir that no other run has."""
    experiment = data.experiment
    if jax.process_index() == 0:
        for name in checkpoint.remove_unfinished(workdir):
            print_once(f"removed {name}, which a run did not write to its end")
    with (
        stopping.named(workdir),
        checkpoint.open_manager(workdir, experiment.keep_checkpoints) as manager,
        stopping.sigterm() as must_stop,
        stopping.without_lost_peers(),
    ):
        teacher = _teacher(data.experiment, start, workdir, mesh)
        run = _Run(data, start, teacher, workdir, mesh, manager, on_evaluation)
        if start is not None and jax.process_index() == 0:
            start.keep(workdir)
        for line in data.lines:
            print_once(line)
        restored = run.restored()
        first = 0 if restored is None else int(restored.state.step)
        if jax.process_index() == 0:
            metrics.keep_until(workdir / metrics.FILE, first)
            # The evaluation of this step, which a stop may have left out, is made again.
            done = first >= data.experiment.steps
            metrics.keep_until(workdir / evaluation.FILE, first if done else first - 1)
        if first >= data.experiment.steps:
            print_once(f"All {first} steps are done.")
            return True
        stopwatch = timing.Stopwatch(
            workdir / timing.FILE if jax.process_index() == 0 else None,
            first,
            data.experiment.steps,
            processes=jax.process_count(),
            peak=peak_of(mesh),
            began=began,
        )
        with (
            contextlib.closing(data.batches_from(first)) as batches,
            contextlib.closing(profiling.Profile(workdir, profiled(experiment.profile_steps))) as profile,
            contextlib.ExitStack() as stack,
        ):
            if experiment.tensorboard and jax.process_index() == 0:
                events = stack.enter_context(contextlib.closing(tensorboard.Events(workdir)))
                run = dataclasses.replace(run, events=events)
            return _steps(run, batches, restored, stopwatch, must_stop, profile)


def _teacher(experiment: Experiment, start: Start | None, workdir: Path, mesh: Mesh) -> Teacher | None:
    """The teacher of a distillation, which is the one that the run began with."""
    if experiment.objective.name != "distill":
        return None
    assert start is not None, "a distillation starts from a checkpoint"
    teacher = make_teacher(experiment, start.config, start.load(mesh), mesh)
    digests = {name: leaf["digest"] for name, leaf in checkpoint.describe(teacher.params).items()}
    check_same(digests, workdir, start.name)
    return teacher


StepFunction = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
Shapes = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The compiled steps: the plan of a corpus has one shape of batches for each of its buckets."""

    run: _Run
    stopwatch: timing.Stopwatch
    found: dict[Shapes, tuple[StepFunction, float | None]] = dataclasses.field(default_factory=dict)

    def of(self, batch: Batch) -> tuple[StepFunction, float | None]:
        """The step for batches of this shape, and its model FLOPs, if the chips' peak is known."""
        shapes = tuple(batch[name].shape for name in sorted(batch))
        if shapes not in self.found:
            start = time.monotonic()
            with self.stopwatch.part("compile"):
                run = self.run
                compiled = compile_step(run.experiment, run.mesh, batch, run.teacher)
                known = peak_of(run.mesh) is not None
                flops = float(model_flops(run.experiment, run.mesh, batch, run.teacher)) if known else None
            print_once(f"compiled the step in {time.monotonic() - start:.1f} s")
            self.found[shapes] = compiled, flops
        return self.found[shapes]


def _evaluator(run: _Run, stopwatch: timing.Stopwatch, first: int, state: TrainState) -> Evaluator | None:
    """What evaluates during the run, if anything does; it evaluates ``state`` if step ``first`` is due."""
    data, every = run.data, run.experiment.eval_every
    if data.held_out is None:
        return None
    with stopwatch.part("compile"):
        evaluator = Evaluator(data.experiment, run.mesh, data.held_out, data.tokenizer)
    if first % every == 0:
        with stopwatch.part("evaluate"):
            run.evaluate(evaluator, first, state)
    return evaluator


def _busy(measured: Metrics) -> Callable[[], bool]:
    """Whether the devices have not yet finished the step that gives these metrics."""
    return lambda: not all(value.is_ready() for value in measured.values())  # type: ignore[attr-defined]


def _began(
    run: _Run,
    batches: Batches,
    restored: checkpoint.Restored | None,
    stopwatch: timing.Stopwatch,
) -> tuple[Batch, checkpoint.Restored]:
    """The first batch, and the state before it."""
    with stopwatch.part("start"):
        # The first batch takes long, since what makes them starts; no device waits for it.
        batch = put_batch(stopwatch.take(batches, lambda: True), run.mesh)
        begun = checkpoint.Restored(run.fresh(batch), [], 0) if restored is None else restored
        jax.block_until_ready(begun.state.step)
    for line in rules.moved(run.mesh, lora.boxed_params(run.experiment.model, run.experiment.lora)):
        print_once(f"not split as usual, since the mesh does not divide it: {line}")
    print_once(
        f"{run.experiment.arm}: {sum(leaf.size for leaf in jax.tree.leaves(begun.state.params)):,} parameters"
        f" on {jax.device_count()} {jax.devices()[0].platform} device(s), from step {int(begun.state.step)}"
    )
    return batch, begun


def _steps(
    run: _Run,
    batches: Batches,
    restored: checkpoint.Restored | None,
    stopwatch: timing.Stopwatch,
    must_stop: stopping.MustStop,
    profile: profiling.Profile,
) -> bool:
    experiment = run.experiment
    batch, begun = _began(run, batches, restored, stopwatch)
    state, window = begun.state, begun.window
    compiled, first = _Steps(run, stopwatch), int(state.step)
    skipped = SkippedSteps(experiment, run.workdir, print_once, first, begun.skipped_in_a_row)
    evaluator = _evaluator(run, stopwatch, first, state)
    recompiles = Recompiles(print_once)
    # Metrics still on the device: fetching them would block every step.
    pending: list[Metrics] = []
    for step in range(first + 1, experiment.steps + 1):
        with recompiles.allowed():
            step_once, flops = compiled.of(batch)
        profile.before(step, state)
        skipped.reads(step, batch)
        # All arrays are on their devices already; an implicit transfer inside the step would be a bug.
        with jax.transfer_guard("disallow"):
            state, measured = step_once(state, batch)
        stopwatch.count(flops)
        if pending:  # a device holds the batches of two steps, never those of a whole row of metrics
            jax.block_until_ready(pending[-1])
            skipped.judge(step - 1, pending[-1], run.newest)
        pending.append(measured)
        if profile.after(step, state):
            print_once(f"steps {experiment.profile_steps} are traced: {run.workdir / profiling.FOLDER}")
        last = step == experiment.steps
        stop = must_stop(step)
        log = last or step % experiment.log_every == 0
        due = last or stop or (experiment.checkpoint_every and step % experiment.checkpoint_every == 0)
        # A stop does not wait for it; the run that goes on makes up for it.
        judged = evaluator and not (stop and not last) and (last or step % experiment.eval_every == 0)
        if log or due or judged:
            skipped.judge(step, measured, run.newest)
            fetched = [metrics.of_step(row) for row in jax.device_get(pending)]
            metrics.check_finite(fetched, step, run.workdir)
            window, pending = window + fetched, []
            spent = stopwatch.row(step)
            if run.events is not None:
                run.events.timing(spent)
        if log:
            run.log(step, window, stopwatch)
            window = []
        if evaluator and judged:
            with stopwatch.part("evaluate"), recompiles.allowed():
                run.evaluate(evaluator, step, state)
        if due:
            with stopwatch.part("save"), recompiles.allowed():
                run.save(state, window, skipped.in_a_row)
        recompiles.check(step)
        if stop and not last:
            stopwatch.row(step)
            print_once(
                f"Stopped by SIGTERM after step {step}, which is saved; run the same command to continue."
            )
            return False
        if not last:
            batch = put_batch(stopwatch.take(batches, _busy(measured)), run.mesh)
    stopwatch.row(experiment.steps)
    if summary := batches.summary():
        print_once(summary)
    return True
