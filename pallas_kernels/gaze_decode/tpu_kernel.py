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

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.gaze_decode.tpu_layout import LANES, SUBLANES

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


@dataclasses.dataclass(frozen=True)
class Static:
    """Static arguments.

    Attributes:
      kv_heads: K.
      chunk: C, a power of two.
      word_rows: W.
      scale_rows: word rows of a region that hold scales, its last ones; 0 but for int8.
      slots: P.
      joint: K and V of a token share the 128 lanes of a word row.
      compute: dtype of matmul operands. They accumulate in float32.
      scale: factor of the logits.
      interpret: run in the interpreter.
    """

    kv_heads: int
    chunk: int
    word_rows: int
    scale_rows: int
    slots: int
    joint: bool
    compute: DTypeLike
    scale: float
    interpret: bool

    @property
    def lanes_are_tokens(self) -> bool:
        """Whether tiles of the text stream are [D, E]. XLA stores [S, 64] that way to avoid padding."""
        return self.joint

    @property
    def part(self) -> int:
        """Regions of one step of the softmax: half of a large chunk, as the last one may not be full."""
        return self.chunk // 2 if self.chunk > 8 else self.chunk

    @property
    def starts(self) -> int:
        """Copies that are started between two tests of a loop; the interpreter compiles each for itself."""
        return 2 if self.interpret else 8


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
      count: int32, regions that it lists.
      chunks: int32, chunks that these fill.
    """

    number: jax.Array
    inner: jax.Array
    per_core: Scalar
    count: jax.Array
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
        _attend(static, softmax, inputs.text_q, _text_keys(static, inputs), softmax.text_sum)

    @pl.when(tile == pl.num_programs(2) - 1)
    def _() -> None:
        _finish(static, softmax, outputs)


# Copies.


class _Chunk(NamedTuple):
    """A chunk of a row's regions and the buffer that it is copied to.

    Attributes:
      row: int32, among all B * K.
      count: int32, its regions, at most C.
      region: from a place among them to the region's number.
      buffer: int32, 0 or 1.
    """

    row: jax.Array
    count: jax.Array
    region: Callable[[jax.Array], jax.Array]
    buffer: Scalar


def _count(ids: Ref) -> jax.Array:
    """The number of regions of a row."""
    return ids[0, 0, 0, ids.shape[-1] - 1]


def _own(static: Static, refs: _Refs, row: _Row, index: Scalar, buffer: Scalar) -> _Chunk:
    """Chunk ``index`` of the current row; the last one may have fewer regions than C."""
    first = index * static.chunk
    count = jnp.clip(row.count - first, 0, static.chunk)
    return _Chunk(row.number, count, lambda place: refs.inputs.ids[0, 0, 0, first + place], buffer)


def _following(static: Static, refs: _Refs, row: _Row, index: jax.Array, buffer: Scalar) -> _Chunk:
    """The chunk after the current row's chunk ``index``: maybe the first one of the core's next row, or empty."""
    ids, next_ids = refs.inputs.ids, refs.inputs.next_ids
    last = index + 1 >= row.chunks
    first = jnp.where(last, 0, (index + 1) * static.chunk)
    left = jnp.where(last, jnp.where(row.has_next(), _count(next_ids), 0), row.count - first)
    return _Chunk(
        row=row.number + jnp.where(last, 1, 0),
        count=jnp.minimum(left, static.chunk),
        region=lambda place: jnp.where(last, next_ids[0, 0, 0, place], ids[0, 0, 0, first + place]),
        buffer=buffer,
    )


def _start(static: Static, refs: _Refs, chunk: _Chunk) -> None:
    """Start the copies of a chunk, one per region."""
    words, buffers = refs.inputs.words, refs.buffers
    layer = refs.scalars.layer[0]
    b, head = chunk.row // static.kv_heads, chunk.row % static.kv_heads

    def region(place: jax.Array) -> None:
        source = words.at[layer, b, head, chunk.region(place)]
        target = buffers.words.at[chunk.buffer, pl.ds(place * static.word_rows, static.word_rows)]
        pltpu.make_async_copy(source, target, buffers.copied.at[chunk.buffer]).start()

    def several(block: jax.Array, carry: int) -> int:
        for place in range(static.starts):
            region(block * static.starts + place)
        return carry

    def one(place: jax.Array, carry: int) -> int:
        region(place)
        return carry

    blocks = chunk.count // static.starts
    jax.lax.fori_loop(0, blocks, several, 0)
    jax.lax.fori_loop(blocks * static.starts, chunk.count, one, 0)


def _wait(static: Static, refs: _Refs, chunk: _Chunk) -> None:
    """Wait for the copies of a chunk, all of which must have been started.

    A semaphore counts bytes, so one wait of a full chunk's size is for all of its copies. Otherwise there is
    one per bit of their number.
    """
    words, size = refs.buffers.words, static.chunk
    while size:
        # Only the size counts: the copies of this wait are any of the chunk's.
        whole = words.at[chunk.buffer, pl.ds(0, size * static.word_rows)]

        @pl.when((chunk.count & size) != 0)
        def _(whole: Ref = whole) -> None:
            pltpu.make_async_copy(whole, whole, refs.buffers.copied.at[chunk.buffer]).wait()

        size //= 2


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


def _region_keys(static: Static, refs: _Refs, buffer: Scalar, first: Any, part: int) -> list[_Keys]:
    """Keys of a part of the chunk in ``buffer``, one group for each token of a word row.

    Args:
      static: static arguments.
      refs: references.
      buffer: int32, 0 or 1.
      first: int32, the place of the chunk in the row's list.
      part: which part; X of a group is its number of word rows.
    """
    rows = static.part * static.word_rows
    words = refs.buffers.words.at[buffer, pl.ds(part * rows, rows)]
    values = words[...] if static.interpret else None
    places = split_words(words) if values is None else split_values(values)
    tokens = len(places) // (1 if static.joint else 2)
    region, row = _divided(jax.lax.broadcasted_iota(jnp.int32, (1, rows), 1), static.word_rows)
    mine = jax.lax.broadcasted_iota(jnp.int32, (static.part, rows), 0) == region

    def spread(values: jax.Array) -> jax.Array:
        """[regions, 1 or X], of each region, to [1, X]: of each key's own region."""
        return jnp.sum(jnp.where(mine, values, 0), axis=0, keepdims=True)

    facts = _facts(static, refs.inputs.side, first + part * static.part)
    heads, *seen = (spread(facts[:, i : i + 1]) for i in range(1 + -(-static.slots // 32)))
    head = jax.lax.broadcasted_iota(jnp.int32, (refs.inputs.visual_q.shape[1], 1), 0)
    scales = _scales(static, words, values) if static.scale_rows else None
    groups = []
    for token in range(tokens):
        slot = row * tokens + token
        bits = seen[0]
        for word in range(1, len(seen)):
            bits = jnp.where(slot >= 32 * word, seen[word], bits)
        counts = (slot < static.slots) & (row < static.word_rows - static.scale_rows)
        read = jnp.where(counts & (((bits >> (slot & 31)) & 1) == 1), heads, 0)
        v = places[token] if static.joint else places[tokens + token]
        # 0 * NaN is NaN. Invalid slots may hold NaN, and so may parts of the buffer that no region was
        # copied to.
        v = jnp.where(_column(read.astype(jnp.float32)) > 0, v, 0.0)
        k = v if static.joint else places[token]
        factors = (1.0, 1.0)
        if scales is not None:
            width = static.word_rows - static.scale_rows
            offsets = ((side * tokens + token) * width for side in (0, 1))
            factors = tuple(
                jnp.where(read > 0, spread(_aligned(scales, at, static.word_rows, rows)), 0.0) for at in offsets
            )
        keys = (k.astype(static.compute), v.astype(static.compute), ((read >> head) & 1) == 1)
        groups.append(_Keys(*keys, *factors))
    return groups


def _divided(number: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of small int32 numbers."""
    quotient = jnp.floor((number.astype(jnp.float32) + 0.5) * (1.0 / by)).astype(jnp.int32)
    return quotient, number - quotient * by


def _facts(static: Static, side: Ref, first: jax.Array) -> jax.Array:
    """int32 [regions of a part, Y]: what ``side`` holds from place ``first`` on."""
    start = pl.multiple_of(first // LANES * LANES, LANES)
    lanes = side[0, 0, :, pl.ds(start, LANES)]
    # A part never crosses registers, as its size divides the lanes.
    lanes = pltpu.roll(lanes, (LANES - first % LANES) % LANES, 1)
    return jnp.transpose(lanes)[: static.part]


def _scales(static: Static, words: Ref, values: jax.Array | None) -> jax.Array:
    """float32 [regions of a part, 128 per word row of scales]."""
    tokens = static.word_rows - static.scale_rows
    if values is not None:
        regions = values.reshape(static.part, static.word_rows, *values.shape[1:])
        bytes_last = jnp.swapaxes(regions[:, tokens:], 2, 3)
        return jax.lax.bitcast_convert_type(bytes_last, jnp.float32).reshape(static.part, -1)
    flat = words.bitcast(jnp.int32).reshape(words.shape[0], LANES)
    rows = [
        flat[pl.ds(tokens + row, static.part, stride=static.word_rows), :] for row in range(static.scale_rows)
    ]
    return jax.lax.bitcast_convert_type(jnp.concatenate(rows, axis=1), jnp.float32)


def _aligned(scales: jax.Array, offset: int, word_rows: int, keys: int) -> jax.Array:
    """[regions, X]: the scales from lane ``offset`` on, of each region where its own keys are."""
    width = scales.shape[1]
    most = (LANES - 1) // (SUBLANES - 1)  # the last sublane of a register is rolled once around it at most
    registers = []
    for first in range(0, scales.shape[0], SUBLANES):
        register = pltpu.roll(scales[first : first + SUBLANES], (first * word_rows - offset) % width, 1)
        for start in range(0, word_rows, most):
            stride = min(most, word_rows - start)
            register = pltpu.roll(register, 0, 1, stride=stride, stride_axis=0)
        registers.append(register)
    rolled = jnp.concatenate(registers, axis=0)
    return jnp.concatenate([rolled] * -(-keys // width), axis=1)[:, :keys]


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

            @pl.when(place + part * static.part < row.count)
            def _(part: int = part) -> None:
                for keys in _region_keys(static, refs, buffer, place, part):
                    _attend(static, refs.softmax, refs.inputs.visual_q, keys, refs.softmax.visual_sum)

        return carry

    # A row without regions takes one step too, which starts the copies of the next one.
    steps = jnp.maximum(row.chunks, 1)
    jax.lax.fori_loop(0, steps, step, 0)
    first[0] = (first[0] + steps) % 2


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


def _finish(static: Static, softmax: Softmax, outputs: Outputs) -> None:
    """Add up both sums and divide by the softmax's total. A head that saw no key gets 0."""
    first, dim = LANES // 2 if static.joint else 0, outputs.out.shape[-1]
    share = 1.0 / jnp.where(softmax.total[:, :1] > 0, softmax.total[:, :1], 1.0)
    visual = softmax.visual_sum[:, first : first + dim]  # the lanes that hold V in a word row
    outputs.out[0] = ((visual + softmax.text_sum[...]) * share).astype(outputs.out.dtype)
    outputs.lse[0] = softmax.top[...] + jnp.log(softmax.total[...])
