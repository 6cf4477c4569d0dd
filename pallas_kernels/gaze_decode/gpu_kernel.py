"""The Mosaic GPU kernel of gaze_decode: what one thread block does; ``gpu.py`` divides the work.

A chunk. Copies bring n regions into consecutive rows of a plain ring buffer in shared memory, ``stages``
chunks ahead. They pass through registers once into a swizzled tile that the tensor cores read. On the way
int8 becomes bfloat16 (exactly; its scales multiply logits and weights), float32 becomes a sum of three
bfloat16 (24 bits, six products), and unseen values become 0. A ring slot is refilled as soon as it has
been copied out, before the products. The G query heads of the kv head are rows of one 64-row tile: most
of its products are wasted, which costs nothing because decoding is memory-bound.

When the kernel is interpreted, three things are replaced, each in one place: ``_Math.dot`` uses ordinary
matrix products instead of the tensor cores, layout casts do nothing, and rounding to bfloat16 is forced.
All copies, indices, barriers, masks and the softmax are the ones that run on the chip.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

Ref = Any  # Pallas refs have no public type
Refs = dict[str, Ref]
Layout = Any  # the types of parameterised and reduced layouts are not public
Operands = dict[str, jax.Array | dict[str, jax.Array]]

ROWS = 64  # rows of a tensor core tile: the query heads of a kv head, padded
DIMS = 64  # D is a multiple of one 128-byte row of bfloat16

# jax 0.11 deprecates the index that jax 0.10 requires.
_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
_LOAD_ALL: tuple[tuple[()], ...] = ((),) if _INDEX and _INDEX.default is inspect.Parameter.empty else ()


class Tiles(NamedTuple):
    """How a kernel divides its work.

    Attributes:
      pieces: pieces of regions per chunk.
      stages: chunks in flight.
      blocks: approximate number of thread blocks in the whole grid.
    """

    pieces: int
    stages: int
    blocks: int


class _Math:
    """Operations that differ between the chip and the interpreter."""

    def __init__(self, interpret: bool, rows: int, dim: int) -> None:
        self.interpret = interpret
        self.logits = plgpu.Layout.WGMMA
        self.copies = plgpu.Layout.SMEM_GMEM_COPY((rows, dim), jnp.bfloat16, 128)

    def cast(self, x: jax.Array, layout: Layout) -> jax.Array:
        """Cast ``x`` to a layout; the interpreter has no layouts."""
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def spread(self, x: jax.Array, shape: tuple[int, ...], axis: int, layout: Layout) -> jax.Array:
        """Broadcast a vector along ``axis`` of a matrix."""
        return self.cast(lax.broadcast_in_dim(x, shape, [axis]), layout)

    def load(self, ref: Ref, layout: Layout) -> jax.Array:
        if self.interpret:
            return ref[...]
        return plgpu.load(ref, *_LOAD_ALL, layout=layout, optimized=False)

    def parts(self, x: jax.Array, count: int) -> list[jax.Array]:
        """Split ``x`` into ``count`` bfloat16 arrays whose sum equals it to 8 * count bits."""
        if x.dtype == jnp.bfloat16:
            return [x]
        if x.dtype == jnp.int8:
            return [x.astype(jnp.bfloat16)]
        parts = []
        for left in range(count, 0, -1):
            # XLA, which runs the interpreter, may remove a rounding that is converted back at once.
            rounded = lax.reduce_precision(x, 8, 7) if self.interpret else x
            parts.append(rounded.astype(jnp.bfloat16))
            if left > 1:
                x = x - parts[-1].astype(jnp.float32)
        return parts

    def dot(
        self,
        pairs: Sequence[tuple[Ref, Ref]],
        start: jax.Array | None,
        shape: tuple[int, int],
        *,
        transposed: bool,
    ) -> jax.Array:
        """``start`` plus a @ b (or a @ b.T) of each pair; b is a reference, a may be an array."""
        if self.interpret:
            total = jnp.zeros(shape, jnp.float32) if start is None else start
            dims = (((1,), (1 if transposed else 0,)), ((), ()))
            for a, b in pairs:
                total += lax.dot_general(a[...], b[...], dims, preferred_element_type=jnp.float32)
            return total

        def products(acc: Ref) -> None:
            for a, b in pairs:
                plgpu.wgmma(acc, a, b.transpose((1, 0)) if transposed else b)

        def fresh(acc: Ref) -> jax.Array:
            products(acc)
            return acc[...]

        if start is None:
            return pl.run_scoped(fresh, plgpu.ACC(shape, jnp.float32))
        return pl.run_state(products)(plgpu.ACC.init(start))


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of one kernel.

    Attributes:
      rows: keys in a chunk's tile, a multiple of 64.
      dim: D, padded.
      piece: slots per piece.
      tiles: how the work is divided.
      splits: thread blocks per row and kv head.
      heads: query heads per kv head, padded to a multiple of 8.
      query_parts, visual_parts, text_parts: number of bfloat16 arrays whose sum is the operand.
      scale: factor of the logits, in units of log2(e).
    """

    rows: int
    dim: int
    piece: int
    tiles: Tiles
    splits: int
    heads: int
    query_parts: int
    visual_parts: int
    text_parts: int
    scale: float


class _Stream(NamedTuple):
    """The visual or text-stream keys of one thread block.

    Attributes:
      steps: int32, number of chunks for this block.
      plan: plan(i) reads the scalars needed to fetch chunk i, ahead of time.
      fetch: fetch(i, plan(i), slot, side) starts the copies of a chunk into a ring slot.
      k, v: rings [stages, rows, D].
      seen: ring int32 [stages, rows] of head bits.
      scales: rings float32 [stages, rows] for K and V of int8, or None.
      barriers: one per ring slot for K and the arrays copied with it, and one for V.
      tile: [parts, rows, D], swizzled; the tensor cores read it.
    """

    steps: jax.Array
    plan: Callable[[jax.Array], Any]
    fetch: Callable[[jax.Array, Any, jax.Array, str], None]
    k: Ref
    v: Ref
    seen: Ref
    scales: tuple[Ref, Ref] | None
    barriers: tuple[Ref, Ref]
    tile: Ref


def _pairs(a: Sequence[Ref], b: Ref, count: int) -> list[tuple[Ref, Ref]]:
    """Pairs of parts whose products matter in float32, smallest first."""
    most = max(len(a), count)
    orders = sorted((i + j, i, j) for i in range(len(a)) for j in range(count) if i + j < most)
    return [(a[i], b.at[j]) for _, i, j in reversed(orders)]


def _attend(
    stream: _Stream, q: Ref, carry: tuple[jax.Array, ...], shape: Shape, parts: int, math: _Math
) -> tuple[jax.Array, ...]:
    """Continue an online softmax (values [64, D], maximum [64], sum [64]) over a block's chunks."""
    stages = shape.tiles.stages
    per_key = math.logits.reduce(0)
    logits_shape = (ROWS, shape.rows)
    values_shape = (ROWS, shape.dim)
    queries = [q.at[i] for i in range(shape.query_parts)]

    def stage(ring: Ref, slot: jax.Array, seen: jax.Array) -> None:
        """Copy a ring slot into the tile as bfloat16, with zeros for unseen keys."""
        x = math.load(ring.at[slot], math.copies)
        visible = math.spread(seen, x.shape, 0, math.copies) != 0
        if x.dtype == jnp.int8:
            x = x.astype(jnp.bfloat16)
        x = jnp.where(visible, x, jnp.zeros((), x.dtype))
        for part, piece in enumerate(math.parts(x, parts)):
            stream.tile[part, ...] = piece
        plgpu.commit_smem()

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        values, top, total = carry
        slot = lax.rem(i, jnp.int32(stages))
        later = i + stages
        plan = stream.plan(later)  # read now, used below: scalar loads have a long latency

        plgpu.barrier_wait(stream.barriers[0].at[slot])
        by_row = math.load(stream.seen.at[slot], math.copies.reduce(1))
        by_key = math.load(stream.seen.at[slot], per_key)
        if stream.scales is not None:
            k_scale, v_scale = (math.load(ring.at[slot], per_key) for ring in stream.scales)
        stage(stream.k, slot, by_row)

        @pl.when(later < stream.steps)
        def _() -> None:
            stream.fetch(later, plan, slot, "k")

        logits = math.dot(_pairs(queries, stream.tile, parts), None, logits_shape, transposed=True)
        logits = logits * shape.scale
        if stream.scales is not None:
            logits = logits * math.spread(k_scale, logits_shape, 1, math.logits)
        head = math.cast(lax.broadcasted_iota(jnp.int32, logits_shape, 0), math.logits)
        bit = jnp.int32(1) << jnp.minimum(head, 31)
        mine = (math.spread(by_key, logits_shape, 1, math.logits) & bit) != 0
        logits = jnp.where(mine, logits, -jnp.inf)

        new = jnp.maximum(top, jnp.max(logits, axis=1))
        base = jnp.where(new == -jnp.inf, 0.0, new)
        decay = jnp.exp2(top - base)
        weights = jnp.exp2(logits - math.spread(base, logits_shape, 0, math.logits))
        total = total * decay + jnp.sum(weights, axis=1)
        values = values * math.spread(decay, values_shape, 0, math.logits)
        if stream.scales is not None:
            weights = weights * math.spread(v_scale, logits_shape, 1, math.logits)
        split = math.parts(weights, shape.query_parts)

        plgpu.barrier_wait(stream.barriers[1].at[slot])
        stage(stream.v, slot, by_row)

        @pl.when(later < stream.steps)
        def _() -> None:
            stream.fetch(later, plan, slot, "v")

        values = math.dot(_pairs(split, stream.tile, parts), values, values_shape, transposed=False)
        return values, new, total

    for ahead in range(stages):

        @pl.when(ahead < stream.steps)
        def _(ahead: int = ahead) -> None:
            first = jnp.int32(ahead)
            plan = stream.plan(first)
            stream.fetch(first, plan, first, "k")
            stream.fetch(first, plan, first, "v")

    return lax.fori_loop(0, stream.steps, step, carry)


def _swizzled(columns: int) -> tuple[Any, Any]:
    """Shared memory in tiles of 8 rows by 128 bytes, which are ``columns``."""
    # With jax 0.12 mypy takes both classes for abstract, because their protocol has a method without a body.
    tiles = plgpu.TilingTransform((8, columns))  # type: ignore[abstract, unused-ignore]
    return tiles, plgpu.SwizzleTransform(128)  # type: ignore[abstract, unused-ignore]


def _ring(shape: Shape, dtype: DTypeLike, parts: int, scaled: bool) -> dict[str, pl.MemoryRef]:
    """Shared memory for one stream."""
    stages, rows, dim = shape.tiles.stages, shape.rows, shape.dim
    swizzled = _swizzled(DIMS)
    ring = {
        "k": plgpu.SMEM((stages, rows, dim), dtype),
        "v": plgpu.SMEM((stages, rows, dim), dtype),
        "seen": plgpu.SMEM((stages, rows), jnp.int32),
        "tile": plgpu.SMEM((parts, rows, dim), jnp.bfloat16, transforms=swizzled),
    }
    if scaled:
        ring |= {name: plgpu.SMEM((stages, rows), jnp.float32) for name in ("k_scale", "v_scale")}
    return ring


def _visual(refs: Refs, ring: Refs, barriers: tuple[Ref, Ref], shape: Shape) -> _Stream:
    """This block's chunks of the region list."""
    b, h, split = (lax.axis_index(name) for name in ("batch", "kv", "split"))
    splits, pieces = shape.splits, shape.tiles.pieces
    last = refs["seen"].shape[-2] - 1
    together = [name for name in ("seen", "k_scale", "v_scale") if name in ring]

    def plan(i: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        chunk = jnp.minimum(split + i * splits, last)
        return chunk, [refs["blocks"][b, h, chunk * pieces + n] for n in range(pieces)]

    def fetch(i: jax.Array, plan: tuple[jax.Array, list[jax.Array]], slot: jax.Array, side: str) -> None:
        chunk, blocks = plan
        barrier = barriers["kv".index(side)].at[slot]
        for n, block in enumerate(blocks):

            @pl.when(block >= 0)
            def _(n: int = n, block: jax.Array = block) -> None:
                rows = pl.ds(n * shape.piece, shape.piece)
                plgpu.copy_gmem_to_smem(refs[side].at[block], ring[side].at[slot, rows], barrier)

            @pl.when(block < 0)
            def _() -> None:
                plgpu.barrier_arrive(barrier)

        if side == "k":
            for name in together:
                plgpu.copy_gmem_to_smem(refs[name].at[b, h, chunk], ring[name].at[slot], barrier)

    steps = lax.div(refs["chunks"][b, h] - split + (splits - 1), jnp.int32(splits))
    scales = (ring["k_scale"], ring["v_scale"]) if "k_scale" in ring else None
    return _Stream(steps, plan, fetch, ring["k"], ring["v"], ring["seen"], scales, barriers, ring["tile"])


def _text(refs: Refs, ring: Refs, barriers: tuple[Ref, Ref], shape: Shape) -> _Stream:
    """This block's chunks of the text stream."""
    b, h = lax.axis_index("batch"), lax.axis_index("kv")
    splits = shape.splits
    # Counted from the end: the last splits have one region chunk less.
    split = splits - 1 - lax.axis_index("split")
    keys = refs["k"].shape[-2]
    at = (refs["layer"][0] * lax.axis_size("batch") + b) * lax.axis_size("kv") + h

    def plan(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        chunk = split + i * splits
        # The last chunk is moved back to end at the stream's end; the mask excludes the keys it repeats.
        return chunk, jnp.minimum(chunk * shape.rows, keys - shape.rows)

    def fetch(i: jax.Array, plan: tuple[jax.Array, jax.Array], slot: jax.Array, side: str) -> None:
        chunk, start = plan
        barrier = barriers["kv".index(side)].at[slot]
        plgpu.copy_gmem_to_smem(refs[side].at[at, pl.ds(start, shape.rows)], ring[side].at[slot], barrier)
        if side == "k":
            plgpu.copy_gmem_to_smem(refs["seen"].at[b, chunk], ring["seen"].at[slot], barrier)

    steps = lax.div(refs["chunks"][b] - split + (splits - 1), jnp.int32(splits))
    return _Stream(steps, plan, fetch, ring["k"], ring["v"], ring["seen"], None, barriers, ring["tile"])


def _block(shape: Shape, interpret: bool, refs: dict[str, Ref], outs: Sequence[Ref], scratch: Refs) -> None:
    """One thread block: the partial softmax of its split of the regions and of the text stream."""
    b, h, split = (lax.axis_index(name) for name in ("batch", "kv", "split"))
    math = _Math(interpret, shape.rows, shape.dim)
    q = scratch["q"]
    for part in range(shape.query_parts):
        row = (b * lax.axis_size("kv") + h) * shape.query_parts + part
        plgpu.copy_gmem_to_smem(refs["q"].at[pl.ds(row * ROWS, ROWS)], q.at[part], scratch["arrived"])
    plgpu.barrier_wait(scratch["arrived"])

    per_row = math.logits.reduce(1)
    carry: tuple[jax.Array, ...] = (
        math.cast(jnp.zeros((ROWS, shape.dim), jnp.float32), math.logits),
        math.cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), per_row),
        math.cast(jnp.zeros((ROWS,), jnp.float32), per_row),
    )
    for kind, make, parts in (
        ("visual", _visual, shape.visual_parts),
        ("text", _text, shape.text_parts),
    ):
        if kind not in refs:
            continue
        source = refs[kind]
        barriers = (scratch[f"{kind}_k"], scratch[f"{kind}_v"])

        def attend(
            ring: Refs, make: Callable[..., _Stream] = make, source: Refs = source, **given: Any
        ) -> tuple[jax.Array, ...]:
            stream = make(source, ring, given["barriers"], shape)
            return _attend(stream, q, given["carry"], shape, given["parts"], math)

        # The two streams use the same shared memory, one after the other.
        carry = pl.run_scoped(
            functools.partial(attend, barriers=barriers, carry=carry, parts=parts),
            _ring(shape, source["k"].dtype, parts, "k_scale" in source),
        )

    def write(*smem: Ref) -> None:
        for ref, value in zip(smem, carry, strict=True):
            ref[...] = value
        plgpu.commit_smem()
        for ref, out in zip((smem[0].at[pl.ds(0, shape.heads)], *smem[1:]), outs, strict=True):
            plgpu.copy_smem_to_gmem(ref, out.at[b, h, split])
        plgpu.wait_smem_to_gmem(0)

    swizzled = _swizzled(32)
    pl.run_scoped(
        write,
        plgpu.SMEM((ROWS, shape.dim), jnp.float32, transforms=swizzled),
        plgpu.SMEM((ROWS,), jnp.float32),
        plgpu.SMEM((ROWS,), jnp.float32),
    )


def _interpreter() -> Any:
    """Parameters for interpreting the kernel, with every check on, so that no test passes by luck."""
    # JAX has no public name for it yet, and only tests use it.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    # With a single engine, waiting for one copy would seem to order all those before it.
    return InterpretGPUParams(
        detect_races=True,
        out_of_bounds_reads="raise",
        uninitialized_memory="nan",
        num_tma_threads_per_device=32,
    )


def launch(
    shape: Shape, batch: int, kv_heads: int, operands: Operands, *, interpret: bool
) -> Sequence[jax.Array]:
    """Run the kernel: values [B, K, splits, heads, D], maxima and sums [B, K, splits, 64], all float32."""
    leaves, tree = jax.tree.flatten(operands)
    splits, stages = shape.splits, shape.tiles.stages
    scaled = "k_scale" in operands.get("visual", {})

    def body(*refs: Ref, **scratch: Ref) -> None:
        _block(shape, interpret, jax.tree.unflatten(tree, refs[: len(leaves)]), refs[len(leaves) :], scratch)

    def barriers(arrivals: int) -> plgpu.Barrier:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)

    partial = (batch, kv_heads, splits)
    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((*partial, shape.heads, shape.dim), jnp.float32),
            jax.ShapeDtypeStruct((*partial, ROWS), jnp.float32),
            jax.ShapeDtypeStruct((*partial, ROWS), jnp.float32),
        ],
        grid=partial,
        grid_names=("batch", "kv", "split"),
        scratch_types={
            "q": plgpu.SMEM((shape.query_parts, ROWS, shape.dim), jnp.bfloat16, transforms=_swizzled(DIMS)),
            "arrived": plgpu.Barrier(num_arrivals=shape.query_parts),
            "visual_k": barriers(shape.tiles.pieces + 1 + 2 * scaled),
            "visual_v": barriers(shape.tiles.pieces),
            "text_k": barriers(2),
            "text_v": barriers(1),
        },
        # Reductions stay within a warp, so they need no scratch. The layouts are written for lane semantics.
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=_interpreter() if interpret else None,
    )(*leaves)
