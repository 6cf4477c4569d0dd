"""Tune the tiles of the GPU decode kernel and store the best for each dtype next to the kernel.

python -m benchmarks.tune_decode
    tries tiles on the GPU that JAX runs on and writes its entry of pallas_kernels/gaze_decode/gpu_tiles.json,
    and every candidate to benchmarks/results/tune_decode.json; both after each candidate, so that an
    interrupted run keeps its results.

The score of a candidate is the geometric mean, over one long and one short problem, of its time divided by
the time needed to read the bytes that it must read. A candidate whose output differs from "xla" is dropped.
"""

import argparse
import datetime
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import GazeSpec
from pallas_kernels.gaze_decode import api, tuning

_ROOT = Path(__file__).resolve().parent.parent
_RESULT = _ROOT / "benchmarks" / "results" / "tune_decode.json"

# Multiples of regions of 36 slots; tiles have a multiple of 64 rows, so these fill 1, 2, 2, 3 times 64.
_KEYS = (36, 72, 108, 180)
_STAGES = (2, 3, 4)
_BLOCKS = (132, 264, 396, 528)  # 132 multiprocessors
_SLOTS, _TEXT = 36, 256


class Problem(NamedTuple):
    """One shape: L, B, K, G, D, R and J."""

    layers: int
    batch: int
    kv_heads: int
    group: int
    dim: int
    regions: int
    top_k: int

    def floor_bytes(self, itemsize: float) -> float:
        """Bytes that a layer's step must read of the visual cache and a bfloat16 or float32 text stream."""
        visual = 2 * self.top_k * _SLOTS * self.dim * itemsize
        return self.batch * self.kv_heads * (visual + 2 * _TEXT * self.dim * max(itemsize, 2))


LONG = Problem(layers=8, batch=8, kv_heads=8, group=4, dim=128, regions=1024, top_k=102)
SHORT = Problem(layers=8, batch=1, kv_heads=8, group=4, dim=128, regions=128, top_k=13)
TINY = Problem(layers=1, batch=1, kv_heads=1, group=2, dim=64, regions=4, top_k=2)


def read_bandwidth(nbytes: int) -> float:
    """Bytes per second of summing float32 rows."""
    x = jnp.ones((nbytes // 512, 128), jnp.float32)
    return nbytes / seconds(jax.jit(lambda: jnp.sum(x, axis=-1)), least=0.0)


def seconds(run: Callable[[], Any], *, least: float) -> float:
    """Median time of five calls, each repeated to take at least ``least`` seconds."""

    def once(repeats: int) -> float:
        begun = time.perf_counter()
        for _ in range(repeats):
            out = run()
        jax.block_until_ready(out)
        return time.perf_counter() - begun

    once(1)
    repeats = max(1, math.ceil(least / once(1)))
    return statistics.median(once(repeats) / repeats for _ in range(5))


class Bench:
    """A problem's arrays, and a step over all its layers with any implementation."""

    def __init__(self, problem: Problem, dtype: str, interpret: bool) -> None:
        self.problem = problem
        self.least = 0.0 if interpret else 0.02
        kind = jnp.float32 if dtype == "float32" else jnp.bfloat16
        visual_dtype = "int8" if dtype == "int8" else None
        self.spec = GazeSpec(problem.dim**-0.5, "kv_head", visual_dtype=visual_dtype, interpret=interpret)
        layers, batch, kv_heads, group, dim, regions, top_k = problem
        keys = jax.random.split(jax.random.key(0), 5)
        visual = (layers, batch, kv_heads, regions, _SLOTS, dim)
        self.k, self.v = (jax.random.normal(key, visual, kind) for key in keys[:2])
        text = (layers, batch, kv_heads, _TEXT, dim)
        self.text = tuple(jax.random.normal(key, text, kind) for key in keys[2:4])
        self.q = jax.random.normal(keys[4], (batch, kv_heads * group, dim), kind)
        rng = np.random.default_rng(0)
        picks = rng.permuted(np.broadcast_to(np.arange(regions), (layers, batch, kv_heads, regions)), axis=-1)
        self.indices = jnp.asarray(np.sort(picks[..., :top_k]), jnp.int32)
        self.packed = api.pack(self.k, self.v, spec=self.spec, implementation="gpu")
        self.seen = (jnp.ones((batch, regions, _SLOTS), bool), jnp.ones((batch, _TEXT), bool))

    def program(self, implementation: str, spec: GazeSpec, packed: Any) -> Callable[[], jax.Array]:
        """The last layer's output; each layer's query depends on the one before, so none can overlap."""
        layers = self.problem.layers

        @jax.jit
        def run(q: jax.Array, packed: Any, text: Any, indices: jax.Array, seen: Any) -> jax.Array:
            def layer(l: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                q, _ = carry
                out = api.gaze_decode(
                    q, packed, *text, l, indices[l], *seen, spec=spec, implementation=implementation
                )
                return q + out * jnp.asarray(1e-3, q.dtype), out

            return jax.lax.fori_loop(0, layers, layer, (q, q))[1]

        return functools.partial(run, self.q, packed, self.text, self.indices, self.seen)

    @functools.cached_property
    def expected(self) -> np.ndarray:
        """The output of plain XLA over a cache that was not rounded to int8."""
        spec = GazeSpec(self.spec.scale, self.spec.select_per)
        packed = api.pack(self.k, self.v, spec=spec, implementation="xla")
        return np.asarray(self.program("xla", spec, packed)(), np.float64)

    def measure(self, bandwidth: float) -> dict[str, float]:
        """Milliseconds per layer and their ratio to the floor.

        Raises:
          ValueError: the output is wrong.
        """
        run = self.program("gpu", self.spec, self.packed)
        error = float(
            np.abs(np.asarray(run(), np.float64) - self.expected).max() / np.abs(self.expected).max()
        )
        if not error < 0.1:
            raise ValueError(f"wrong by {error}")
        took = seconds(run, least=self.least) / self.problem.layers
        floor = self.problem.floor_bytes(self.packed.k.dtype.itemsize) / bandwidth
        return {"ms": 1e3 * took, "times_floor": took / floor, "error": error}


def candidates(scores: Mapping[tuple[int, int, int], float]) -> Iterator[tuple[int, int, int]]:
    """Candidates: first keys per chunk and stages, then the number of blocks for the best of these."""
    for keys in _KEYS:
        for stages in _STAGES:
            yield keys, stages, 2 * _BLOCKS[0]
    if scores:
        keys, stages, _ = min(scores, key=lambda each: scores[each])
        for blocks in _BLOCKS:
            yield keys, stages, blocks


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def tune(dtype: str, problems: list[Problem], bandwidth: float, args: argparse.Namespace) -> None:
    """Measure candidates for one dtype until time runs out, writing after each."""
    interpret = jax.default_backend() == "cpu"
    kind = jax.devices()[0].device_kind
    benches = [Bench(problem, dtype, interpret) for problem in problems]
    scores: dict[tuple[int, int, int], float] = {}
    ends = time.monotonic() + args.seconds
    for keys, stages, blocks in candidates(scores):
        if time.monotonic() > ends:
            print(f"{dtype}: out of time", flush=True)
            break
        entry = {"keys": keys, "stages": stages, "blocks": blocks}
        row: dict[str, Any] = {"device": kind, "dtype": dtype, **entry}
        try:
            with mock.patch.object(tuning, "sizes", return_value=entry):
                found = [bench.measure(bandwidth) for bench in benches]
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            row["failed"] = str(error).splitlines()[0][:200]
        else:
            row["problems"] = [p._asdict() | f for p, f in zip(problems, found, strict=True)]
            row["score"] = statistics.geometric_mean(f["times_floor"] for f in found)
            if row["score"] < min(scores.values(), default=math.inf):
                table = json.loads(args.tiles.read_text())
                measured = {
                    "date": datetime.date.today().isoformat(),
                    "jax": jax.__version__,
                    "read_bandwidth": bandwidth,
                    "problems": row["problems"],
                }
                table.setdefault(kind, dict(table["default"]))[dtype] = entry | {"measured": measured}
                write(args.tiles, table)
            scores[keys, stages, blocks] = row["score"]
        print(row, flush=True)
        rows = json.loads(args.json.read_text()) if args.json.exists() else []
        write(args.json, [*rows, row])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_decode", description=__doc__)
    parser.add_argument("--dtypes", default="bfloat16,int8", help="comma-separated: bfloat16, int8, float32")
    parser.add_argument("--seconds", type=float, default=150.0, help="for each dtype")
    parser.add_argument("--quick", action="store_true", help="a dry run at a toy size, interpreted on a CPU")
    parser.add_argument("--json", type=Path, default=_RESULT, help="every candidate; rows are added")
    parser.add_argument("--tiles", type=Path, default=tuning.path("gpu"), help="the file to update")
    args = parser.parse_args(argv)
    bandwidth = read_bandwidth(2**20 if args.quick else 2**31)
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s", flush=True)
    for dtype in args.dtypes.split(","):
        tune(dtype, [TINY] if args.quick else [LONG, SHORT], bandwidth, args)


if __name__ == "__main__":
    main()
