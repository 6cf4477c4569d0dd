"""Where the time of a run goes: timing.jsonl, speed, utilisation, goodput, and the progress line.

metrics.jsonl holds nothing that differs between two equal runs, so times are in a file of their own.
"""

import contextlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from gaze_jax.data.placement import Arrays
from gaze_jax.train.metrics import Row, append
from gaze_jax.train.pipeline import Batches
from gaze_jax.writing import write_text

FILE = "timing.jsonl"

PARTS = ("start", "compile", "wait", "save", "evaluate")
"""What a run's time is spent in besides steps."""

SPEEDS = ("steps_per_s", "samples_per_s", "tokens_per_s", "padding", "waiting", "goodput", "mfu")
"""Fields of a row that are computed from the others."""


def _read(path: Path) -> list[Row]:
    """The rows of earlier processes; the incomplete line of a killed one is taken out of the file."""
    if not path.exists():
        return []
    rows, whole = [], True
    text = path.read_text(encoding="utf-8")
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            whole = False
    if not whole or not text.endswith("\n"):
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def kept_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of timing.jsonl of steps that no restart has repeated, without those of the starts.

    A row with "start" discards the steps after that one.
    """
    kept: list[Row] = []
    for row in rows:
        if "start" in row:
            kept = [each for each in kept if each["step"] <= row["start"]]
        else:
            kept.append(row)
    return kept


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _samples(batch: Arrays) -> int:
    """Samples of a batch whose rows may hold several: their segments are numbered from 0 in each row."""
    return int(np.sum(np.max(batch["text_segment"], axis=1, initial=-1) + 1))


def _sums() -> defaultdict[str, float]:
    return defaultdict(float)


class Stopwatch:
    """Splits the time of a run into steps and :data:`PARTS`, and counts what the steps got done.

    *Training seconds* are those of steps, of waiting for data and of saving. Speeds, padding, waiting and
    model FLOPs utilisation are over the training seconds since the row, or the line, before. Utilisation is
    the model's FLOPs over what all chips could do in that time at their stated peak. Goodput is the seconds
    of steps that were kept over the wall-clock seconds since the run's first start, restarts and the time
    between them included.
    """

    def __init__(
        self,
        path: Path | None,
        first: int,
        steps: int,
        *,
        processes: int = 1,
        peak: float | None = None,
        began: float | None = None,
    ):
        """Begin, or go on.

        Args:
          path: the file of rows; None writes none and knows no earlier ones.
          first: steps that are done.
          steps: steps of the run.
          processes: how many make batches; only one of them has a stopwatch's file.
          peak: FLOPs per second of all chips together; None if it is not known.
          began: when this process began, in seconds of ``time.time()``; None is now.
        """
        self._path, self._steps, self._processes, self._peak = path, steps, processes, peak
        self._first = self._last = first
        rows = [] if path is None else _read(path)
        start: Row = {"start": first, "time": time.time() if began is None else began}
        if path is not None:
            append(path, start)
        self._origin = rows[0]["time"] if rows else start["time"]
        self._kept = math.fsum(row["step_s"] for row in kept_rows([*rows, start]))
        self._since = time.monotonic()
        # Sums since the row before, over this process, and since the line before.
        self._counts, self._all, self._recent = _sums(), _sums(), _sums()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context whose time is that of one of :data:`PARTS`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._counts[f"{name}_s"] += time.monotonic() - start

    def take(self, batches: Batches, busy: Callable[[], bool] = lambda: False) -> Arrays:
        """The next batch of this process; notes how long it took, and how much of it is tokens.

        Args:
          batches: the run's.
          busy: whether the devices still compute; if they do when the batch is there, nothing has waited.
        """
        start = time.monotonic()
        batch = next(batches)
        if not busy():
            self._counts["wait_s"] += time.monotonic() - start
        for name in ("visual_src", "text_segment"):
            self._counts["tokens"] += int(np.count_nonzero(np.asarray(batch[name]) >= 0)) * self._processes
            self._counts["slots"] += batch[name].size * self._processes
        self._counts["samples"] += _samples(batch) * self._processes
        return batch

    def count(self, flops: float | None) -> None:
        """Note a step and its model FLOPs."""
        self._counts["flops"] += flops or 0

    def row(self, step: int) -> Row:
        """End a stretch of time after ``step``, whose result is there, and write its row."""
        now = time.monotonic()
        elapsed, self._since = now - self._since, now
        counts, self._counts = self._counts, _sums()
        spent = {f"{name}_s": counts[f"{name}_s"] for name in PARTS}
        counts["step_s"] = max(elapsed - math.fsum(spent.values()), 0.0)
        counts["steps"], self._last = step - self._last, step
        self._kept += counts["step_s"]
        for sums in (self._all, self._recent):
            for name, amount in counts.items():
                sums[name] += amount
        found: Row = {
            "step": step,
            "time": time.time(),
            "steps": counts["steps"],
            "step_s": counts["step_s"],
            **spent,
            **self._speeds(counts),
        }
        if self._path is not None:
            append(self._path, found)
        return found

    def _speeds(self, counts: Mapping[str, float]) -> Row:
        """What was done in a stretch of time; empty if it has no step."""
        if not counts["steps"]:
            return {}
        seconds = max(counts["step_s"] + counts["wait_s"] + counts["save_s"], 1e-9)
        speeds = {f"{name}_per_s": counts[name] / seconds for name in ("steps", "samples", "tokens")}
        speeds |= {
            "padding": 1 - counts["tokens"] / max(counts["slots"], 1),
            "waiting": counts["wait_s"] / seconds,
            "goodput": self._kept / max(time.time() - self._origin, 1e-9),
        }
        if self._peak is not None:
            speeds["mfu"] = counts["flops"] / seconds / self._peak
        return speeds

    def line(self, step: int, row: Row, regions: int | None) -> str:
        """Format the progress line at ``step``, of the rows since the line before.

        Args:
          step: of the last row.
          row: of metrics.jsonl.
          regions: of every sample; None if they differ.
        """
        of = "" if regions is None else f" of {regions}"
        speeds, whole = self._speeds(self._recent), self._speeds(self._all)
        self._recent = _sums()
        names = ("step_s", "wait_s", "save_s", "evaluate_s")
        each = math.fsum(self._all[name] for name in names) / max(step - self._first, 1)
        measured = f"  {row['skipped']:.0f} left out" if "skipped" in row else ""
        if "loss" in row:
            measured += (
                f"  loss {row['loss']:.4f}  accuracy {row['accuracy']:.3f}  lr {row['lr']:.2e}  "
                f"top_k {row['top_k']:.1f}{of}  visual entries {row['visual_entries']:.1f}"
            )
        utilisation = f"  MFU {speeds['mfu']:.1%}" if "mfu" in speeds else ""
        return (
            f"step {step:>{len(str(self._steps))}}/{self._steps}{measured}  "
            f"{whole['steps_per_s']:.2f} steps/s  {speeds['samples_per_s']:,.1f} samples/s  "
            f"{speeds['tokens_per_s']:,.0f} tokens/s{utilisation}  "
            f"padding {speeds['padding']:.0%}  waiting for data {speeds['waiting']:.0%}  "
            f"goodput {speeds['goodput']:.0%}  ETA {_clock((self._steps - step) * each)}"
        )
