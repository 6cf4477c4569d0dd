"""One decoding step of gaze_decode, compared with dense attention and with the bytes that it must read.

python -m benchmarks.decode --json=benchmarks/results/decode.json

A measured call runs the op over all layers of a stacked cache, each layer's query computed from the previous
output, repeated until the launch time is negligible; times are per layer. The bandwidth of a row's floor is
that of a large sum measured in the same rounds. A row is printed, and in the JSON, after its first round, and
refined by those that follow. Dense attention gets keys and values in its preferred layout:
an array per layer and form, no mask, both streams in one array. "routing" is scoring and top-k only, "routed"
is routing and the op in one program, for "native" in one call.
"""

import argparse
import dataclasses
import functools
import importlib.util
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.decode_rows import columns, line
from gaze_jax.core import accounting, routing
from pallas_kernels import GazeSpec
from pallas_kernels.gaze_decode import api
from pallas_kernels.gaze_decode.native import library

Array = jax.Array
Publish = Callable[[list[dict[str, Any]]], None]
"""Gets rows before they are final."""

SHAPES = (
    "4608/128/13,4608/128/20,4608/128/26,4608/128/64,4608/128/128,4608/128/all,9216/256/40,19980/555/55,"
    "36864/1024/20,36864/1024/102,36864/1024/205,36864/1024/512,36864/1024/1024,36864/1024/all,"
    "147456/4096/82,147456/4096/410,1048576/29128/583,1048576/29128/2913"
)
QUICK = "72/2/1,71/2/2"
TEXT = 256
"""S: text and context tokens."""
LAYERS = 8
EINSUMS = ("einsum keys-heads", "einsum heads-keys")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": jnp.bfloat16}
"""Option -> dtype of queries, descriptors and text stream; with int8 only the visual cache is int8."""


def floor_bytes(
    shape: timing.Shape, heads: tuple[int, int, int], batch: int, dtype: str, union: float
) -> float:
    """Bytes that one step of one layer must read: K * (b*D*R + 2*b*D*P*U + 2*b*D*S) for each sequence."""
    _, kv_heads, dim = heads
    size = jnp.dtype(DTYPES[dtype]).itemsize
    regions = None if shape.top_k is None else shape.regions
    reads = accounting.decode_floor(kv_heads, dim, size, regions, timing.SLOTS, union, TEXT)
    visual = float(reads.visual)
    if dtype == "int8":
        # A byte per element, and a float32 scale per token and side.
        visual *= (dim + 4) / (dim * size)
    return batch * (float(reads.descriptors) + visual + float(reads.text_stream))


def _chain(q: Array, out: Array) -> Array:
    """The next layer's query; it depends on the output, so layers cannot overlap."""
    return q + out * jnp.asarray(1e-3, q.dtype)


def einsum(form: str, q: Array, k: Array, v: Array, scale: float) -> Array:
    """Dense attention by einsums over [B, K, N, D]; the forms order the axes of the logits differently."""
    batch, kv_heads, _, dim = k.shape
    grouped = q.reshape(batch, kv_heads, -1, dim)
    wide: dict[str, Any] = {"preferred_element_type": jnp.float32}
    if form == "einsum keys-heads":
        logits = jnp.einsum("BKND,BKGD->BKNG", k, grouped, **wide).swapaxes(2, 3)
    else:
        logits = jnp.einsum("BKGD,BKND->BKGN", grouped, k, **wide)
    weights = jax.nn.softmax(logits * scale, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGN,BKND->BKGD", weights, v, **wide).reshape(q.shape).astype(q.dtype)


def dot_product(implementation: str, q: Array, k: Array, v: Array, scale: float) -> Array:
    """jax.nn.dot_product_attention over its own layout [B, N, K, D]."""
    out = jax.nn.dot_product_attention(q[:, None], k, v, scale=scale, implementation=implementation)  # type: ignore[arg-type]
    return out[:, 0]


def over_arrays(one: Callable[..., Array], scale: float) -> Callable[..., Array]:
    """Run ``one`` over lists of layers, ``repeats`` times."""

    def run(q: Array, repeats: Array, ks: list[Array], vs: list[Array]) -> Array:
        def once(_: Array, q: Array) -> Array:
            for k, v in zip(ks, vs, strict=True):
                q = _chain(q, one(q, k, v, scale))
            return q

        return jax.lax.fori_loop(0, repeats, once, q)

    return jax.jit(run)


def over_layers(
    name: str, spec: GazeSpec, top_k: int | None, route: bool, attend: bool
) -> Callable[..., Array]:
    """Run routing, the op, or both over a stacked cache, ``repeats`` times."""

    def run(
        q: Array,
        repeats: Array,
        packed: Any,
        text: tuple[Array, Array],
        descriptors: Array,
        indices: Array | None,
        seen: Array,
        text_seen: Array,
    ) -> Array:
        layers, batch, _, regions = descriptors.shape[:4]
        visible = jnp.ones((batch, 1, 1, regions), bool)
        permutation = jnp.broadcast_to(jnp.arange(regions, dtype=jnp.int32), (batch, regions))
        capacity = top_k or 0
        budget = jnp.full((batch, 1), capacity, jnp.int32)
        # As in a decoding step, which does this once before its layers.
        options = {"spec": spec, "implementation": name}
        options["step"] = api.masks(packed, seen, text_seen, visible[:, 0, 0], permutation, **options)

        def step(i: Array, q: Array) -> Array:
            layer = i % layers
            picks = None if indices is None else indices[layer]
            if route and attend and api.routes(name):
                selecting = (q, descriptors, budget[:, 0], visible[:, 0, 0], permutation)
                stored = (packed, *text, layer, seen, text_seen)
                found = api.route_and_decode(q, *stored, *selecting, capacity=capacity, **options)
                return _chain(q, found.out)
            if route:
                scores = routing.descriptor_scores(q[:, None], descriptors[layer], select_per=spec.select_per)
                picks = routing.select_indices(scores, visible, budget, capacity, permutation)[:, 0]
            if not attend:
                assert picks is not None
                return _chain(q, jnp.sum(picks).astype(q.dtype))
            return _chain(q, api.gaze_decode(q, packed, *text, layer, picks, seen, text_seen, **options))

        return jax.lax.fori_loop(0, layers * repeats, step, q)

    return jax.jit(run)


def torch_sdpa(q: Array, ks: list[Array], vs: list[Array], scale: float) -> Callable[[int], Any] | None:
    """torch's scaled_dot_product_attention over the same arrays; None without torch with CUDA."""
    if jax.default_backend() != "gpu" or importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    attention = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, scale=scale, enable_gqa=True
    )
    query = torch.from_dlpack(q[:, :, None])
    caches = [(torch.from_dlpack(k), torch.from_dlpack(v)) for k, v in zip(ks, vs, strict=True)]

    def run(repeats: int) -> None:
        x = query
        for _ in range(repeats):
            for k, v in caches:
                x = x + attention(x, k, v) * 1e-3
        torch.cuda.synchronize()

    return run


class Problem:
    """The arrays of one shape, batch and model, shared by all competitors."""

    def __init__(self, shape: timing.Shape, heads: tuple[int, int, int], batch: int, dtype: str, layers: int):
        many, kv_heads, dim = heads
        self.shape, self.heads, self.batch, self.dtype, self.layers = shape, heads, batch, dtype, layers
        self.scale = dim**-0.5
        keys = jax.random.split(jax.random.key(0), 2 * layers + 2)
        kind = DTYPES[dtype]
        size = (batch, kv_heads, shape.tokens + TEXT, dim)
        make = jax.jit(lambda key: jax.random.normal(key, size, kind))
        self.ks, self.vs = [make(key) for key in keys[:layers]], [make(key) for key in keys[layers:-2]]
        self.q = jax.random.normal(keys[-1], (batch, many, dim), kind)
        at = (layers, batch, kv_heads, shape.regions, dim)
        self.descriptors = jax.random.normal(keys[-2], at, kind)

    def pack(self, name: str, spec: GazeSpec) -> tuple[Any, tuple[Array, Array]]:
        """The visual cache in the layout of ``name``, and the text stream."""
        shape = self.shape
        pad = shape.regions * timing.SLOTS - shape.tokens

        def regions(arrays: list[Array]) -> Array:
            a = jnp.stack(
                [jnp.pad(a[:, :, : shape.tokens], ((0, 0),) * 2 + ((0, pad), (0, 0))) for a in arrays]
            )
            return a.reshape(*a.shape[:3], shape.regions, timing.SLOTS, a.shape[-1])

        def pack(ks: list[Array], vs: list[Array]) -> Any:
            return api.pack(regions(ks), regions(vs), spec=spec, implementation=name)

        packed = jax.jit(pack)(self.ks, self.vs)
        text = (jnp.stack([a[:, :, shape.tokens :] for a in arrays]) for arrays in (self.ks, self.vs))
        return packed, tuple(text)  # type: ignore[return-value]

    def picks(self, select_per: str) -> tuple[Array | None, float]:
        """Random selections int32 [L, B, Hs, J], and the mean size of the union over a group's heads."""
        many, kv_heads, _ = self.heads
        if self.shape.top_k is None:
            return None, float(self.shape.regions)
        selections = many if select_per == "head" else kv_heads
        lead = (self.layers, self.batch, selections)
        rng = np.random.default_rng(1)
        picks = timing.top_regions(rng, min(self.shape.top_k, self.shape.regions), self.shape.regions, lead)
        mask = np.zeros((*lead, self.shape.regions), bool)
        np.put_along_axis(mask, picks, True, axis=-1)
        union = accounting.union_over_group(jnp.asarray(mask), kv_heads)
        return jnp.asarray(picks), float(jnp.mean(union))


def layers_that_fit(
    shape: timing.Shape, heads: tuple[int, int, int], batch: int, dtype: str
) -> tuple[int, int]:
    """Number of layers, at most :data:`LAYERS`, and the bytes of one layer's keys and values.

    Four copies must fit in memory: an array per layer for each of two dense layouts, the packed cache, and
    one for packing.
    """
    _, kv_heads, dim = heads
    tokens = shape.regions * timing.SLOTS + TEXT
    layer = 2 * batch * kv_heads * tokens * dim * jnp.dtype(DTYPES[dtype]).itemsize
    return min(LAYERS, timing.free_memory() // (4 * layer)), layer


def competitors(
    problem: Problem, name: str, spec: GazeSpec, args: argparse.Namespace
) -> tuple[dict[str, Callable[[Any], Any]], dict[str, float]]:
    """All competitors of the implementation ``name``, by name; and the union for each ``select_per``."""
    ks, vs, q = problem.ks, problem.vs, problem.q
    found: dict[str, Callable[[Any], Any]] = {}
    for form in EINSUMS:
        run = over_arrays(functools.partial(einsum, form), problem.scale)
        found[form] = functools.partial(lambda run, n: run(q, n, ks, vs), run)
    own = jax.jit(lambda arrays: [jnp.swapaxes(a, 1, 2) for a in arrays])
    keys, values = own(ks), own(vs)
    library = {"dot_product_attention": "xla"}
    if jax.default_backend() == "gpu" and q.dtype != jnp.float32:
        library["cudnn"] = "cudnn"
    for label, implementation in library.items():
        run = over_arrays(functools.partial(dot_product, implementation), problem.scale)
        found[label] = functools.partial(lambda run, n: run(q, n, keys, values), run)
    if (sdpa := torch_sdpa(q, ks, vs, problem.scale)) is not None:
        found["torch"] = lambda n: sdpa(int(n))

    packed, text = problem.pack(name, spec)
    seen = jnp.asarray(problem.shape.seen(problem.batch))
    text_seen = jnp.ones((problem.batch, TEXT), bool)
    unions = {}
    top_k = problem.shape.top_k
    for select_per in args.select_per:
        shared = dataclasses.replace(spec, select_per=select_per)
        indices, unions[select_per] = problem.picks(select_per)
        rest = (packed, text, problem.descriptors, indices, seen, text_seen)
        programs = {"op": (False, True)}
        if top_k is not None:
            programs |= {"routing": (True, False), "routed": (True, True)}
        for label, (route, attend) in programs.items():
            run = over_layers(name, shared, top_k, route, attend)
            found[f"{select_per} {label}"] = functools.partial(
                lambda run, rest, n: run(q, n, *rest), run, rest
            )
    return found, unions


def repeats_for(run: Callable[[Any], Any], least: float) -> int:
    """Number of passes over the layers for a call to take ``least`` seconds."""
    once = min(timing.paired({"run": lambda: run(jnp.int32(1))}, rounds=1)["run"])
    return max(1, min(1000, math.ceil(least / once)))


def counted_bytes(name: str, run: Callable[[Any], Any], layers: int) -> float | None:
    """Bytes that the implementation says it reads per layer; None if it does not count."""
    if name != "native":
        return None
    before = library.bytes_read()
    jax.block_until_ready(run(jnp.int32(1)))
    return (library.bytes_read() - before) / layers


def measure(
    problem: Problem, name: str, spec: GazeSpec, args: argparse.Namespace, publish: Publish
) -> list[dict[str, Any]]:
    """One row per ``select_per``, published after each round."""
    found, unions = competitors(problem, name, spec, args)
    counts = {label: repeats_for(run, args.least_ms / 1e3) for label, run in found.items()}
    calls = {label: functools.partial(run, jnp.int32(counts[label])) for label, run in found.items()}
    calls["read"] = args.reader
    # The floor has the descriptors in it, so what is counted is the call that reads them, if there is one.
    call = "op" if problem.shape.top_k is None else "routed"
    read = {each: counted_bytes(name, found[f"{each} {call}"], problem.layers) for each in unions}

    def rows_of(raw: Mapping[str, list[float]]) -> list[dict[str, Any]]:
        bandwidth = args.reader.bandwidth(raw["read"])
        per = {label: [t / (n * problem.layers) for t in raw[label]] for label, n in counts.items()}
        best = min(EINSUMS, key=lambda form: statistics.median(per[form]))
        note = {} if problem.layers == LAYERS else {"note": f"{LAYERS} layers do not fit in memory"}
        base = {"layers": problem.layers, **note}
        return [
            {"select_per": each, **base, **columns(per, each, union, floor, read[each], bandwidth, best)}
            for each, union in unions.items()
            for floor in [floor_bytes(problem.shape, problem.heads, problem.batch, problem.dtype, union)]
        ]

    return rows_of(
        timing.paired(
            calls,
            rounds=args.rounds,
            seconds=args.seconds,
            least=1,
            after=lambda raw: publish(rows_of(raw)),
        )
    )


def benchmark(args: argparse.Namespace, publish: Publish) -> list[dict[str, Any]]:
    """All rows; a combination that cannot run becomes a row with the reason.

    Args:
      args: the options.
      publish: gets all rows that there are, as often as they change.
    """
    rows: list[dict[str, Any]] = []
    for text in args.shapes.split(","):
        for model in args.heads:
            for batch in args.batch:
                found = one_problem(
                    timing.Shape.parse(text), model, batch, args, lambda new: publish([*rows, *new])
                )
                rows.extend(found)
    return rows


def one_problem(
    shape: timing.Shape, model: str, batch: int, args: argparse.Namespace, publish: Publish
) -> list[dict[str, Any]]:
    """The rows of one shape, batch and model; each implementation's after its first round, and at the end."""
    heads = timing.HEADS[model]
    base = {
        "tokens": shape.tokens,
        "regions": shape.regions,
        "slots": timing.SLOTS,
        "top_k": shape.top_k,
        "text_stream": TEXT,
        "batch": batch,
        "heads": model,
        "dtype": args.dtype,
    }
    layers, size = layers_that_fit(shape, heads, batch, args.dtype)
    if layers < 1:
        need, free = 4 * size / 1e9, timing.free_memory() / 1e9
        return [timing.skipped(base, f"one layer needs {need:.1f} GB in four copies, {free:.1f} GB are free")]
    problem = Problem(shape, heads, batch, args.dtype, layers)
    spec = GazeSpec(problem.scale, visual_dtype="int8" if args.dtype == "int8" else None)
    rows: list[dict[str, Any]] = []
    for name in args.impl:
        this = base | {"implementation": name}
        if (reason := api.supports(name, spec)) is not None:
            rows.append(timing.skipped(this, reason))
            continue

        def refined(new: list[dict[str, Any]], this: dict[str, Any] = this) -> None:
            new = [this | row for row in new]
            if new[0]["rounds"] == 1:
                print("\n".join(map(line, new)), flush=True)
            publish([*rows, *new])

        try:
            measured = measure(problem, name, spec, args, refined)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            rows.append(timing.skipped(this | {"layers": layers}, str(error).splitlines()[0]))
            continue
        rows.extend(this | row for row in measured)
        if measured[0]["rounds"] > 1:
            print("\n".join(map(line, rows[-len(measured) :])), flush=True)
    return rows


BARS = {
    "SeerAttention-R, H100, per kv head blocks, 90 % sparse": "9x FlashAttention-3, of at most 10x",
    "FlashMLA, H800": "3,000 GB/s, about 90 % of peak",
    "NSA decode, A100, 64k": "11.6x, the ratio of memory volumes",
}
"""Speeds of similar kernels on GPUs as published by their authors."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    names = [name for name in api.IMPLEMENTATIONS if name != "reference"]
    parser.add_argument("--shapes", default=SHAPES, help="tokens/regions/top_k, comma-separated")
    parser.add_argument("--batch", type=lambda s: [int(x) for x in s.split(",")], default=[1, 8])
    parser.add_argument("--heads", type=timing.listed(timing.HEADS), default=["qwen3-4b", "qwen2.5-7b"])
    parser.add_argument("--impl", type=timing.listed(api.IMPLEMENTATIONS), default=names)
    parser.add_argument("--select_per", type=timing.listed(("head", "kv_head")), default=["head", "kv_head"])
    on_cpu = jax.default_backend() == "cpu"
    parser.add_argument("--dtype", choices=DTYPES, default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=10.0, help="no round begins after that")
    parser.add_argument("--least-ms", type=float, default=20.0, help="minimum duration of a measured call")
    parser.add_argument("--quick", action="store_true", help="a dry run at toy sizes")
    parser.add_argument("--json", help="write the results to this file")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(shapes=QUICK, batch=[2], heads=["tiny"], rounds=3, least_ms=0.0)
    args = parser.parse_args(argv)
    args.reader = timing.Reader(2**20 if args.quick else 2**28 if on_cpu else 2**31)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    bars = {"bars": BARS} if jax.default_backend() == "gpu" else {}

    def write(rows: list[dict[str, Any]]) -> None:
        read = [row["bandwidth"] for row in rows if "bandwidth" in row]
        bandwidth = statistics.median(read) if read else None
        timing.write(args.json, timing.report("benchmarks.decode", argv, rows, bandwidth=bandwidth, **bars))

    write(benchmark(args, write))


if __name__ == "__main__":
    main()
