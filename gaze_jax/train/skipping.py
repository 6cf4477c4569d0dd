"""Steps whose loss or gradient is not finite: no update is made, and after some in a row the run ends."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float32, Int, PyTree

from gaze_jax.errors import NotFiniteError
from gaze_jax.train.config import Experiment
from gaze_jax.train.losses import Batch, Metrics

Array = jax.Array

_NAMED = 8
"""Most samples that a message names."""


def verdict(
    loss: Float32[Array, ""], grad_norm: Float32[Array, ""], row_losses: Float32[Array, " rows"]
) -> Float32[Array, ""]:
    """Whether a step's update is left out, as one number for the host.

    A finite norm has finite squares of all gradients, so no moment of an optimizer overflows.

    Args:
      loss, grad_norm: of the batch.
      row_losses: of each row, or sums of those of the rows that take turns there.

    Returns:
      0: no; -1: yes; 1 + i: yes, and ``row_losses[i]`` is not finite while others are.
    """
    bad = ~jnp.isfinite(row_losses)
    row = jnp.where(jnp.any(bad) & ~jnp.all(bad), jnp.argmax(bad).astype(jnp.int32) + 1, -1)
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    return jnp.where(good, 0, row).astype(jnp.float32)


def kept(good: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """``new`` after a good step, else ``old``."""
    return jax.tree.map(lambda one, other: jnp.where(good, one, other), new, old)


def updates_done(opt_state: PyTree) -> Int[Array, ""]:
    """Updates that an optimizer has made, int32 scalar; the schedule of its learning rate counts them."""
    return optax.tree.get_all_with_path(opt_state, "count")[0][1]


class SkippedSteps:
    """Watches a run for steps that were left out; all processes call it together."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        report: Callable[[str], None],
        done: int,
        in_a_row: int,
    ):
        """Begin, or go on.

        Args:
          experiment: of the run, which says how many in a row end it.
          workdir: for the message.
          report: takes a line for each step that is left out.
          done: steps that are done.
          in_a_row: of these, how many of the last ones were left out.
        """
        self._limit, self._parts = experiment.max_skipped, experiment.accumulate
        self._workdir, self._report = workdir, report
        self._judged, self.in_a_row = done, in_a_row
        self._samples: dict[int, Array] = {}
        self._found: list[str] = []

    def reads(self, step: int, batch: Batch) -> None:
        """Note which samples a step reads."""
        self._samples[step] = batch["sample_id"]

    def judge(self, step: int, measured: Metrics, newest: Callable[[], int | None]) -> None:
        """Count a step, whose metrics are there, unless it is counted already.

        Args:
          step: the step after the last that was judged, or that one again.
          measured: its metrics.
          newest: tells the step of the newest checkpoint.

        Raises:
          NotFiniteError: it is the last of too many in a row that were left out.
        """
        if step <= self._judged:
            return
        self._judged = step
        samples = self._samples.pop(step)
        found = int(jax.device_get(measured["skipped"]))
        if not found:
            self.in_a_row, self._found = 0, []
            return
        self.in_a_row += 1
        loss, grad_norm = (float(jax.device_get(measured[name])) for name in ("loss", "grad_norm"))
        what = f"grad_norm is {grad_norm}" if math.isfinite(loss) else f"loss is {loss}"
        ids = multihost_utils.process_allgather(samples, tiled=True)
        self._found.append(f"step {step}, {what} ({_named(np.asarray(ids), found - 1, self._parts)})")
        if self.in_a_row < self._limit:
            self._report(f"{self._found[-1]}; left out, as {self.in_a_row} in a row")
            return
        raise NotFiniteError(self._sentence(newest()))

    def _sentence(self, newest: int | None) -> str:
        where = (
            "there is no checkpoint"
            if newest is None
            else f"the newest checkpoint, of step {newest}, is sound"
        )
        again = "" if newest is None else f", or begin a new run with init_from={self._workdir}"
        return (
            f"Training stopped after {self.in_a_row} steps in a row whose update was left out (max_skipped): "
            f"{'; '.join(self._found)}; {where}. To start again comes to the same: mend or leave out "
            f"what these samples hold{again} and a lower optimizer.learning_rate or a longer warmup."
        )


def _named(ids: np.ndarray, row: int, parts: int) -> str:
    """The samples of a batch, int32 [B] or [B, S] of packed rows; ``row`` < 0 if no single row is bad."""
    if row >= 0:
        rows = ids[row * parts : (row + 1) * parts]
        which = "whose loss is not finite" if parts == 1 else "one of whose losses is not finite"
        return f"samples {_listed(rows)}, {which}"
    return f"samples {_listed(ids)}"


def _listed(ids: np.ndarray) -> str:
    each: Sequence[int] = np.unique(ids[ids >= 0]).tolist()
    more = f" and {len(each) - _NAMED} more" if len(each) > _NAMED else ""
    return ", ".join(map(str, each[:_NAMED])) + more
