"""gaze_prefill, forward and backward, compared with dense attention over the same keys.

python -m benchmarks.prefill --json=benchmarks/results/prefill.json

1,024 routed queries attend to their selected regions of one sequence and to its text stream. TFLOP/s count
only the products of selected pairs (for dense attention, of all pairs): 4 * D per pair and query head, 3.5
times that with the backward pass, regardless of what an implementation computes in addition or twice.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from pallas_kernels import GazeSpec, KeyPlaces, Windows, gaze_prefill
from pallas_kernels.gaze_prefill import api

Array = jax.Array

SHAPES = (
    "4608/128/13,4608/128/3,9216/256/26,9216/256/5,19980/555/55,19980/555/11,36864/1024/102,36864/1024/20,"
    "147456/4096/410,147456/4096/82"
)
QUICK = "71/2/1"
QUERIES = 1024
TEXT = 256
"""S: text and context tokens, all seen."""
PASSES = ("forward", "forward+backward")

Rival = tuple[Callable[..., Any], tuple[Array, ...], float]
"""A function, its arguments, and the keys that a query attends to."""


def useful_flops(heads: tuple[int, int, int], queries: int, attended: float, backward: bool) -> float:
    """FLOPs of q . k and weight * v per pair of query and key; a backward pass has five products, not two."""
    many, _, dim = heads
    return 4.0 * many * dim * queries * attended * (3.5 if backward else 1.0)


def passes(attend: Callable[..., Array]) -> dict[str, Callable[..., Any]]:
    """``attend(q, k..., v...)`` and its gradients, with the query as cotangent."""

    def both(*arrays: Array) -> Any:
        floats = [a for a in arrays if a.dtype != bool]
        out, pull = jax.vjp(lambda *floats: attend(*floats, *arrays[len(floats) :]), *floats)
        return out, pull(arrays[0])

    return {"forward": attend, "forward+backward": both}


def arrays_of(
    shape: timing.Shape, heads: tuple[int, int, int], queries: int, dtype: Any
) -> tuple[Array, ...]:
    """[1, Q, H, D] queries, [1, K, R, P, D] visual and [1, K, S, D] text-stream keys and values."""
    many, kv_heads, dim = heads
    visual, text = (1, kv_heads, shape.regions, timing.SLOTS, dim), (1, kv_heads, TEXT, dim)
    sizes = ((1, queries, many, dim), visual, visual, text, text)
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return tuple(jax.random.normal(key, size, dtype) for key, size in zip(keys, sizes, strict=True))


def gaze(name: str, spec: GazeSpec, shape: timing.Shape, queries: int) -> Callable[..., Array]:
    """Make ``gaze_prefill`` a function of its five arrays and ``selected``.

    The selection is an argument: XLA would spend minutes folding what is made of a constant one.
    """
    seen = shape.seen(1)
    order = np.where(seen, np.arange(seen.size).reshape(seen.shape), -1)
    places = KeyPlaces(
        visual_order=jnp.asarray(order, jnp.int32),
        region_segment=jnp.zeros((1, shape.regions), jnp.int32),
        text_order=shape.tokens + jnp.arange(TEXT, dtype=jnp.int32)[None],
        text_segment=jnp.zeros((1, TEXT), jnp.int32),
    )
    zero = jnp.zeros((1, queries), jnp.int32)
    last = jnp.full((1, queries), shape.tokens + TEXT, jnp.int32)
    windows = Windows(
        segment=zero,
        visual_lo=zero,
        visual_hi=last,
        text_lo=zero,
        text_hi=last,
        routed=jnp.ones((1, queries), bool),
    )

    def attend(*arrays: Array) -> Array:
        selected = arrays[5] if len(arrays) > 5 else None
        return gaze_prefill(*arrays[:5], windows, places, selected, spec=spec, implementation=name)

    return attend


def library(implementation: str, scale: float) -> Callable[..., Array]:
    """jax.nn.dot_product_attention over its own layout [1, N, K, D]."""

    def attend(q: Array, k: Array, v: Array) -> Array:
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation=implementation)  # type: ignore[call-overload]

    return attend


def joined(arrays: tuple[Array, ...], tokens: int) -> tuple[Array, ...]:
    """The same keys and values in one stream, [1, N, K, D]."""
    q, k, v, dk, dv = arrays

    def join(visual: Array, text: Array) -> Array:
        flat = visual.reshape(*visual.shape[:2], -1, visual.shape[-1])[:, :, :tokens]
        return jnp.swapaxes(jnp.concatenate([flat, text], axis=2), 1, 2)

    return q, join(k, dk), join(v, dv)


def rivals(
    shape: timing.Shape, heads: tuple[int, int, int], args: argparse.Namespace, rows: list[dict[str, Any]]
) -> dict[tuple[str, str, str], Rival]:
    """(implementation, select_per, pass) -> what is compared; ``rows`` gets what cannot run."""
    many, kv_heads, dim = heads
    dtype = jnp.dtype(args.dtype)
    assert shape.top_k is not None
    arrays = arrays_of(shape, heads, args.queries, dtype)
    scale = dim**-0.5
    everything = float(shape.tokens + TEXT)
    found: dict[tuple[str, str], Rival] = {}
    for name in args.impl:
        spec = GazeSpec(scale, query_block=args.query_block)
        if (reason := api.supports(name, spec)) is not None:
            rows.append(timing.skipped(describe(shape, args) | {"implementation": name}, reason))
            continue
        for select_per in args.select_per:
            lead = (1, args.queries, many if select_per == "head" else kv_heads)
            picks = timing.top_regions(np.random.default_rng(1), shape.top_k, shape.regions, lead)
            mask = np.zeros((*lead, shape.regions), bool)
            np.put_along_axis(mask, picks, True, axis=-1)
            sizes = shape.seen(1)[0].sum(-1)
            attended = float((mask * sizes).sum(-1).mean()) + TEXT
            shared = GazeSpec(scale, select_per, query_block=args.query_block)
            found[name, select_per] = (
                gaze(name, shared, shape, args.queries),
                (*arrays, jnp.asarray(mask)),
                attended,
            )
    plain = GazeSpec(scale, query_block=args.query_block)
    found["dense xla", ""] = gaze("xla", plain, shape, args.queries), arrays, everything
    one_stream = joined(arrays, shape.tokens)
    found["dense dot_product_attention", ""] = library("xla", scale), one_stream, everything
    if jax.default_backend() == "gpu" and dtype != jnp.float32:
        found["dense cudnn", ""] = library("cudnn", scale), one_stream, everything
    return {
        (name, select_per, kind): (function, inputs, attended)
        for (name, select_per), (attend, inputs, attended) in found.items()
        for kind, function in passes(attend).items()
        if kind in args.passes
    }


def describe(shape: timing.Shape, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "tokens": shape.tokens,
        "regions": shape.regions,
        "slots": timing.SLOTS,
        "top_k": shape.top_k,
        "text_stream": TEXT,
        "queries": args.queries,
        "query_block": args.query_block,
        "dtype": args.dtype,
    }


def one_problem(shape: timing.Shape, model: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per pass, implementation and select_per; those of a pass are measured in the same rounds."""
    heads = timing.HEADS[model]
    rows: list[dict[str, Any]] = []
    found = rivals(shape, heads, args, rows)
    for kind in args.passes:
        these = {label: rival for label, rival in found.items() if label[2] == kind}
        rows += one_pass(shape, model, these, args)
    return rows


def one_pass(
    shape: timing.Shape, model: str, found: Mapping[tuple[str, str, str], Rival], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row per implementation and select_per, all measured in the same rounds."""
    rows: list[dict[str, Any]] = []
    base = describe(shape, args) | {"heads": model}
    calls, facts = {}, {}
    for label, (function, inputs, attended) in found.items():
        name, select_per, kind = label
        this = base | {"implementation": name, "select_per": select_per, "pass": kind}
        compiled = jax.jit(function).lower(*inputs).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        if memory > (free := timing.free_memory()):
            text = f"temporaries of {memory / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            rows.append(timing.skipped(this | {"temporary_bytes": memory}, text))
            continue
        key = " ".join(label)
        calls[key] = functools.partial(compiled, *inputs)
        facts[key] = this | {
            "temporary_bytes": memory,
            "flops": useful_flops(timing.HEADS[model], args.queries, attended, kind != "forward"),
        }
    times = timing.paired(calls, rounds=args.rounds, seconds=args.seconds)
    for key, row in facts.items():
        median = statistics.median(times[key])
        row |= {
            "rounds": len(times[key]),
            "ms": {"median": 1e3 * median, "iqr": [1e3 * t for t in timing.quartiles(times[key])]},
            "tflops": row["flops"] / median / 1e12,
            "speedup": {
                fact["implementation"]: timing.ratio(times, other, key)
                for other, fact in facts.items()
                if fact["implementation"].startswith("dense ")
            },
        }
        print(line(row), flush=True)
        rows.append(row)
    return rows


def line(row: Mapping[str, Any]) -> str:
    """Format a row as text."""
    name = f"{row['tokens']}/{row['regions']}/{row['top_k']} {row['heads']} {row['dtype']}"
    text = f"{name:38}{row['implementation'] + ' ' + row['select_per']:28}{row['pass']:17}"
    text += (
        f"{row['ms']['median']:>10.2f} ms{row['tflops']:>9.3f} TFLOP/s{row['temporary_bytes'] / 1e6:>9.0f} MB"
    )
    return text + "".join(f"  {k[6:]} {v['median']:.2f}x" for k, v in row["speedup"].items())


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefill", description=__doc__)
    names = [name for name in api.IMPLEMENTATIONS if name != "reference"]
    on_cpu = jax.default_backend() == "cpu"
    parser.add_argument("--shapes", default=SHAPES, help="tokens/regions/top_k, comma-separated")
    parser.add_argument("--heads", type=timing.listed(timing.HEADS), default=["qwen3-4b", "qwen2.5-7b"])
    parser.add_argument("--impl", type=timing.listed(api.IMPLEMENTATIONS), default=names)
    parser.add_argument("--select_per", type=timing.listed(("head", "kv_head")), default=["head", "kv_head"])
    parser.add_argument("--passes", type=timing.listed(PASSES), default=list(PASSES))
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32" if on_cpu else "bfloat16"
    )
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--query-block", type=int, default=GazeSpec(1.0).query_block)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60.0, help="measuring time per shape and pass")
    parser.add_argument("--quick", action="store_true", help="a dry run at toy sizes")
    parser.add_argument("--json", help="write the results to this file")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(shapes=QUICK, heads=["tiny"], queries=8, query_block=4, rounds=3)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows = []
    for text in args.shapes.split(","):
        for model in args.heads:
            rows += one_problem(timing.Shape.parse(text), model, args)
    timing.write(args.json, timing.report("benchmarks.prefill", argv, rows))


if __name__ == "__main__":
    main()
