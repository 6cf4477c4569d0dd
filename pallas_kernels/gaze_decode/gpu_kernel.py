"""The Mosaic GPU kernel of gaze_decode: what one thread block does; ``gpu.py`` divides the work.

A chunk. Copies bring n regions into consecutive rows of a plain ring buffer in shared memory, ``stages``
chunks ahead. They pass through registers once into a swizzled tile that the tensor cores read. On the way
int8 becomes bfloat16 (exactly; its scales multiply logits and weights), float32 becomes a sum of three
bfloat16 (24 bits, six products), and unseen values become 0. A ring slot is refilled as soon as it has
been copied out, before the products. The G query heads of the kv head are rows of one 64-row tile: most
of its products are wasted, which costs nothing because decoding is memory-bound.

Which keys of a chunk each head sees is made in registers, from a bit per slot of a region (of the step) and
a bit per query head (of the layer's selection).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.gaze_decode.gpu_math import (
    DIMS,
    ROWS,
    Layout,
    Math,
    Operands,
    Ref,
    Refs,
    launch,
    pairs,
    stage_queries,
    swizzled,
)

Seen = Callable[[Layout], jax.Array]
"""Of a chunk: layout -> int32 [rows], the bits of the query heads that see each key."""


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


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of one kernel.

    Attributes:
      rows: keys in a chunk's tile, a multiple of 64.
      dim: D, padded.
      piece: slots per piece.
      cut: pieces per region.
      tiles: how the work is divided.
      splits: thread blocks per row and kv head.
      group: query heads per kv head.
      query_parts, visual_parts, text_parts: number of bfloat16 arrays whose sum is the operand.
      scale: factor of the logits, in units of log2(e).
    """

    rows: int
    dim: int
    piece: int
    cut: int
    tiles: Tiles
    splits: int
    group: int
    query_parts: int
    visual_parts: int
    text_parts: int
    scale: float

    @property
    def heads(self) -> int:
        """``group``, padded to a multiple of 8."""
        return -(-self.group // 8) * 8


class _Stream(NamedTuple):
    """The visual or text-stream keys of one thread block.

    Attributes:
      steps: int32, number of chunks for this block.
      plan: plan(i) reads the scalars needed to fetch chunk i, ahead of time.
      fetch: fetch(i, plan(i), slot, side) starts the copies of a chunk into a ring slot.
      seen: seen(i) reads the scalars that say which keys of chunk i count.
      k, v: rings [stages, rows, D].
      scales: rings float32 [stages, rows] for K and V of int8, or None.
      barriers: one per ring slot for K and the scales, and one for V.
      tile: [parts, rows, D], swizzled; the tensor cores read it.
    """

    steps: jax.Array
    plan: Callable[[jax.Array], Any]
    fetch: Callable[[jax.Array, Any, jax.Array, str], None]
    seen: Callable[[jax.Array], Seen]
    k: Ref
    v: Ref
    scales: tuple[Ref, Ref] | None
    barriers: tuple[Ref, Ref]
    tile: Ref


def _attend(
    stream: _Stream, q: Ref, carry: tuple[jax.Array, ...], shape: Shape, parts: int, math: Math
) -> tuple[jax.Array, ...]:
    """Continue an online softmax (values [64, D], maximum [64], sum [64]) over a block's chunks."""
    stages = shape.tiles.stages
    per_key, copies = math.by_column, math.copies(shape.rows, shape.dim)
    logits_shape = (ROWS, shape.rows)
    values_shape = (ROWS, shape.dim)
    queries = [q.at[i] for i in range(shape.query_parts)]

    def stage(ring: Ref, slot: jax.Array, seen: jax.Array) -> None:
        """Copy a ring slot into the tile as bfloat16, with zeros for unseen keys."""
        x = math.load(ring.at[slot], copies)
        visible = math.spread(seen, x.shape, 0, copies) != 0
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
        plan, seen = stream.plan(later), stream.seen(i)  # read now, used below: scalars take long to arrive

        plgpu.barrier_wait(stream.barriers[0].at[slot])
        by_row, by_key = seen(copies.reduce(1)), seen(per_key)
        if stream.scales is not None:
            # What is not seen may be NaN: a scale too.
            k_scale, v_scale = (
                jnp.where(by_key != 0, math.load(ring.at[slot], per_key), 0.0) for ring in stream.scales
            )
        stage(stream.k, slot, by_row)

        @pl.when(later < stream.steps)
        def _() -> None:
            stream.fetch(later, plan, slot, "k")

        logits = math.dot(pairs(queries, stream.tile, parts), None, logits_shape, transposed=True)
        logits = logits * shape.scale
        if stream.scales is not None:
            logits = logits * math.spread(k_scale, logits_shape, 1, math.matrix)
        head = math.iota(logits_shape, 0, math.matrix)
        bit = jnp.int32(1) << jnp.minimum(head, 31)
        mine = (math.spread(by_key, logits_shape, 1, math.matrix) & bit) != 0
        logits = jnp.where(mine, logits, -jnp.inf)

        new = jnp.maximum(top, jnp.max(logits, axis=1))
        base = jnp.where(new == -jnp.inf, 0.0, new)
        decay = jnp.exp2(top - base)
        weights = jnp.exp2(logits - math.spread(base, logits_shape, 0, math.matrix))
        total = total * decay + jnp.sum(weights, axis=1)
        values = values * math.spread(decay, values_shape, 0, math.matrix)
        if stream.scales is not None:
            weights = weights * math.spread(v_scale, logits_shape, 1, math.matrix)
        split = math.parts(weights, shape.query_parts)

        plgpu.barrier_wait(stream.barriers[1].at[slot])
        stage(stream.v, slot, by_row)

        @pl.when(later < stream.steps)
        def _() -> None:
            stream.fetch(later, plan, slot, "v")

        values = math.dot(pairs(split, stream.tile, parts), values, values_shape, transposed=False)
        return values, new, total

    for ahead in range(stages):

        @pl.when(ahead < stream.steps)
        def _(ahead: int = ahead) -> None:
            first = jnp.int32(ahead)
            plan = stream.plan(first)
            stream.fetch(first, plan, first, "k")
            stream.fetch(first, plan, first, "v")

    return lax.fori_loop(0, stream.steps, step, carry)


def _ring(shape: Shape, dtype: DTypeLike, parts: int, scaled: bool) -> dict[str, pl.MemoryRef]:
    """Shared memory for one stream."""
    stages, rows, dim = shape.tiles.stages, shape.rows, shape.dim
    ring = {
        "k": plgpu.SMEM((stages, rows, dim), dtype),
        "v": plgpu.SMEM((stages, rows, dim), dtype),
        "tile": plgpu.SMEM((parts, rows, dim), jnp.bfloat16, transforms=swizzled(DIMS)),
    }
    if scaled:
        ring |= {name: plgpu.SMEM((stages, rows), jnp.float32) for name in ("k_scale", "v_scale")}
    return ring


def _visual(refs: Refs, ring: Refs, barriers: tuple[Ref, Ref], shape: Shape, math: Math) -> _Stream:
    """This block's chunks of the region list."""
    b, h, split = (lax.axis_index(name) for name in ("batch", "kv", "split"))
    splits, pieces, cut = shape.splits, shape.tiles.pieces, shape.cut
    listed, per_row = refs["list"].shape[-1], refs["words"].shape[1]
    count = (refs["length"][b, h] if "length" in refs else jnp.int32(listed)) * cut
    first = ((refs["layer"][0] * lax.axis_size("batch") + b) * lax.axis_size("kv") + h) * per_row
    scales = [name for name in ("k_scale", "v_scale") if name in ring]

    def piece(i: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
        """The place in the list of piece n of chunk i, and the piece's number in its row; -1 is none."""
        place = (split + i * splits) * pieces + n
        entry = jnp.minimum(lax.div(place, jnp.int32(cut)), listed - 1)
        region = refs["list"][b, h, entry]
        # The list may hold anything behind its end.
        used = (place < count) & (region >= 0)
        return entry, jnp.where(used, region * cut + lax.rem(place, jnp.int32(cut)), -1)

    def plan(i: jax.Array) -> list[jax.Array]:
        return [piece(i, n)[1] for n in range(pieces)]

    def fetch(i: jax.Array, plan: list[jax.Array], slot: jax.Array, side: str) -> None:
        barrier = barriers["kv".index(side)].at[slot]
        together = [side, *scales] if side == "k" else [side]
        for n, number in enumerate(plan):

            @pl.when(number >= 0)
            def _(n: int = n, number: jax.Array = number) -> None:
                for name in together:
                    rows = pl.ds(n * shape.piece, refs[name].shape[1])
                    plgpu.copy_gmem_to_smem(refs[name].at[first + number], ring[name].at[slot, rows], barrier)

            @pl.when(number < 0)
            def _() -> None:
                for _ in together:
                    plgpu.barrier_arrive(barrier)

    def seen(i: jax.Array) -> Seen:
        facts = []
        for n in range(pieces):
            entry, number = piece(i, n)
            heads = refs["heads"][b, h, entry] if "heads" in refs else jnp.int32(-1)
            words = [refs["words"][b, jnp.maximum(number, 0), word] for word in (0, 1)]
            facts.append((jnp.where(number >= 0, heads, 0), *words))

        def bits(layout: Layout) -> jax.Array:
            row = math.iota((shape.rows,), 0, layout)
            found = jnp.zeros_like(row)
            for n, (heads, low, high) in enumerate(facts):
                slot = row - n * shape.piece
                word = jnp.where(slot < 32, low, high)
                bit = lax.shift_right_logical(word, slot & 31) & 1
                mine = (slot >= 0) & (slot < shape.piece) & (bit != 0)
                found = jnp.where(mine, heads, found)
            return found

        return bits

    steps = lax.div(lax.div(count + pieces - 1, jnp.int32(pieces)) - split + (splits - 1), jnp.int32(splits))
    rings = (ring["k_scale"], ring["v_scale"]) if scales else None
    return _Stream(steps, plan, fetch, seen, ring["k"], ring["v"], rings, barriers, ring["tile"])


def _text(refs: Refs, ring: Refs, barriers: tuple[Ref, Ref], shape: Shape, math: Math) -> _Stream:
    """This block's chunks of the text stream."""
    b, h = lax.axis_index("batch"), lax.axis_index("kv")
    splits, rows = shape.splits, shape.rows
    # Counted from the end: the last splits have one region chunk less.
    split = splits - 1 - lax.axis_index("split")
    keys, last = refs["k"].shape[-2], refs["words"].shape[1] - 1
    at = (refs["layer"][0] * lax.axis_size("batch") + b) * lax.axis_size("kv") + h

    def plan(i: jax.Array) -> jax.Array:
        # The last chunk is moved back to end at the stream's end; the mask excludes the keys it repeats.
        return jnp.minimum((split + i * splits) * rows, keys - rows)

    def fetch(i: jax.Array, plan: jax.Array, slot: jax.Array, side: str) -> None:
        barrier = barriers["kv".index(side)].at[slot]
        plgpu.copy_gmem_to_smem(refs[side].at[at, pl.ds(plan, rows)], ring[side].at[slot], barrier)

    def seen(i: jax.Array) -> Seen:
        start, fresh = plan(i), (split + i * splits) * rows
        word, shift = lax.div(start, jnp.int32(32)), lax.rem(start, jnp.int32(32))
        words = [refs["words"][b, jnp.minimum(word + n, last)] for n in range(rows // 32 + 1)]

        def bits(layout: Layout) -> jax.Array:
            row = math.iota((rows,), 0, layout)
            key = row + shift
            mine = jnp.zeros_like(row)
            for n, word in enumerate(words):
                mine = jnp.where((key >= 32 * n) & (key < 32 * n + 32), word, mine)
            bit = lax.shift_right_logical(mine, key & 31) & 1
            return jnp.where((bit != 0) & (row + start >= fresh), jnp.int32(-1), jnp.int32(0))

        return bits

    chunks = lax.div(refs["length"][b] + rows - 1, jnp.int32(rows))
    steps = lax.div(chunks - split + (splits - 1), jnp.int32(splits))
    return _Stream(steps, plan, fetch, seen, ring["k"], ring["v"], None, barriers, ring["tile"])


def _block(shape: Shape, math: Math, refs: dict[str, Ref], outs: Sequence[Ref], scratch: Refs) -> None:
    """One thread block: the partial softmax of its split of the regions and of the text stream."""
    b, h, split = (lax.axis_index(name) for name in ("batch", "kv", "split"))
    q = scratch["q"]
    # The plain copy of the queries and the two streams use the same shared memory, one after the other.
    stage = functools.partial(
        stage_queries, math, refs["q"].at[b, h], q, shape.query_parts, shape.group, scratch["arrived"]
    )
    pl.run_scoped(stage, plgpu.SMEM((ROWS, shape.dim), refs["q"].dtype))

    carry: tuple[jax.Array, ...] = (
        math.cast(jnp.zeros((ROWS, shape.dim), jnp.float32), math.matrix),
        math.cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), math.by_row),
        math.cast(jnp.zeros((ROWS,), jnp.float32), math.by_row),
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
            stream = make(source, ring, given["barriers"], shape, math)
            return _attend(stream, q, given["carry"], shape, given["parts"], math)

        carry = pl.run_scoped(
            functools.partial(attend, barriers=barriers, carry=carry, parts=parts),
            _ring(shape, source["k"].dtype, parts, "k_scale" in source),
        )

    def write(*smem: Ref) -> None:
        for ref, value in zip(smem, carry, strict=True):
            ref[...] = value
        plgpu.commit_smem()
        places = (outs[0].at[b, h, :, split], outs[1].at[b, h, split], outs[2].at[b, h, split])
        for ref, out in zip(smem, places, strict=True):
            plgpu.copy_smem_to_gmem(ref.at[pl.ds(0, shape.heads)], out)
        plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(
        write,
        plgpu.SMEM((ROWS, shape.dim), jnp.float32, transforms=swizzled(32, jnp.float32)),
        plgpu.SMEM((ROWS,), jnp.float32),
        plgpu.SMEM((ROWS,), jnp.float32),
    )


def attend_in_splits(
    shape: Shape, batch: int, kv_heads: int, operands: Operands, *, interpret: bool
) -> Sequence[jax.Array]:
    """Run the kernel: partial softmaxes, which ``gpu_merge.py`` joins.

    Args:
      shape: static sizes.
      batch, kv_heads: B and K.
      operands: "q" [B, K, G, D]; "visual" and "text", either or both, as ``gpu.py`` makes them.
      interpret: see :class:`pallas_kernels.spec.GazeSpec`.

    Returns:
      float32: values [B, K, heads, splits', D], of which the splits beyond ``splits``, which make them a
      multiple of 8, hold anything; maxima and sums [B, K, splits', heads].
    """
    splits, stages = shape.splits, shape.tiles.stages
    scaled = "k_scale" in operands.get("visual", {})

    def barriers(arrivals: int) -> plgpu.Barrier:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)

    stored = -(-splits // 8) * 8
    by_split = jax.ShapeDtypeStruct((batch, kv_heads, stored, shape.heads), jnp.float32)
    values = (batch, kv_heads, shape.heads, stored, shape.dim)
    return launch(
        "gaze_attention",
        functools.partial(_block, shape, Math(interpret)),
        operands,
        [jax.ShapeDtypeStruct(values, jnp.float32), by_split, by_split],
        {"batch": batch, "kv": kv_heads, "split": splits},
        {
            "q": plgpu.SMEM((shape.query_parts, ROWS, shape.dim), jnp.bfloat16, transforms=swizzled(DIMS)),
            "arrived": plgpu.Barrier(),
            "visual_k": barriers(shape.tiles.pieces * (3 if scaled else 1)),
            "visual_v": barriers(shape.tiles.pieces),
            "text_k": barriers(1),
            "text_v": barriers(1),
        },
        interpret=interpret,
    )
