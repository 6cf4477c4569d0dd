"""Metrics of a run: rows of metrics.jsonl, which a resumed run continues, and the progress line."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gaze_jax.data.placement import Arrays
from gaze_jax.errors import UserError
from gaze_jax.train.pipeline import Batches
from gaze_jax.writing import write_text

FILE = "metrics.jsonl"

Row = dict[str, float]


def keep_until(path: Path, step: int) -> None:
    """Drop the rows after ``step``, and an incomplete last line of a killed run."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] > step:
            break
        kept.append(line + "\n")
    write_text(path, "".join(kept))


def append(path: Path, row: Mapping[str, object]) -> None:
    """Append one row. It must hold nothing that differs between two equal runs, such as a time."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def mean(rows: list[Row]) -> Row:
    """Mean of each metric over steps; for "lr", the last value."""
    means = {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return means | {"lr": rows[-1]["lr"]}


def check_finite(rows: list[Row], last_step: int, workdir: Path) -> None:
    """Stop at the first step whose loss, gradient or new parameters are not finite.

    Args:
      rows: metrics of consecutive steps.
      last_step: number of the last of these steps, counted from 1.
      workdir: named in the error message.

    Raises:
      UserError: a metric is not finite; the message names the step and what to try.
    """
    for step, row in enumerate(rows, last_step - len(rows) + 1):
        for name in ("loss", "grad_norm", "param_norm"):
            if not math.isfinite(row[name]):
                raise UserError(
                    f"Training stopped at step {step}: {name} is {row[name]}. This step was not saved and "
                    f"the checkpoints in {workdir} are sound; lower optimizer.learning_rate, set "
                    "optimizer.clip_norm, or lengthen optimizer.warmup_steps."
                )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """Speed and remaining time of a run, measured since this process started.

    Tokens, padding and waiting are of the time since the line before.
    """

    def __init__(self, step: int, steps: int, processes: int = 1):
        self._began, self._first, self._steps, self._processes = time.monotonic(), step, steps, processes
        self._since, self._tokens, self._slots, self._waited = self._began, 0, 0, 0.0

    def take(self, batches: Batches) -> Arrays:
        """The next batch of this process; notes how long it took, and how much of it is tokens."""
        start = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - start
        for name in ("visual_src", "text_segment"):
            self._tokens += int(np.count_nonzero(np.asarray(batch[name]) >= 0))
            self._slots += batch[name].size
        return batch

    def line(self, step: int, row: Row, regions: int | None) -> str:
        """Format the progress line at ``step``; ``regions``: of every sample, None if they differ."""
        of = "" if regions is None else f" of {regions}"
        now = time.monotonic()
        speed = (step - self._first) / max(now - self._began, 1e-9)
        elapsed = max(now - self._since, 1e-9)
        tokens = self._tokens * self._processes / elapsed
        padding, waiting = 1 - self._tokens / max(self._slots, 1), self._waited / elapsed
        self._since, self._tokens, self._slots, self._waited = now, 0, 0, 0.0
        return (
            f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {row['loss']:.4f}  "
            f"accuracy {row['accuracy']:.3f}  lr {row['lr']:.2e}  top_k {row['top_k']:.1f}{of}  "
            f"visual entries {row['visual_entries']:.1f}  {speed:.2f} steps/s  {tokens:,.0f} tokens/s  "
            f"padding {padding:.0%}  waiting for data {waiting:.0%}  "
            f"ETA {_clock((self._steps - step) / speed)}"
        )
