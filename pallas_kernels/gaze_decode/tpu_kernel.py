"""The Mosaic TPU kernel of gaze_decode; ``tpu.py`` prepares its arguments.

Grid: (cores, rows of a core, tiles of the text stream). A *row* is one kv head of one sequence. Its first
grid step attends to the regions that it lists, every step attends to one tile of the text stream, and the
last step writes the result. All of them update one online softmax in float32.

Regions are copied in chunks into two buffers: while one chunk is multiplied the next one is copied, and
the last chunk of a row overlaps with the first chunk of the core's next row. Tiles of the text stream come
through the block pipeline; tiles in which no key counts are neither fetched nor computed.

The list of a row has for each region the query heads that read it and the slots of it that count, as bits.
A chunk spreads them over its keys: one key is a lane, its region's bits are a sublane, and a sum over
sublanes picks the region that the key belongs to. The scales of an int8 region are spread alike; they are
word rows of the region and come with its copy.

Axis letters besides B, K, G, D, L, R and S: C regions per chunk, W word rows per region with those of scales,
n values per word (see ``tpu_layout.py``), X keys of one step of the softmax, E keys per tile of the text
stream, U regions of a list as it is stored, Y rows of ``Inputs.side``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gaze_decode.tpu_keys import Keys, Static, region_keys, text_keys
from pallas_kernels.gaze_decode.tpu_layout import LANES

# Pallas refs have no public type; the caller fills the bundles with arrays, BlockSpecs and scratch shapes.
Ref = Any
Scalar = jax.Array | int

_LOWEST = -0.5 * float(jnp.finfo(jnp.float32).max)


# The sections of the kernel's signature.


class Scalars(NamedTuple):
    """Scalar prefetch: whole arrays in SMEM. Index maps can read them too."""

    layer: Ref  # int32 [1]
    tiles: Ref  # int32 [B]: tiles of the text stream up to the last key that counts


class Inputs(NamedTuple):
    """Inputs: blocks of the current row, except ``words``, which the kernel copies itself."""

    ids: Ref  # SMEM int32 [1, 1, 1, U]: the row's regions, then -1; their number in the last place
    next_ids: Ref  # SMEM int32 [1, 1, 1, U]: the same for the core's next row
    side: Ref  # VMEM int32 [1, 1, Y, U]: head bits of each region, then words with a bit per slot that counts
    visual_q: Ref  # VMEM [1, G, 128] in Static.compute: zero-padded to a word row's lanes
    text_q: Ref  # VMEM [1, G, D] in Static.compute
    words: Ref  # HBM [L, B, K, R, W, n, 128] in the cache's dtype
    text_k: Ref  # VMEM [1, 1, 1, E, D], or [1, 1, 1, D, E] if Static.lanes_are_tokens
    text_v: Ref  # VMEM, same shape as text_k
    text_seen: Ref  # VMEM float32 [1, 1, E]: 1 for a key that counts, else 0


class Outputs(NamedTuple):
    """Outputs."""

    out: Ref  # VMEM [1, G, D]
    lse: Ref  # VMEM float32 [1, G, 128]: log-sum-exp of the logits, the same in all lanes


class Buffers(NamedTuple):
    """Scratch: the double buffer for chunks of regions."""

    words: Ref  # VMEM [2, C * W, n, 128] in the cache's dtype
    first: Ref  # SMEM int32 [1]: the buffer of the row's first chunk, 0 or 1
    copied: Ref  # DMA semaphores [2]


class Softmax(NamedTuple):
    """Scratch: the online softmax of a row. All lanes of ``top`` are equal, and all lanes of ``total``."""

    top: Ref  # VMEM float32 [G, 128]: the largest logit so far
    total: Ref  # VMEM float32 [G, 128]: sum of exp(logit - top)
    visual_sum: Ref  # VMEM float32 [G, 128]: sum of exp(logit - top) * V over regions
    text_sum: Ref  # VMEM float32 [G, D]: the same over the text stream


class _Refs(NamedTuple):
    """All references of the kernel."""

    scalars: Scalars
    inputs: Inputs
    outputs: Outputs
    buffers: Buffers
    softmax: Softmax


class _Row(NamedTuple):
    """The row that a grid step works on.

    Attributes:
      number: int32, among all B * K.
      inner: int32, among the rows of its core.
      per_core: int32, rows of a core.
      regions: int32, regions that it lists.
      chunks: int32, chunks that these fill.
    """

    number: jax.Array
    inner: jax.Array
    per_core: Scalar
    regions: jax.Array
    chunks: jax.Array

    def has_next(self) -> jax.Array:
        """Whether this is not the core's last row."""
        return self.inner + 1 < self.per_core


def kernel(
    static: Static,
    scalars: Scalars,
    inputs: Inputs,
    outputs: Outputs,
    buffers: Buffers,
    softmax: Softmax,
) -> None:
    """One grid step: a tile of the text stream and, in a row's first step, all of the row's regions."""
    refs = _Refs(scalars, inputs, outputs, buffers, softmax)
    inner, tile = pl.program_id(1), pl.program_id(2)
    per_core = pl.num_programs(1)
    number = pl.program_id(0) * per_core + inner
    count = _count(inputs.ids)
    row = _Row(number, inner, per_core, count, (count + static.chunk - 1) // static.chunk)

    @pl.when(tile == 0)
    def _() -> None:
        _reset(softmax)
        _attend_regions(static, refs, row)

    @pl.when(tile < scalars.tiles[number // static.kv_heads])
    def _() -> None:
        tile_of = (inputs.text_k, inputs.text_v, inputs.text_seen)
        keys = text_keys(static, *tile_of, inputs.text_q.shape[1])
        _attend(static, softmax, inputs.text_q, keys, softmax.text_sum)

    @pl.when(tile == pl.num_programs(2) - 1)
    def _() -> None:
        _finish(static, softmax, outputs)


# Copies.


class _Chunk(NamedTuple):
    """A chunk of a row's regions and the buffer that it is copied to.

    Attributes:
      row: int32, among all B * K.
      regions: int32, how many, at most C.
      number: from a place among them to the region's number.
      buffer: int32, 0 or 1.
    """

    row: jax.Array
    regions: jax.Array
    number: Callable[[jax.Array], jax.Array]
    buffer: Scalar


def _count(ids: Ref) -> jax.Array:
    """The number of regions of a row."""
    return ids[0, 0, 0, ids.shape[-1] - 1]


def _own(static: Static, refs: _Refs, row: _Row, index: Scalar, buffer: Scalar) -> _Chunk:
    """Chunk ``index`` of the current row; the last one may have fewer regions than C."""
    first = index * static.chunk
    count = jnp.clip(row.regions - first, 0, static.chunk)
    return _Chunk(row.number, count, lambda place: refs.inputs.ids[0, 0, 0, first + place], buffer)


def _following(static: Static, refs: _Refs, row: _Row, index: jax.Array, buffer: Scalar) -> _Chunk:
    """The chunk after chunk ``index`` of the current row: maybe the next row's first one, or an empty one."""
    ids, next_ids = refs.inputs.ids, refs.inputs.next_ids
    last = index + 1 >= row.chunks
    first = jnp.where(last, 0, (index + 1) * static.chunk)
    left = jnp.where(last, jnp.where(row.has_next(), _count(next_ids), 0), row.regions - first)
    return _Chunk(
        row=row.number + jnp.where(last, 1, 0),
        regions=jnp.minimum(left, static.chunk),
        number=lambda place: jnp.where(last, next_ids[0, 0, 0, place], ids[0, 0, 0, first + place]),
        buffer=buffer,
    )


def _start(static: Static, refs: _Refs, chunk: _Chunk) -> None:
    """Start the copies of a chunk, one per region."""
    words, buffers = refs.inputs.words, refs.buffers
    layer = refs.scalars.layer[0]
    b, head = chunk.row // static.kv_heads, chunk.row % static.kv_heads

    def region(place: jax.Array) -> None:
        source = words.at[layer, b, head, chunk.number(place)]
        target = buffers.words.at[chunk.buffer, pl.ds(place * static.word_rows, static.word_rows)]
        pltpu.make_async_copy(source, target, buffers.copied.at[chunk.buffer]).start()

    def several(block: jax.Array, carry: int) -> int:
        for place in range(static.starts):
            region(block * static.starts + place)
        return carry

    def one(place: jax.Array, carry: int) -> int:
        region(place)
        return carry

    blocks = chunk.regions // static.starts
    jax.lax.fori_loop(0, blocks, several, 0)
    jax.lax.fori_loop(blocks * static.starts, chunk.regions, one, 0)


def _wait(static: Static, refs: _Refs, chunk: _Chunk) -> None:
    """Wait for the copies of a chunk, all of which must have been started.

    A semaphore counts bytes, so one wait of a full chunk's size is for all of its copies. Otherwise there is
    one per bit of their number.
    """
    words, size = refs.buffers.words, static.chunk
    while size:
        # Only the size counts: the copies of this wait are any of the chunk's.
        whole = words.at[chunk.buffer, pl.ds(0, size * static.word_rows)]

        @pl.when((chunk.regions & size) != 0)
        def _(whole: Ref = whole) -> None:
            pltpu.make_async_copy(whole, whole, refs.buffers.copied.at[chunk.buffer]).wait()

        size //= 2


# The phases of a row.


def _reset(softmax: Softmax) -> None:
    """Start the softmax of a row."""
    softmax.top[...] = jnp.full(softmax.top.shape, _LOWEST, jnp.float32)
    for ref in (softmax.total, softmax.visual_sum, softmax.text_sum):
        ref[...] = jnp.zeros(ref.shape, jnp.float32)


def _attend_regions(static: Static, refs: _Refs, row: _Row) -> None:
    """Attend to the row's regions chunk by chunk, and start the first copies of the core's next row."""
    first = refs.buffers.first

    @pl.when(row.inner == 0)
    def _() -> None:
        # The core's first row has no row before it that could have started its copies.
        first[0] = 0
        _start(static, refs, _own(static, refs, row, index=0, buffer=0))

    def step(index: jax.Array, carry: Scalar) -> Scalar:
        buffer = (first[0] + index) % 2
        _start(static, refs, _following(static, refs, row, index, 1 - buffer))
        _wait(static, refs, _own(static, refs, row, index, buffer))
        place = index * static.chunk
        for part in range(static.chunk // static.part):

            @pl.when(place + part * static.part < row.regions)
            def _(part: int = part) -> None:
                rows, q = static.part * static.word_rows, refs.inputs.visual_q
                words = refs.buffers.words.at[buffer, pl.ds(part * rows, rows)]
                here = place + part * static.part
                for keys in region_keys(static, words, refs.inputs.side, q.shape[1], here):
                    _attend(static, refs.softmax, q, keys, refs.softmax.visual_sum)

        return carry

    # A row without regions takes one step too, which starts the copies of the next one.
    steps = jnp.maximum(row.chunks, 1)
    jax.lax.fori_loop(0, steps, step, 0)
    first[0] = (first[0] + steps) % 2


def _attend(static: Static, softmax: Softmax, q: Ref, keys: Keys, weighted: Ref) -> None:
    """One step of the online softmax.

    Args:
      static: static arguments.
      softmax: the state, updated in place.
      q: reference, [1, G, D].
      keys: keys and values of this step.
      weighted: the sum in ``softmax`` to which the weighted values are added.
    """
    token, channel = (1, 0) if keys.lanes_are_tokens else (0, 1)
    dot = functools.partial(
        jax.lax.dot_general,
        precision=jax.lax.Precision.HIGHEST if static.compute == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    logits = dot(q[0], keys.k, (((1,), (channel,)), ((), ())))
    logits = jnp.where(keys.seen, logits * (static.scale * keys.k_scale), _LOWEST)
    before = softmax.top[:, :1]
    now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
    shrink = jnp.exp(before - now)
    weights = jnp.where(keys.seen, jnp.exp(logits - now), 0.0)
    softmax.top[...] = jnp.broadcast_to(now, softmax.top.shape)
    softmax.total[...] = softmax.total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
    softmax.visual_sum[...] *= shrink
    softmax.text_sum[...] *= shrink
    weights = (weights * keys.v_scale).astype(static.compute)
    weighted[...] += dot(weights, keys.v, (((1,), (token,)), ((), ())))


def _finish(static: Static, softmax: Softmax, outputs: Outputs) -> None:
    """Add up both sums and divide by the softmax's total. A head that saw no key gets 0."""
    first, dim = LANES // 2 if static.joint else 0, outputs.out.shape[-1]
    factor = 1.0 / jnp.where(softmax.total[:, :1] > 0, softmax.total[:, :1], 1.0)
    visual = softmax.visual_sum[:, first : first + dim]  # the lanes that hold V in a word row
    outputs.out[0] = ((visual + softmax.text_sum[...]) * factor).astype(outputs.out.dtype)
    outputs.lse[0] = softmax.top[...] + jnp.log(softmax.total[...])
