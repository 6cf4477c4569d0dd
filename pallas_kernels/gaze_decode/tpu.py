"""gaze_decode for TPUs: a Pallas Mosaic kernel that copies selected regions and nothing else.

Grid: cores x (rows of batch and kv head) x tiles of the text stream. In the first step of a row the
kernel walks the union of its query heads' regions in chunks, double-buffered: while one chunk is
multiplied the next is copied, and the last chunk of a row is overlapped with the first of the following
row. Tiles of the text stream come through the ordinary block pipeline; those in which no key counts are
neither fetched nor computed. All pieces meet in one online softmax in float32.

Beside every chunk travels a small float32 array, ``side``: per key the heads that read it (a bit each, 0
for a key that nobody may see) and, for int8, its scales, so that the kernel needs no mask arithmetic.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.gaze_decode import plan, tpu_layout
from pallas_kernels.gaze_decode.tpu_layout import LANES, Packed
from pallas_kernels.spec import GazeSpec

# XLA lays a text stream of another size out in its own way and copies it for the kernel.
TEXT_MULTIPLE = 128
TEXT_TILE = 512  # keys of the text stream per grid step
CHUNK_BYTES = 512 * 1024  # of regions in flight: two such buffers cover a copy's latency

MAX_UNION = 32_000  # region numbers of a row and of the next one, double-buffered, in 1 MB of scalar memory

pack = tpu_layout.pack
unpack = tpu_layout.unpack
reserve = tpu_layout.reserve
write = tpu_layout.write

_LOWEST = -0.5 * float(jnp.finfo(jnp.float32).max)


def supports(spec: GazeSpec) -> str | None:
    """Every spec, on a TPU or interpreted."""
    return dispatch.needs("tpu", spec)


def regions_per_chunk(region_bytes: int, union: int) -> int:
    """C: a multiple of 8, so that word rows of a chunk fill whole registers, and no more than useful."""
    wanted = min(max(CHUNK_BYTES // region_bytes, 8), 64, union + 7)
    return max(8, wanted // 8 * 8)


def _column(row: jax.Array) -> jax.Array:
    """[1, N] to [N, 1]."""
    return jnp.transpose(jnp.broadcast_to(row, (8, row.shape[1])))[:, :1]


def split_words(words: Any) -> list[jax.Array]:
    """The n places of word rows, each as float32 [rows, 128], exactly.

    Args:
      words: a reference to [rows, n, 128] in float32, bfloat16 or int8.
    """
    rows = words.shape[0]
    if words.dtype == jnp.float32:
        flat = words.reshape(rows * 2, LANES)
        return [flat[pl.ds(place, rows, stride=2), :] for place in (0, 1)]
    return _bits(words.bitcast(jnp.int32).reshape(rows, LANES)[...], words.dtype)


def split_values(words: jax.Array) -> list[jax.Array]:
    """:func:`split_words` of a value: the interpreter cannot read a reference that was reshaped."""
    if words.dtype == jnp.float32:
        return [words[:, place] for place in (0, 1)]
    return _bits(jax.lax.bitcast_convert_type(jnp.swapaxes(words, 1, 2), jnp.int32), words.dtype)


def _bits(words: jax.Array, dtype: Any) -> list[jax.Array]:
    """Values that share int32 words, the first in the lowest bits."""
    if dtype == jnp.bfloat16:
        # A bfloat16 is the upper half of its float32.
        halves = (words << 16, words & jnp.int32(-65536))
        return [jax.lax.bitcast_convert_type(half, jnp.float32) for half in halves]
    return [((words << (24 - 8 * place)) >> 24).astype(jnp.float32) for place in range(4)]


def _kernel(
    layer_ref: Any,
    count_ref: Any,
    tiles_ref: Any,
    ids_ref: Any,
    next_ids_ref: Any,
    q_ref: Any,
    text_q_ref: Any,
    visual_ref: Any,
    side_ref: Any,
    text_k_ref: Any,
    text_v_ref: Any,
    text_seen_ref: Any,
    visual_out_ref: Any,
    text_out_ref: Any,
    buffer: Any,
    side_buffer: Any,
    parity: Any,
    copies: Any,
    side_copies: Any,
    top: Any,
    total: Any,
    visual_sum: Any,
    text_sum: Any,
    *,
    kv_heads: int,
    chunk: int,
    word_rows: int,
    joint: bool,
    lanes_are_tokens: bool,
    compute: Any,
    scale: float,
    interpreted: bool,
) -> None:
    inner, tile = pl.program_id(1), pl.program_id(2)
    rows = pl.num_programs(1)
    row = pl.program_id(0) * rows + inner
    chunks = (count_ref[row] + chunk - 1) // chunk
    exact = jax.lax.Precision.HIGHEST if compute == jnp.float32 else None

    def each(row: Any, ids: Any, index: Any, slot: Any, act: Any) -> None:
        """Call ``act`` on the copies of a row's chunk: one per region that it really has."""
        some = jnp.clip(count_ref[row] - index * chunk, 0, chunk)

        def one(place: Any, carry: Any) -> Any:
            region = ids[0, 0, index * chunk + place]
            place_rows = pl.ds(0, word_rows)
            source = visual_ref.at[layer_ref[0], row // kv_heads, row % kv_heads, region, place_rows]
            target = buffer.at[slot, pl.ds(place * word_rows, word_rows)]
            act(pltpu.make_async_copy(source, target, copies.at[slot]))
            return carry

        jax.lax.fori_loop(0, some, one, 0)

        @pl.when(some > 0)
        def _() -> None:
            act(pltpu.make_async_copy(side_ref.at[row, index], side_buffer.at[slot], side_copies.at[slot]))

    def start(row: Any, ids: Any, index: Any, slot: Any) -> None:
        each(row, ids, index, slot, lambda copy: copy.start())

    def attend(
        q: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        counts: jax.Array,
        k_scale: Any,
        v_scale: Any,
        out: Any,
        lanes_are_tokens: bool = False,
    ) -> None:
        """A step of the online softmax over [N, D] or [D, N]; ``counts`` [G, N] marks the real logits."""
        token, channel = (1, 0) if lanes_are_tokens else (0, 1)
        logits = jax.lax.dot_general(
            q, keys, (((1,), (channel,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
        )
        logits = jnp.where(counts, logits * (scale * k_scale), _LOWEST)
        before = top[:, :1]
        now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        shrink = jnp.exp(before - now)
        weights = jnp.where(counts, jnp.exp(logits - now), 0.0)
        top[...] = jnp.broadcast_to(now, top.shape)
        total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        visual_sum[...] *= shrink
        text_sum[...] *= shrink
        weights = (weights * v_scale).astype(compute)
        out[...] += jax.lax.dot_general(
            weights, values, (((1,), (token,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
        )

    @pl.when(tile == 0)
    def _() -> None:
        top[...] = jnp.full(top.shape, _LOWEST, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        visual_sum[...] = jnp.zeros(visual_sum.shape, jnp.float32)
        text_sum[...] = jnp.zeros(text_sum.shape, jnp.float32)

        @pl.when(inner == 0)
        def _() -> None:
            parity[0] = 0
            start(row, ids_ref, 0, 0)

        def step(index: Any, carry: Any) -> Any:
            slot = (parity[0] + index) % 2

            @pl.when(index + 1 < chunks)
            def _() -> None:
                start(row, ids_ref, index + 1, 1 - slot)

            @pl.when((index + 1 == chunks) & (inner + 1 < rows))
            def _() -> None:
                start(row + 1, next_ids_ref, 0, 1 - slot)

            each(row, ids_ref, index, slot, lambda copy: copy.wait())
            side = side_buffer[slot]
            places = split_values(buffer[slot]) if interpreted else split_words(buffer.at[slot])
            asked = side[0:1].astype(jnp.int32)
            group = jax.lax.broadcasted_iota(jnp.int32, (q_ref.shape[1], 1), 0)
            counts = ((asked >> group) & 1) == 1
            half = len(places) // (1 if joint else 2)
            keys = jnp.concatenate(places[:half], axis=0) if half > 1 else places[0]
            values = keys
            if not joint:
                values = jnp.concatenate(places[half:], axis=0) if half > 1 else places[1]
            # Slots that nobody sees may hold NaN, and so do places of the buffer that were not copied.
            seen = _column(asked.astype(jnp.float32)) > 0
            values = jnp.where(seen, values, 0.0)
            keys = values if joint else keys
            k_scale, v_scale = (side[1:2], side[2:3]) if side.shape[0] > 1 else (1.0, 1.0)
            keys, values = keys.astype(compute), values.astype(compute)
            attend(q_ref[0], keys, values, counts, k_scale, v_scale, visual_sum)
            return carry

        jax.lax.fori_loop(0, chunks, step, 0)

        @pl.when((chunks == 0) & (inner + 1 < rows))
        def _() -> None:
            start(row + 1, next_ids_ref, 0, parity[0])

        parity[0] = (parity[0] + chunks) % 2

    @pl.when(tile < tiles_ref[row // kv_heads])
    def _() -> None:
        seen = text_seen_ref[0]
        zeroed = (seen if lanes_are_tokens else _column(seen)) > 0
        values = jnp.where(zeroed, text_v_ref[0, 0, 0].astype(jnp.float32), 0.0).astype(compute)
        counts = jnp.broadcast_to(seen > 0, (q_ref.shape[1], seen.shape[1]))
        keys = text_k_ref[0, 0, 0].astype(compute)
        attend(text_q_ref[0], keys, values, counts, 1.0, 1.0, text_sum, lanes_are_tokens)

    @pl.when(tile == pl.num_programs(2) - 1)
    def _() -> None:
        select_per = 1.0 / jnp.where(total[:, :1] > 0, total[:, :1], 1.0)
        visual_out_ref[0] = visual_sum[...] * select_per
        text_out_ref[0] = text_sum[...] * select_per


def _side(visual: Packed, listed: plan.Union, seen: jax.Array, layer: jax.Array, chunk: int) -> jax.Array:
    """float32 [B * K, chunks, 1 or 3, N]: what the kernel must know about every key of every chunk."""
    batch, kv_heads, _ = listed.regions.shape
    b = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    at = jnp.maximum(listed.regions, 0)
    counts = seen[b, at] & (listed.regions >= 0)[..., None]
    rows = [jnp.where(counts, listed.heads[..., None], 0).astype(jnp.float32)]
    if visual.scaled:
        h = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
        scales = tpu_layout.scales_of(visual.words[layer, b, h, at, visual.rows :], visual.slots)
        rows += [jnp.where(counts, scale, 0.0) for scale in scales]
    side = jnp.stack(rows, axis=2)  # [B, K, 1 or 3, U, P]
    chunks = -(-listed.regions.shape[-1] // chunk)
    pad = [(0, 0)] * 3 + [(0, chunks * chunk - listed.regions.shape[-1]), (0, 0)]
    side = jnp.pad(side, pad).reshape(batch * kv_heads, len(rows), chunks, chunk, -1)
    return jnp.swapaxes(tpu_layout.by_row(visual, side), 1, 2)


def _listed(indices: jax.Array | None, batch: int, kv_heads: int, group: int, regions: int) -> plan.Union:
    """The regions of every kv head, at least one place wide."""
    if indices is None or regions == 0:
        listed = plan.everything(batch, kv_heads, group, regions)
    else:
        listed = plan.union(indices, kv_heads, group, regions)
    if listed.regions.shape[-1] == 0:
        # An array without elements cannot be copied from; of this one nothing is, by its count of 0.
        none = jnp.full((batch, kv_heads, 1), -1, jnp.int32)
        listed = plan.Union(none, jnp.zeros_like(none), listed.count)
    if listed.regions.shape[-1] > MAX_UNION:
        raise NotImplementedError(
            f"gaze_decode implementation 'tpu' lists at most {MAX_UNION} regions per kv head in scalar "
            f"memory, not {listed.regions.shape[-1]}; choose a smaller capacity or larger regions."
        )
    return listed


def _used_tiles(text_seen: jax.Array, tile: int) -> jax.Array:
    """int32 [B]: tiles of the text stream up to the last key that counts."""
    place = jnp.arange(1, text_seen.shape[-1] + 1, dtype=jnp.int32)
    last = jnp.max(jnp.where(text_seen, place, 0), axis=-1)
    return (last + tile - 1) // tile


def gaze_decode(
    q: jax.Array,
    visual: Packed,
    text_k: jax.Array,
    text_v: jax.Array,
    layer: jax.Array,
    indices: jax.Array | None,
    visual_seen: jax.Array,
    text_seen: jax.Array,
    *,
    spec: GazeSpec,
) -> jax.Array:
    """See :func:`pallas_kernels.gaze_decode.api.gaze_decode`.

    Raises:
      NotImplementedError: more regions are listed than scalar memory holds.
    """
    batch, heads, dim = q.shape
    kv_heads, text = text_k.shape[2:4]
    group, regions = heads // kv_heads, visual_seen.shape[1]
    listed = _listed(indices, batch, kv_heads, group, regions)
    places = visual.words.shape[-2]
    region_bytes = visual.rows * places * LANES * visual.words.dtype.itemsize
    chunk = regions_per_chunk(region_bytes, listed.regions.shape[-1])
    seen = jnp.pad(visual_seen, ((0, 0), (0, max(0, 1 - regions)), (0, 0)))
    side = _side(visual, listed, seen, layer, chunk)

    rows = batch * kv_heads
    ids = listed.regions.reshape(rows, 1, -1)
    ids = jnp.pad(ids, ((0, 0), (0, 0), (0, side.shape[1] * chunk - ids.shape[-1])), constant_values=-1)
    compute = jnp.float32 if jnp.float32 in (q.dtype, text_k.dtype) else jnp.bfloat16
    grouped = q.reshape(rows, group, dim).astype(compute)
    # XLA keeps [S, 64] with tokens along lanes, where nothing is padded; so it is met, not relaid.
    lanes_are_tokens = visual.joint
    if lanes_are_tokens:
        text_k, text_v = (jnp.swapaxes(a, 3, 4) for a in (text_k, text_v))
    words = visual.words
    if not spec.interpret:
        # Never let the compiler fetch whole stacks into fast memory because they happen to fit.
        text_k, text_v, words = (
            pltpu.with_memory_space_constraint(a, pltpu.HBM) for a in (text_k, text_v, visual.words)
        )
    tile = min(TEXT_TILE, text)
    text_block = (1, 1, 1, dim, tile) if lanes_are_tokens else (1, 1, 1, tile, dim)
    used = _used_tiles(text_seen, tile)
    cores = 2 if rows % 2 == 0 else 1  # chips with two TensorCores per device split the first axis
    grid = _Grid(kv_heads, rows // cores, lanes_are_tokens)
    kernel = functools.partial(
        _kernel,
        kv_heads=kv_heads,
        chunk=chunk,
        word_rows=visual.rows,
        joint=visual.joint,
        lanes_are_tokens=lanes_are_tokens,
        compute=compute,
        scale=spec.scale,
        interpreted=spec.interpret,
    )
    scalars = functools.partial(pl.BlockSpec, (1, 1, ids.shape[-1]), memory_space=pltpu.SMEM)
    visual_out, text_out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, rows // cores, -(-text // tile)),
            in_specs=[
                scalars(grid.row),
                scalars(grid.next_row),
                pl.BlockSpec((1, group, LANES), grid.row),
                pl.BlockSpec((1, group, dim), grid.row),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(text_block, grid.text),
                pl.BlockSpec(text_block, grid.text),
                pl.BlockSpec((1, 1, tile), grid.text_seen),
            ],
            out_specs=[pl.BlockSpec((1, group, width), grid.row) for width in (LANES, dim)],
            scratch_shapes=[
                pltpu.VMEM((2, chunk * visual.rows, places, LANES), visual.words.dtype),
                pltpu.VMEM((2, *side.shape[2:]), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                *(pltpu.VMEM((group, width), jnp.float32) for width in (LANES, LANES, LANES, dim)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((rows, group, width), jnp.float32) for width in (LANES, dim)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=dispatch.interpreter() if spec.interpret else False,
        name="gaze_decode",
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        listed.count.reshape(rows),
        used,
        ids,
        ids,
        jnp.pad(grouped, ((0, 0), (0, 0), (0, LANES - dim))),
        grouped,
        words,
        side,
        text_k,
        text_v,
        text_seen.astype(jnp.float32)[:, None],
    )
    first = LANES // 2 if visual.joint else 0
    out = visual_out[..., first : first + dim] + text_out
    return out.reshape(q.shape).astype(q.dtype)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Block indices at a grid point (core, row of that core, tile), given the prefetched scalars."""

    kv_heads: int
    per_core: int
    lanes_are_tokens: bool

    def row(self, core: Any, inner: Any, tile: Any, *scalars: Any) -> Any:
        return core * self.per_core + inner, 0, 0

    def next_row(self, core: Any, inner: Any, tile: Any, *scalars: Any) -> Any:
        return core * self.per_core + jnp.minimum(inner + 1, self.per_core - 1), 0, 0

    def text_seen(self, core: Any, inner: Any, tile: Any, layer: Any, count: Any, used: Any) -> Any:
        b = (core * self.per_core + inner) // self.kv_heads
        # After the last tile in use its index repeats, and the pipeline fetches no block twice in a row.
        return b, 0, jnp.minimum(tile, jnp.maximum(used[b] - 1, 0))

    def text(self, core: Any, inner: Any, tile: Any, layer: Any, count: Any, used: Any) -> Any:
        b, _, at = self.text_seen(core, inner, tile, layer, count, used)
        place = (0, at) if self.lanes_are_tokens else (at, 0)
        return layer[0], b, (core * self.per_core + inner) % self.kv_heads, *place
