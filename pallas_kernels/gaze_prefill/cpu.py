"""Attention of a block of queries, tuned for CPUs: keys in chunks, joined by an online softmax.

On a CPU the logits should stay in its cache: for each chunk of keys, a block of queries updates a running
maximum, sum and output (online softmax, arXiv 1805.02867), and the logits are dropped. A chunk that no query
of the block sees is skipped: half of the chunks in causal attention. Other devices are faster with few large
products, and a branch costs them a synchronisation.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.softmax import WithLse, finished

Array = jax.Array

CHUNK = 512
"""Keys per chunk."""

_LOGITS = 1 << 20  # maximum number of logits at once: 4 MB
_EXACT = jax.lax.Precision.HIGHEST


def queries_at_once(most: int, batch: int, heads: int) -> int:
    """T of a block: at most ``most``, and small enough that its logits for a chunk stay in cache."""
    return max(1, min(most, max(16, _LOGITS // (batch * heads * CHUNK))))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keys:
    """Keys and values [..., N, D], 0 where a token's are not finite, and what makes up for it.

    0 * NaN is NaN, so what a query does not see must not reach a matmul, forward or backward. A query that
    does see such a token gets its NaN through the logits.

    Attributes:
      k, v: [..., N, D].
      poison: float32 [..., N], NaN for a token whose key or value is not finite, else 0.
    """

    k: Array
    v: Array
    poison: Array


def keys_of(k: Array, v: Array) -> Keys:
    """Keys and values [B, K, N, D] with their :class:`Keys`."""
    finite = jnp.isfinite(k).all(-1) & jnp.isfinite(v).all(-1)
    k, v = (jnp.where(finite[..., None], a, jnp.zeros((), a.dtype)) for a in (k, v))
    return Keys(k, v, jnp.where(finite, jnp.float32(0), jnp.float32(jnp.nan)))


def chunked(keys: Keys) -> Keys:
    """Cut [B, K, N, ...] along N into [count, B, K, CHUNK, ...]; a shorter stream is one chunk."""
    return jax.tree.map(lambda a: _cut(a, 2), keys)


def _cut(a: Array, axis: int) -> Array:
    """Cut ``axis`` into chunks and move the chunk axis to the front."""
    size = a.shape[axis]
    chunk = min(CHUNK, size)
    count = -(-size // chunk) if size else 0
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, count * chunk - size)
    shape = (*a.shape[:axis], count, chunk, *a.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(a, widths).reshape(shape), axis, 0)


def rows_of(q: Array, kv_heads: int) -> Array:
    """Reshape queries [B, T, H, D] to [B, K, G * T, D], one matrix per kv head.

    Every backend is fastest with plain matrices; products with two row axes become plain loops on a CPU.
    """
    batch, length, heads, dim = q.shape
    group = heads // kv_heads
    rows = jnp.moveaxis(q.reshape(batch, length, kv_heads, group, dim), 1, 3)
    return rows.reshape(batch, kv_heads, group * length, dim)


def queries_of(rows: Array, q: Array) -> Array:
    """Invert :func:`rows_of`; the result has the shape and dtype of ``q``."""
    batch, length, heads, dim = q.shape
    kv_heads = rows.shape[1]
    rows = rows.reshape(batch, kv_heads, heads // kv_heads, length, dim)
    return jnp.moveaxis(rows, 3, 1).reshape(q.shape).astype(q.dtype)


def by_query(rows: Array, q: Array) -> Array:
    """:func:`queries_of` for a number per row: [B, K, G * T] to [B, T, H]."""
    batch, length, heads, _ = q.shape
    return jnp.moveaxis(rows.reshape(batch, heads, length), 1, 2)


def attend(q: Array, streams: list[tuple[Keys, Array]], scale: float) -> WithLse:
    """Attend with one softmax over several streams of keys.

    Args:
      q: [B, T, H, D].
      streams: keys and values in chunks, and which of them a query sees, bool [B, T, 1 or K or H, N].
      scale: factor of the logits.

    Returns:
      [B, T, H, D] in the dtype of ``q`` and float32 [B, T, H]; see :data:`pallas_kernels.softmax.WithLse`.
    """
    rows = rows_of(q, streams[0][0].k.shape[2])
    state = (
        jnp.full((*rows.shape[:3], 1), -jnp.inf, jnp.float32),
        jnp.zeros((*rows.shape[:3], 1), jnp.float32),
        jnp.zeros(rows.shape, jnp.float32),
    )
    for chunks, seen in streams:
        if chunks.k.shape[0]:
            state, _ = jax.lax.scan(
                lambda state, xs: (_add(state, rows, *xs, scale), None), state, (chunks, _cut(seen, 3))
            )
    top, total, out = state
    out, lse = finished(out, top[..., 0], total[..., 0])
    return queries_of(out, q), by_query(lse, q)


State = tuple[Array, Array, Array]


def _add(state: State, rows: Array, chunk: Keys, seen: Array, scale: float) -> State:
    """Add a chunk of keys to the softmax.

    Args:
      state: running maximum and sum [B, K, G * T, 1] and output [B, K, G * T, D], float32.
      rows: [B, K, G * T, D].
      chunk: [B, K, N, ...].
      seen: bool [B, T, 1 or K or H, N].
      scale: factor of the logits.
    """
    batch, kv_heads, count, _ = rows.shape
    length, shared = seen.shape[1:3]
    group = count // length

    def joined(state: State) -> State:
        top, total, out = state
        logits = jnp.einsum(
            "BKMD,BKND->BKMN", rows, chunk.k, precision=_EXACT, preferred_element_type=jnp.float32
        )
        mask = jnp.moveaxis(seen, 1, 2)  # [B, 1 or K or H, T, N]
        mask = mask.reshape(batch, -1, group if shared == kv_heads * group else 1, *mask.shape[2:])
        logits = logits.reshape(batch, kv_heads, group, length, -1)
        logits = logits * scale + chunk.poison[:, :, None, None]
        logits = jnp.where(mask, logits, -jnp.inf).reshape(batch, kv_heads, count, -1)
        higher = jax.lax.stop_gradient(jnp.maximum(top, jnp.max(logits, axis=-1, keepdims=True)))
        base = jnp.where(jnp.isfinite(higher), higher, 0.0)
        weights, kept = jnp.exp(logits - base), jnp.exp(top - base)
        more = jnp.einsum(
            "BKMN,BKND->BKMD",
            weights.astype(rows.dtype),
            chunk.v,
            precision=_EXACT,
            preferred_element_type=jnp.float32,
        )
        total = total * kept + jnp.sum(weights, axis=-1, keepdims=True)
        return higher, total, out * kept + more

    return jax.lax.cond(jnp.any(seen), joined, lambda state: state, state)
