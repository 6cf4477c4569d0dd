"""Attention in blocks of queries and chunks of keys, of which only those are computed that may be seen.

A block of queries visits the chunks that one of its queries may see, in a loop whose number of turns is known
when it runs: half of all chunks in causal attention, those of a few views with ``visual_scope="view"``. For
each it updates a running maximum, sum and output (online softmax, arXiv 1805.02867), so the logits of one
block and one chunk are in memory at once; on a CPU they stay in its cache. The backward pass visits the same
chunks and computes the weights again, from the log-sum-exp.

Rows of a batch are taken one after the other, each with its own list of chunks.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels.gaze_prefill.rows import Keys, by_query, queries_of, rows_of
from pallas_kernels.softmax import WithLse, finished
from pallas_kernels.spec import GazeSpec, KeyPlaces, Windows

Array = jax.Array
_State = TypeVar("_State")

CHUNK = 512
"""Keys of a chunk, at most; whole regions of the visual stream."""

VIEW = 128
"""Queries of a block and keys of a chunk where much is unseen: less is computed beside what is seen."""

_LOGITS = 1 << 20  # maximum number of logits at once: 4 MB
_EXACT = jax.lax.Precision.HIGHEST  # float32 stays float32 on TPU; bfloat16 inputs are not affected


def queries_at_once(most: int, heads: int, keys: int) -> int:
    """T of a block: at most ``most``, and small enough that its logits for a chunk stay in cache."""
    return max(1, min(most, max(16, _LOGITS // (heads * keys))))


Pair = tuple[Array, Array]
"""Keys and values of a stream in chunks, [B, chunks, K, C, D] each."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Places:
    """Where the keys of a stream are, int32 [B, chunks, C], and what of them is not finite."""

    order: Array
    segment: Array
    poison: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Block:
    """What blocks of queries see of a stream; every array has an axis of blocks in front.

    Attributes:
      row: int32 [], the row of the batch that a block belongs to.
      segment, lo, hi: int32 [T], windows of the queries.
      visits: int32 [chunks], first the chunks that a block visits.
      count: int32 [], how many those are.
      open: bool [chunks, Hs, T, regions of a chunk], whether a query may see a region; None: all.
    """

    row: Array
    segment: Array
    lo: Array
    hi: Array
    visits: Array
    count: Array
    open: Array | None


def attend(
    q: Array,
    visual: Keys,
    text: Keys,
    queries: Windows,
    places: KeyPlaces,
    selected: Array | None,
    *,
    spec: GazeSpec,
) -> WithLse:
    """Attend with one softmax over both streams of keys.

    Args:
      q: [B, T, H, D].
      visual: [B, K, R, P, ...].
      text: [B, K, S, ...].
      queries, places, selected, spec: as for :func:`pallas_kernels.gaze_prefill.api.gaze_prefill`.

    Returns:
      [B, T, H, D] in the dtype of ``q`` and float32 [B, T, H]; see :data:`pallas_kernels.softmax.WithLse`.
    """
    batch, length, heads, _ = q.shape
    chunk = min(VIEW, CHUNK) if spec.local else CHUNK
    most = min(spec.query_block, VIEW) if spec.local else spec.query_block
    block = min(queries_at_once(most, heads, chunk), length)
    blocked = functools.partial(_blocked, block=block)
    # What fills up the last block is zeros, so its segment is 0; set it to -1 so that it sees nothing.
    alive = blocked(jnp.ones((batch, length), bool))
    windows: Windows = jax.tree.map(blocked, queries)
    windows = dataclasses.replace(windows, segment=jnp.where(alive, windows.segment, -1))
    rows = rows_of(blocked(q), visual.k.shape[1])
    found = []
    if visual.k.shape[2] * visual.k.shape[3]:
        opened = None if selected is None else blocked(selected | ~queries.routed[:, :, None, None])
        found.append(_visual(visual, places, opened, windows, chunk))
    if text.k.shape[2]:
        ends = (windows.text_lo, windows.text_hi)
        found.append(_stream(text, places.text_order, places.text_segment, windows.segment, ends, chunk))
    pairs, where, blocks = (tuple(stream[i] for stream in found) for i in range(3))
    out, lse = _attend(spec.scale, rows, pairs, where, blocks)

    def joined(a: Array) -> Array:
        return a.reshape(batch, -1, *a.shape[2:])[:, :length]

    shape = (rows.shape[0], block, *q.shape[2:])
    return joined(queries_of(out, shape)), joined(by_query(lse, shape))


def _blocked(a: Array, block: int) -> Array:
    """[B, T, ...] to [B * blocks, block, ...], filled up with zeros."""
    count = -(-a.shape[1] // block)
    a = jnp.pad(a, [(0, 0), (0, count * block - a.shape[1]), *[(0, 0)] * (a.ndim - 2)])
    return a.reshape(-1, block, *a.shape[2:])


def _cut(a: Array, axis: int, chunk: int, fill: int = 0) -> Array:
    """Cut ``axis`` into chunks, the last filled up, and move the axis of chunks to 1."""
    count = -(-a.shape[axis] // chunk)
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, count * chunk - a.shape[axis])
    shape = (*a.shape[:axis], count, chunk, *a.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(a, widths, constant_values=fill).reshape(shape), axis, 1)


_Stream = tuple[Pair, _Places, _Block]


def _visual(keys: Keys, places: KeyPlaces, opened: Array | None, windows: Windows, chunk: int) -> _Stream:
    """The visual stream in chunks of whole regions; a region larger than a chunk is cut into several."""
    order, segment = places.visual_order, places.region_segment
    slots = order.shape[2]
    pieces = -(-slots // chunk)
    if pieces > 1:
        size = -(-slots // pieces)

        def split(a: Array, axis: int, fill: int = 0) -> Array:
            """[..., R, P, ...] to [..., R * pieces, size, ...], R being ``axis``."""
            widths = [(0, 0)] * a.ndim
            widths[axis + 1] = (0, pieces * size - slots)
            a = jnp.pad(a, widths, constant_values=fill)
            return a.reshape(*a.shape[:axis], a.shape[axis] * pieces, size, *a.shape[axis + 2 :])

        keys, order = jax.tree.map(lambda a: split(a, 2), keys), split(order, 1, -1)
        segment = jnp.repeat(segment, pieces, axis=1)
        opened = None if opened is None else jnp.repeat(opened, pieces, axis=-1)
        slots = size
    regions = min(chunk // slots, order.shape[1])
    if opened is not None:
        opened = jnp.moveaxis(_cut(opened, 3, regions), 2, 3)  # [blocks, chunks, Hs, T, regions]
    flat: Keys = jax.tree.map(lambda a: a.reshape(*a.shape[:2], -1, *a.shape[4:]), keys)
    segment = jnp.repeat(segment, slots, axis=1)
    ends = (windows.visual_lo, windows.visual_hi)
    return _stream(
        flat, order.reshape(segment.shape), segment, windows.segment, ends, regions * slots, opened
    )


def _stream(
    keys: Keys,
    order: Array,
    segment: Array,
    mine: Array,
    ends: Pair,
    chunk: int,
    opened: Array | None = None,
) -> _Stream:
    """A stream of keys [B, K, N, ...] with order and segment [B, N], in chunks.

    ``mine`` and ``ends`` are the segment and the windows' ends of the queries, [blocks, T]; ``opened`` as in
    :class:`_Block`.
    """
    chunk = min(chunk, order.shape[1])
    cut: Keys = jax.tree.map(lambda a: _cut(a, 2, chunk), keys)
    batch = order.shape[0]
    where = _Places(_cut(order, 1, chunk, -1), _cut(segment, 1, chunk, -1), cut.poison)
    row = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), mine.shape[0] // batch)
    seen = visited(where.order, where.segment, row, mine, ends, opened)
    block = _Block(
        row=row,
        segment=mine,
        lo=ends[0],
        hi=ends[1],
        visits=jnp.argsort(~seen, axis=1, stable=True).astype(jnp.int32),
        count=jnp.sum(seen, axis=1, dtype=jnp.int32),
        open=opened,
    )
    return (cut.k, cut.v), where, block


def visited(order: Array, segment: Array, row: Array, mine: Array, ends: Pair, opened: Array | None) -> Array:
    """Whether a query of a block may see a key of a chunk, judged by the chunk's first and last key.

    Args:
      order, segment: int32 [B, chunks, C] of the keys; order -1 is no key.
      row: int32 [blocks].
      mine: int32 [blocks, T], segment of the queries.
      ends: int32 [blocks, T] each, the windows.
      opened: bool [blocks, chunks, Hs, T, regions] or None.

    Returns:
      bool [blocks, chunks].
    """
    key = order >= 0
    highest = jnp.iinfo(jnp.int32).max

    def bounds(a: Array) -> Pair:
        """[blocks, 1, chunks] each; no key has none."""
        first = jnp.min(jnp.where(key, a, highest), axis=2)
        last = jnp.max(jnp.where(key, a, -1), axis=2)
        return first[row][:, None], last[row][:, None]

    (first, last), (first_segment, last_segment) = bounds(order), bounds(segment)
    mine, lo, hi = (a[:, :, None] for a in (mine, *ends))
    near = (mine >= 0) & (mine >= first_segment) & (mine <= last_segment) & (lo <= last) & (hi >= first)
    if opened is not None:
        near &= jnp.swapaxes(jnp.any(opened, axis=(2, 4)), 1, 2)
    return jnp.any(near, axis=1)


def _product(axes: str, left: Array, right: Array) -> Array:
    return jnp.einsum(axes, left, right, precision=_EXACT, preferred_element_type=jnp.float32)


def _at(a: Array, row: Array, chunk: Array) -> Array:
    """a[row, chunk]."""
    return jax.lax.dynamic_slice(a, (row, chunk, *[0] * (a.ndim - 2)), (1, 1, *a.shape[2:]))[0, 0]


def _logits(scale: float, rows: Array, keys: Array, poison: Array, seen: "_Seen") -> Array:
    """float32 [K, G, T, regions, slots] of queries [K, G * T, D] and keys [K, C, D], -inf where unseen.

    XLA's CPU backend makes fast loops over the slots of a region where there are two masks, each in its own
    shape, and no array of all keys of a chunk on the way.
    """
    near, opened = seen
    length, regions, slots = near.shape
    logits = _product("KMD,KND->KMN", rows, keys).reshape(rows.shape[0], -1, length, regions, slots)
    logits = logits * scale + poison.reshape(-1, 1, 1, regions, slots)
    if opened is not None:
        logits = jnp.where(opened.reshape(rows.shape[0], -1, length, regions, 1), logits, -jnp.inf)
    return jnp.where(near, logits, -jnp.inf)


_Seen = tuple[Array, Array | None]
"""bool [T, regions, slots], whether a key is in a query's window; and [Hs, T, regions], whether a region is
open to it. Without the latter a chunk is one region."""


def _seen(where: _Places, block: _Block, chunk: Array) -> _Seen:
    """What the queries of a block see of a chunk."""
    order, segment = (_at(a, block.row, chunk)[None] for a in (where.order, where.segment))
    mine, lo, hi = (a[:, None] for a in (block.segment, block.lo, block.hi))
    near = (segment == mine) & (mine >= 0) & (order >= jnp.maximum(lo, 0)) & (order <= hi)
    if block.open is None:
        return near[:, None], None
    opened = jax.lax.dynamic_index_in_dim(block.open, chunk, keepdims=False)
    return near.reshape(near.shape[0], opened.shape[2], -1), opened


def _per_row(a: Array, like: Array) -> Array:
    """[K, G * T, 1] to the shape of logits, [K, G, T, 1, 1]."""
    return a.reshape(*like.shape[:3], 1, 1)


def _by_row(a: Array) -> Array:
    """[K, G, T, regions, slots] to [K, G * T, C]."""
    return a.reshape(a.shape[0], a.shape[1] * a.shape[2], -1)


def _turns(block: _Block, body: Callable[[Array, _State], _State], state: _State) -> _State:
    """Run ``body`` for every chunk that a block visits."""
    return jax.lax.fori_loop(0, block.count, lambda i, state: body(block.visits[i], state), state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    scale: float,
    rows: Array,
    pairs: tuple[Pair, ...],
    where: tuple[_Places, ...],
    blocks: tuple[_Block, ...],
) -> WithLse:
    """Attention of [blocks, K, G * T, D] queries, and the log-sum-exp [blocks, K, G * T]."""

    def one(xs: tuple[Array, tuple[_Block, ...]]) -> WithLse:
        rows, blocks = xs
        state = (
            jnp.full((*rows.shape[:2], 1), -jnp.inf, jnp.float32),
            jnp.zeros((*rows.shape[:2], 1), jnp.float32),
            jnp.zeros(rows.shape, jnp.float32),
        )
        for pair, places, block in zip(pairs, where, blocks, strict=True):
            add = functools.partial(_add, scale, rows, pair, places, block)
            state = _turns(block, add, state)
        top, total, out = state
        out, lse = finished(out, top[..., 0], total[..., 0])
        return out.astype(rows.dtype), lse

    return jax.lax.map(one, (rows, blocks))


_Softmax = tuple[Array, Array, Array]


def _add(
    scale: float, rows: Array, pair: Pair, where: _Places, block: _Block, chunk: Array, state: _Softmax
) -> _Softmax:
    """Add a chunk of keys to the running maximum, sum [K, M, 1] and output [K, M, D] of queries [K, M, D]."""
    top, total, out = state
    k, v, poison = (_at(a, block.row, chunk) for a in (*pair, where.poison))
    logits = _logits(scale, rows, k, poison, _seen(where, block, chunk))
    higher = jnp.maximum(top, jnp.max(logits, axis=(3, 4)).reshape(top.shape))
    base = jnp.where(jnp.isfinite(higher), higher, 0.0)
    weights, kept = jnp.exp(logits - _per_row(base, logits)), jnp.exp(top - base)
    more = _product("KMN,KND->KMD", _by_row(weights).astype(rows.dtype), v)
    total = total * kept + jnp.sum(weights, axis=(3, 4)).reshape(top.shape)
    return higher, total, out * kept + more


_Saved = tuple[Array, tuple[Pair, ...], tuple[_Places, ...], tuple[_Block, ...], Array, Array]


def _attend_forward(
    scale: float,
    rows: Array,
    pairs: tuple[Pair, ...],
    where: tuple[_Places, ...],
    blocks: tuple[_Block, ...],
) -> tuple[WithLse, _Saved]:
    out, lse = _attend(scale, rows, pairs, where, blocks)
    return (out, lse), (rows, pairs, where, blocks, out, lse)


def _attend_backward(
    scale: float, saved: _Saved, cotangents: WithLse
) -> tuple[Array, tuple[Pair, ...], None, None]:
    """Gradients of queries, keys and values, from the weights, which are computed again."""
    rows, pairs, where, blocks, out, lse = saved
    d_out, d_lse = cotangents
    # d logit = weight * (d_out . v - d_out . out + d_lse)
    less = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse

    def one(
        sums: tuple[Pair, ...], xs: tuple[Array, Array, Array, Array, tuple[_Block, ...]]
    ) -> tuple[tuple[Pair, ...], Array]:
        rows, d_out, lse, less, blocks = xs
        d_rows, found = jnp.zeros(rows.shape, jnp.float32), []
        for pair, places, block, total in zip(pairs, where, blocks, sums, strict=True):
            given = (rows, d_out, lse[..., None], less[..., None])
            add = functools.partial(_add_gradients, scale, given, pair, places, block)
            d_rows, total = _turns(block, add, (d_rows, total))
            found.append(total)
        return tuple(found), d_rows.astype(rows.dtype)

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), pairs)
    sums, d_rows = jax.lax.scan(one, zeros, (rows, d_out, lse, less, blocks))
    return d_rows, jax.tree.map(lambda total, a: total.astype(a.dtype), sums, pairs), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _add_gradients(
    scale: float,
    given: tuple[Array, Array, Array, Array],
    pair: Pair,
    where: _Places,
    block: _Block,
    chunk: Array,
    state: tuple[Array, Pair],
) -> tuple[Array, Pair]:
    """Add what a chunk of keys gives to the gradients.

    Args:
      scale: factor of the logits.
      given: queries and gradients of the output [K, M, D]; log-sum-exp and what is subtracted from the
        gradients of weights [K, M, 1].
      pair, where, block: the stream.
      chunk: which of it.
      state: gradients of the queries [K, M, D] and of keys and values [B, chunks, K, C, D], float32.
    """
    rows, d_out, lse, less = given
    d_rows, sums = state
    k, v, poison = (_at(a, block.row, chunk) for a in (*pair, where.poison))
    logits = _logits(scale, rows, k, poison, _seen(where, block, chunk))
    # A row of NaN has a log-sum-exp of NaN, and what it does not see no gradient nevertheless.
    seen = logits != -jnp.inf
    weights = jnp.where(seen, jnp.exp(logits - _per_row(lse, logits)), 0.0)
    d_weights = _product("KMD,KND->KMN", d_out, v).reshape(logits.shape)
    d_logits = jnp.where(seen, weights * (d_weights - _per_row(less, logits)), 0.0) * scale
    d_logits, weights = (_by_row(a).astype(rows.dtype) for a in (d_logits, weights))
    d_k = _product("KMN,KMD->KND", d_logits, rows)
    d_v = _product("KMN,KMD->KND", weights, d_out)

    def added(total: Array, more: Array) -> Array:
        at: tuple[Array | int, ...] = (block.row, chunk, *[0] * (total.ndim - 2))
        return jax.lax.dynamic_update_slice(total, (_at(total, block.row, chunk) + more)[None, None], at)

    return d_rows + _product("KMN,KND->KMD", d_logits, k), (added(sums[0], d_k), added(sums[1], d_v))
