"""The Mosaic TPU kernel of gaze_decode; ``tpu.py`` prepares its arguments.

Grid: (cores, rows of a core, tiles of the text stream). A *row* is one kv head of one sequence. Its first
grid step attends to the regions that it lists, every step attends to one tile of the text stream, and the
last step writes the result. All of them update one online softmax in float32.

Regions are copied in chunks into two buffers: while one chunk is multiplied the next one is copied, and
the last chunk of a row overlaps with the first chunk of the core's next row. Tiles of the text stream come
through the block pipeline; tiles in which no key counts are neither fetched nor computed.

With every chunk comes a small float32 array, ``side``. It holds for each key the heads that read it (one
bit each, 0 for a key that no head may see) and, for int8, its scales. So the kernel computes no masks.

Axis letters besides B, K, G, D, L, R and S: C regions per chunk, W word rows per region and n values per
word (see ``tpu_layout.py``), N keys per chunk, E keys per tile of the text stream.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.gaze_decode.tpu_layout import LANES

# Pallas refs have no public type; the caller fills the bundles with arrays, BlockSpecs and scratch shapes.
Ref = Any
Scalar = jax.Array | int

_LOWEST = -0.5 * float(jnp.finfo(jnp.float32).max)


# The sections of the kernel's signature.


class Scalars(NamedTuple):
    """Scalar prefetch: whole arrays in SMEM. Index maps can read them too."""

    layer: Ref  # int32 [1]
    count: Ref  # int32 [B * K]: regions that the row lists
    tiles: Ref  # int32 [B]: tiles of the text stream up to the last key that counts


class Inputs(NamedTuple):
    """Inputs: blocks of the current row, except ``words`` and ``side``, which the kernel copies itself."""

    ids: Ref  # SMEM int32 [1, 1, chunks * C]: the row's regions, then -1
    next_ids: Ref  # SMEM int32 [1, 1, chunks * C]: the same for the core's next row
    visual_q: Ref  # VMEM [1, G, 128] in Static.compute: zero-padded to a word row's lanes
    text_q: Ref  # VMEM [1, G, D] in Static.compute
    words: Ref  # HBM [L, B, K, R, W + word rows of scales, n, 128] in the cache's dtype
    side: Ref  # HBM float32 [B * K, chunks, 1 or 3, N]: head bits and, for int8, scales of K and of V
    text_k: Ref  # VMEM [1, 1, 1, E, D], or [1, 1, 1, D, E] if Static.lanes_are_tokens
    text_v: Ref  # VMEM, same shape as text_k
    text_seen: Ref  # VMEM float32 [1, 1, E]: 1 for a key that counts, else 0


class Outputs(NamedTuple):
    """Outputs: the two parts of the attention output, normalised together, and their normaliser.

    The op returns the sum of the two.
    """

    visual: Ref  # VMEM float32 [1, G, 128]: in the lanes that hold V in a word row
    text: Ref  # VMEM float32 [1, G, D]
    lse: Ref  # VMEM float32 [1, G, 128]: log-sum-exp of the logits, the same in all lanes


class Buffers(NamedTuple):
    """Scratch: the double buffer for chunks of regions."""

    words: Ref  # VMEM [2, C * W, n, 128] in the cache's dtype
    side: Ref  # VMEM float32 [2, 1 or 3, N]
    first: Ref  # SMEM int32 [1]: the buffer of the row's first chunk, 0 or 1
    words_copied: Ref  # DMA semaphores [2]
    side_copied: Ref  # DMA semaphores [2]


class Softmax(NamedTuple):
    """Scratch: the online softmax of a row. All lanes of ``top`` are equal, and all lanes of ``total``."""

    top: Ref  # VMEM float32 [G, 128]: the largest logit so far
    total: Ref  # VMEM float32 [G, 128]: sum of exp(logit - top)
    visual_sum: Ref  # VMEM float32 [G, 128]: sum of exp(logit - top) * V over regions
    text_sum: Ref  # VMEM float32 [G, D]: the same over the text stream


@dataclasses.dataclass(frozen=True)
class Static:
    """Static arguments.

    Attributes:
      kv_heads: K.
      chunk: C.
      word_rows: W.
      joint: K and V of a token share the 128 lanes of a word row.
      compute: dtype of matmul operands. They accumulate in float32.
      scale: factor of the logits.
      interpret: run in the interpreter.
    """

    kv_heads: int
    chunk: int
    word_rows: int
    joint: bool
    compute: DTypeLike
    scale: float
    interpret: bool

    @property
    def lanes_are_tokens(self) -> bool:
        """Whether tiles of the text stream are [D, E]. XLA stores [S, 64] that way to avoid padding."""
        return self.joint


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
      chunks: int32, chunks that its regions fill.
    """

    number: jax.Array
    inner: jax.Array
    per_core: Scalar
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
    row = _Row(number, inner, per_core, (scalars.count[number] + static.chunk - 1) // static.chunk)

    @pl.when(tile == 0)
    def _() -> None:
        _reset(softmax)
        _attend_regions(static, refs, row)

    @pl.when(tile < scalars.tiles[number // static.kv_heads])
    def _() -> None:
        _attend(static, softmax, inputs.text_q, _text_keys(static, inputs), softmax.text_sum)

    @pl.when(tile == pl.num_programs(2) - 1)
    def _() -> None:
        _finish(softmax, outputs)


# Copies.


class _Chunk(NamedTuple):
    """A chunk of a row's regions and the buffer that it is copied to.

    Attributes:
      row: int32, among all B * K.
      ids: the row's regions, ``Inputs.ids`` or ``Inputs.next_ids``.
      index: int32, among the row's chunks.
      buffer: int32, 0 or 1.
    """

    row: jax.Array
    ids: Ref
    index: Any
    buffer: Scalar


def _for_each_copy(static: Static, refs: _Refs, chunk: _Chunk, act: Callable[[Any], None]) -> None:
    """Call ``act`` with each copy of a chunk: one per region in it, and one for its side array.

    The last chunk of a row may have fewer than C regions. A chunk without regions has no copies at all.
    """
    scalars, inputs, buffers = refs.scalars, refs.inputs, refs.buffers
    count = jnp.clip(scalars.count[chunk.row] - chunk.index * static.chunk, 0, static.chunk)

    def region(place: jax.Array, carry: Scalar) -> Scalar:
        number = chunk.ids[0, 0, chunk.index * static.chunk + place]
        # The word rows after the tokens hold scales. Those come with the side array.
        rows = pl.ds(0, static.word_rows)
        at = (scalars.layer[0], chunk.row // static.kv_heads, chunk.row % static.kv_heads, number, rows)
        source = inputs.words.at[at]
        target = buffers.words.at[chunk.buffer, pl.ds(place * static.word_rows, static.word_rows)]
        act(pltpu.make_async_copy(source, target, buffers.words_copied.at[chunk.buffer]))
        return carry

    jax.lax.fori_loop(0, count, region, 0)

    @pl.when(count > 0)
    def _() -> None:
        source, target = inputs.side.at[chunk.row, chunk.index], buffers.side.at[chunk.buffer]
        act(pltpu.make_async_copy(source, target, buffers.side_copied.at[chunk.buffer]))


def _start(static: Static, refs: _Refs, chunk: _Chunk) -> None:
    """Start the copies of a chunk."""
    _for_each_copy(static, refs, chunk, lambda copy: copy.start())


def _wait(static: Static, refs: _Refs, chunk: _Chunk) -> None:
    """Wait for the copies of a chunk. They must have been started for the same row, index and buffer."""
    _for_each_copy(static, refs, chunk, lambda copy: copy.wait())


# Keys and values.


class _Keys(NamedTuple):
    """Keys and values of one step of the softmax, X of them.

    Attributes:
      k, v: [X, D] in ``Static.compute``, or [D, X] if ``lanes_are_tokens``. ``v`` is 0 for a key that no
        head reads.
      seen: bool [G, X], whether a head reads a key.
      k_scale, v_scale: float32 [1, X], the scales of int8 values, or 1.
      lanes_are_tokens: k and v are [D, X].
    """

    k: jax.Array
    v: jax.Array
    seen: jax.Array
    k_scale: jax.Array | float = 1.0
    v_scale: jax.Array | float = 1.0
    lanes_are_tokens: bool = False


def split_words(words: Ref) -> list[jax.Array]:
    """Split each word into its n values, exactly.

    Args:
      words: reference, [rows, n, 128] in float32, bfloat16 or int8.

    Returns:
      n arrays, float32 [rows, 128].
    """
    rows = words.shape[0]
    if words.dtype == jnp.float32:
        flat = words.reshape(rows * 2, LANES)
        return [flat[pl.ds(place, rows, stride=2), :] for place in (0, 1)]
    return _split_bits(words.bitcast(jnp.int32).reshape(rows, LANES)[...], words.dtype)


def split_values(words: jax.Array) -> list[jax.Array]:
    """:func:`split_words` for an array. The interpreter cannot read a reference that was reshaped."""
    if words.dtype == jnp.float32:
        return [words[:, place] for place in (0, 1)]
    return _split_bits(jax.lax.bitcast_convert_type(jnp.swapaxes(words, 1, 2), jnp.int32), words.dtype)


def _split_bits(words: jax.Array, dtype: DTypeLike) -> list[jax.Array]:
    """Split int32 [rows, 128] into values of ``dtype``, lowest bits first."""
    if dtype == jnp.bfloat16:
        # A bfloat16 is the upper half of its float32.
        halves = (words << 16, words & jnp.int32(-65536))
        return [jax.lax.bitcast_convert_type(half, jnp.float32) for half in halves]
    return [((words << (24 - 8 * place)) >> 24).astype(jnp.float32) for place in range(4)]


def _column(row: jax.Array) -> jax.Array:
    """[1, X] to [X, 1]."""
    return jnp.transpose(jnp.broadcast_to(row, (8, row.shape[1])))[:, :1]


def _region_keys(static: Static, refs: _Refs, buffer: Scalar) -> _Keys:
    """Keys of the chunk in ``buffer``, in the order of ``tpu_layout.by_row``."""
    words = refs.buffers.words
    side = refs.buffers.side[buffer]
    places = split_values(words[buffer]) if static.interpret else split_words(words.at[buffer])
    heads = side[0:1].astype(jnp.int32)
    head = jax.lax.broadcasted_iota(jnp.int32, (refs.inputs.visual_q.shape[1], 1), 0)
    seen = ((heads >> head) & 1) == 1
    half = len(places) // (1 if static.joint else 2)
    k = jnp.concatenate(places[:half], axis=0) if half > 1 else places[0]
    v = k
    if not static.joint:
        v = jnp.concatenate(places[half:], axis=0) if half > 1 else places[1]
    # 0 * NaN is NaN. Invalid slots may hold NaN, and so may parts of the buffer that no region was
    # copied to.
    v = jnp.where(_column(heads.astype(jnp.float32)) > 0, v, 0.0)
    k = v if static.joint else k
    scales = (side[1:2], side[2:3]) if side.shape[0] > 1 else (1.0, 1.0)
    return _Keys(k.astype(static.compute), v.astype(static.compute), seen, *scales)


def _text_keys(static: Static, inputs: Inputs) -> _Keys:
    """Keys of the current tile of the text stream."""
    counts = inputs.text_seen[0]
    nonzero = (counts if static.lanes_are_tokens else _column(counts)) > 0
    # 0 * NaN is NaN, and keys that do not count may hold NaN.
    v = jnp.where(nonzero, inputs.text_v[0, 0, 0].astype(jnp.float32), 0.0).astype(static.compute)
    seen = jnp.broadcast_to(counts > 0, (inputs.text_q.shape[1], counts.shape[1]))
    k = inputs.text_k[0, 0, 0].astype(static.compute)
    return _Keys(k, v, seen, lanes_are_tokens=static.lanes_are_tokens)


# The phases of a row.


def _reset(softmax: Softmax) -> None:
    """Start the softmax of a row."""
    softmax.top[...] = jnp.full(softmax.top.shape, _LOWEST, jnp.float32)
    for ref in (softmax.total, softmax.visual_sum, softmax.text_sum):
        ref[...] = jnp.zeros(ref.shape, jnp.float32)


def _attend_regions(static: Static, refs: _Refs, row: _Row) -> None:
    """Attend to the row's regions chunk by chunk, and start the first copies of the core's next row."""
    first, ids, next_ids = refs.buffers.first, refs.inputs.ids, refs.inputs.next_ids

    @pl.when(row.inner == 0)
    def _() -> None:
        # The core's first row has no row before it that could have started its copies.
        first[0] = 0
        _start(static, refs, _Chunk(row.number, ids, index=0, buffer=0))

    def step(index: jax.Array, carry: Scalar) -> Scalar:
        buffer = (first[0] + index) % 2

        @pl.when(index + 1 < row.chunks)
        def _() -> None:
            _start(static, refs, _Chunk(row.number, ids, index=index + 1, buffer=1 - buffer))

        @pl.when((index + 1 == row.chunks) & row.has_next())
        def _() -> None:
            _start(static, refs, _Chunk(row.number + 1, next_ids, index=0, buffer=1 - buffer))

        _wait(static, refs, _Chunk(row.number, ids, index, buffer))
        keys = _region_keys(static, refs, buffer)
        _attend(static, refs.softmax, refs.inputs.visual_q, keys, refs.softmax.visual_sum)
        return carry

    jax.lax.fori_loop(0, row.chunks, step, 0)

    @pl.when((row.chunks == 0) & row.has_next())
    def _() -> None:
        _start(static, refs, _Chunk(row.number + 1, next_ids, index=0, buffer=first[0]))

    first[0] = (first[0] + row.chunks) % 2


def _attend(static: Static, softmax: Softmax, q: Ref, keys: _Keys, weighted: Ref) -> None:
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


def _finish(softmax: Softmax, outputs: Outputs) -> None:
    """Divide by the softmax's total. A head that saw no key gets 0."""
    select_per = 1.0 / jnp.where(softmax.total[:, :1] > 0, softmax.total[:, :1], 1.0)
    outputs.visual[0] = softmax.visual_sum[...] * select_per
    outputs.text[0] = softmax.text_sum[...] * select_per
    outputs.lse[0] = softmax.top[...] + jnp.log(softmax.total[...])
