"""Helpers for the benchmarks of the attention ops: shapes, paired timing, bandwidth, reports.

Imports only jax and numpy, so that they run on a machine without other packages.
"""

import argparse
import dataclasses
import datetime
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gaze_jax.parallel.mesh import describe_devices

HEADS = {"qwen3-4b": (32, 8, 128), "qwen2.5-7b": (28, 4, 128), "tiny": (4, 2, 16)}
"""Model -> query heads H, kv heads K, head dim D."""

SLOTS = 36
"""P: the paper's regions of 6 x 6 tokens."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One sequence: visual tokens in regions of :data:`SLOTS` (the last may be partial), and a budget.

    ``top_k`` None is dense attention through the op: every region, no list.
    """

    tokens: int
    regions: int
    top_k: int | None

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read "4608/128/20", or "4608/128/all" for no list.

        Raises:
          ValueError: the tokens do not fill the regions.
        """
        tokens, regions, top_k = text.split("/")
        shape = cls(int(tokens), int(regions), None if top_k == "all" else int(top_k))
        if not 0 <= shape.regions * SLOTS - shape.tokens < SLOTS:
            raise ValueError(f"shape {text}: {tokens} tokens do not fill {regions} regions of {SLOTS}.")
        return shape

    def seen(self, batch: int) -> np.ndarray:
        """bool [B, R, P]: slots that hold a token."""
        valid = np.arange(self.regions * SLOTS) < self.tokens
        return np.broadcast_to(valid.reshape(self.regions, SLOTS), (batch, self.regions, SLOTS))


def listed(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Make an argparse type: comma-separated words from ``names``."""
    known = list(names)

    def parse(text: str) -> list[str]:
        words = text.split(",")
        if unknown := [word for word in words if word not in known]:
            raise argparse.ArgumentTypeError(f"{unknown} not in {known}")
        return words

    return parse


def paired(
    competitors: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    seconds: float = float("inf"),
    least: int = 3,
    after: Callable[[Mapping[str, list[float]]], None] = lambda times: None,
) -> dict[str, list[float]]:
    """Seconds of every competitor in every round; each round runs all of them once, in a new random order.

    Disturbances of the machine affect calls of a round alike, so compare within rounds. Each measured call
    follows an unmeasured one of the same competitor, because the previous competitor leaves caches and memory
    in its own state.

    Args:
      competitors: name -> call.
      rounds: the most rounds.
      seconds: after that no further round begins, except for the first ``least``.
      after: called after each round with the times so far.
    """
    names = list(competitors)
    for name in names:
        jax.block_until_ready(competitors[name]())
    times: dict[str, list[float]] = {name: [] for name in names}
    order = np.random.default_rng(0)
    begun = time.perf_counter()
    for r in range(rounds):
        if r >= least and time.perf_counter() - begun > seconds:
            break
        for name in order.permutation(names):
            jax.block_until_ready(competitors[name]())
            start = time.perf_counter()
            jax.block_until_ready(competitors[name]())
            times[name].append(time.perf_counter() - start)
        after(times)
    return times


def quartiles(values: Iterable[float]) -> list[float]:
    """The interquartile range, as [lower, upper]."""
    return [float(x) for x in np.percentile(list(values), (25, 75))]


def ratio(times: Mapping[str, list[float]], above: str, below: str) -> dict[str, Any]:
    """Time of ``above`` divided by that of ``below``: median and quartiles of the rounds' ratios."""
    each = [a / b for a, b in zip(times[above], times[below], strict=True)]
    return {"median": statistics.median(each), "iqr": quartiles(each)}


class Reader:
    """Measures read bandwidth: reads ``nbytes`` by summing rows of 128 floats.

    It runs as a competitor like the others, so that disturbances affect it equally.
    """

    def __init__(self, nbytes: int):
        rows = max(nbytes // 512, 1)
        self.nbytes = rows * 512
        self._array = jnp.ones((rows, 128), jnp.float32)
        self._sum = jax.jit(lambda x: jnp.sum(x, axis=-1))

    def __call__(self) -> Any:
        return self._sum(self._array)

    def bandwidth(self, times: list[float]) -> float:
        """Bytes per second."""
        return self.nbytes / statistics.median(times)


def free_memory() -> int:
    """Bytes available for arrays on the first device, with a fifth reserved for temporaries."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats["bytes_in_use"]
    else:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return int(free * 0.8)


def top_regions(rng: np.random.Generator, top_k: int, regions: int, lead: tuple[int, ...]) -> np.ndarray:
    """int32 [*lead, top_k]: the top_k of random scores, drawn independently for every entry."""
    scores = rng.random((*lead, regions), dtype=np.float32)
    if top_k >= regions:
        return np.argsort(scores, axis=-1).astype(np.int32)
    return np.argpartition(-scores, top_k, axis=-1)[..., :top_k].astype(np.int32)


def skipped(row: dict[str, Any], reason: str) -> dict[str, Any]:
    """Make and print the row of a combination that did not run, with the reason."""
    row = {**row, "skipped": reason}
    print("skipped:", ", ".join(f"{k}={v}" for k, v in row.items() if not isinstance(v, dict)), flush=True)
    return row


def report(module: str, argv: list[str] | None, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The content of the JSON file: rows, and the machine and versions they were measured with."""
    import jaxlib

    return {
        "date": datetime.date.today().isoformat(),
        "device": describe_devices(),
        "command": shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)]),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "numpy": np.__version__,
        },
        **more,
        "rows": rows,
    }


def write(path: str | None, result: dict[str, Any]) -> None:
    if path is not None:
        Path(path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
