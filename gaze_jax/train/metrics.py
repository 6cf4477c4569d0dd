"""Metrics of a run: rows of metrics.jsonl, which a resumed run continues."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gaze_jax.errors import NotFiniteError
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


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of one JSON value per line; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def append(path: Path, row: Mapping[str, object]) -> None:
    """Append one row. It must hold nothing that differs between two equal runs, such as a time."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def of_step(measured: Mapping[str, Any]) -> Row:
    """What a step measured, as numbers; of one whose update was left out, that and the learning rate."""
    row = {name: float(value) for name, value in measured.items()}
    return {"skipped": 1.0, "lr": row["lr"]} if row.pop("skipped") else row


def mean(rows: list[Row]) -> Row:
    """Mean of each metric over steps; for "lr", the last value; "skipped" counts steps, if there are any.

    Steps that were left out count for nothing else; if all of them were, the row has nothing else.
    """
    done = [row for row in rows if "skipped" not in row]
    means = {name: math.fsum(row[name] for row in done) / len(done) for name in done[0]} if done else {}
    skipped = {"skipped": float(len(rows) - len(done))} if len(done) < len(rows) else {}
    return means | {"lr": rows[-1]["lr"]} | skipped


def check_finite(rows: list[Row], last_step: int, workdir: Path) -> None:
    """Stop at the first step whose update made parameters that are not finite, though its gradient was.

    Args:
      rows: metrics of consecutive steps.
      last_step: number of the last of these steps, counted from 1.
      workdir: named in the error message.

    Raises:
      NotFiniteError: the message names the step and what to try.
    """
    for step, row in enumerate(rows, last_step - len(rows) + 1):
        if not math.isfinite(norm := row.get("param_norm", 0.0)):
            raise NotFiniteError(
                f"Training stopped at step {step}: param_norm is {norm}. This step was not saved and "
                f"the checkpoints in {workdir} are sound; lower optimizer.learning_rate, set "
                "optimizer.clip_norm, or lengthen optimizer.warmup_steps, in a new workdir."
            )
