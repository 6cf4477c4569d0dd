"""The training loop: batches in, checkpoints and metrics out; it can be killed and restarted at any time."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import grain
import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from gaze_jax.corpora.phrases import build_tokenizer
from gaze_jax.errors import UserError
from gaze_jax.parallel.mesh import make_mesh
from gaze_jax.train import checkpoint, metrics
from gaze_jax.train.config import Experiment
from gaze_jax.train.pipeline import make_iterator
from gaze_jax.train.step import TrainState, compile_step, init_state, put_batch
from gaze_jax.writing import full_disk


def print_once(text: str) -> None:
    """Print from the first process only."""
    if jax.process_index() == 0:
        print(text, flush=True)


@contextlib.contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """Set an event on SIGTERM, so that a preempted run can save. Works only in the main thread."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _named_if_full(workdir: Path) -> Iterator[None]:
    """Say which disk is full; Orbax raises its errors with the next save, or at the end."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or (reason := full_disk(error)) is None:
            raise
        raise UserError(
            f"{workdir} cannot be written ({reason}); free space and run the same command to go on from its "
            "newest checkpoint."
        ) from error


def _must_stop(manager: ocp.CheckpointManager, step: int, asked: threading.Event) -> bool:
    # All processes must stop at the same step; JAX's preemption service makes them agree on one.
    return asked.is_set() if jax.process_count() == 1 else manager.reached_preemption(step)


@dataclasses.dataclass(frozen=True)
class _Run:
    """The constant parts of a run."""

    experiment: Experiment
    workdir: Path
    mesh: Mesh
    iterator: grain.DatasetIterator
    fingerprint: Mapping[str, object]
    manager: ocp.CheckpointManager

    def initial(self) -> tuple[TrainState, list[metrics.Row]]:
        """Return the newest checkpoint's state and unlogged metrics, or a fresh state."""
        found = checkpoint.restore(self.manager, self.experiment, self.mesh, self.iterator, self.fingerprint)
        return (init_state(self.experiment, self.mesh), []) if found is None else (found.state, found.window)

    def save(self, state: TrainState, window: list[metrics.Row]) -> None:
        checkpoint.save(
            self.manager, state, self.iterator, self.experiment, self.fingerprint, build_tokenizer(), window
        )

    def log(self, step: int, window: list[metrics.Row], progress: metrics.Progress) -> None:
        row = metrics.mean(window)
        if jax.process_index() == 0:
            metrics.append(self.workdir / metrics.FILE, {"step": step, **row})
        print_once(progress.line(step, row, self.experiment.model.layout.regions))


def train(experiment: Experiment, workdir: str | Path) -> bool:
    """Train to the end, starting from the newest checkpoint in ``workdir`` if there is one.

    Two runs of one experiment are bit-identical, however often either was interrupted.

    Args:
      experiment: from :func:`gaze_jax.train.config.parse`.
      workdir: gets ``checkpoints/`` and ``metrics.jsonl``.

    Returns:
      True if all steps are done; False if SIGTERM stopped the run, after saving.

    Raises:
      UserError: the workdir holds a checkpoint of another config, its disk is full, or the loss is not
        finite.
    """
    workdir = Path(workdir)
    mesh = make_mesh(experiment.mesh)
    iterator, fingerprint = make_iterator(experiment)
    with (
        _named_if_full(workdir),
        contextlib.closing(iterator),  # otherwise its workers outlive the run
        checkpoint.open_manager(workdir, experiment.keep_checkpoints) as manager,
        _sigterm() as asked,
    ):
        run = _Run(experiment, workdir, mesh, iterator, fingerprint, manager)
        state, window = run.initial()
        first = int(state.step)
        print_once(
            f"{experiment.arm}: {sum(leaf.size for leaf in jax.tree.leaves(state.params)):,} parameters on "
            f"{jax.device_count()} {jax.devices()[0].platform} device(s), from step {first}"
        )
        if jax.process_index() == 0:
            metrics.keep_until(workdir / metrics.FILE, first)
        return first >= experiment.steps or _steps(run, state, window, first, asked)


def _steps(
    run: _Run, state: TrainState, window: list[metrics.Row], first: int, asked: threading.Event
) -> bool:
    experiment = run.experiment
    batch = put_batch(next(run.iterator), run.mesh)
    step_once = compile_step(experiment, run.mesh, batch)
    progress = metrics.Progress(first, experiment.steps)
    # Metrics still on the device: fetching them would block every step.
    pending: list[dict[str, jax.Array]] = []
    for step in range(first + 1, experiment.steps + 1):
        # All arrays are on their devices already; an implicit transfer inside the step would be a bug.
        with jax.transfer_guard("disallow"):
            state, measured = step_once(state, batch)
        pending.append(measured)
        last = step == experiment.steps
        stop = _must_stop(run.manager, step, asked)
        log = last or step % experiment.log_every == 0
        due = last or stop or (experiment.checkpoint_every and step % experiment.checkpoint_every == 0)
        if log or due:
            fetched = [{k: float(v) for k, v in row.items()} for row in jax.device_get(pending)]
            metrics.check_finite(fetched, step, run.workdir)
            window, pending = window + fetched, []
        if log:
            run.log(step, window, progress)
            window = []
        if due:
            run.save(state, window)
        if stop and not last:
            print_once(
                f"Stopped by SIGTERM after step {step}, which is saved; run the same command to continue."
            )
            return False
        if not last:
            batch = put_batch(next(run.iterator), run.mesh)
    return True
