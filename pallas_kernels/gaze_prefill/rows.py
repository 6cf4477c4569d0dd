"""Keys without NaN, and queries as the rows of one matrix per kv head: what the XLA forms share."""

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array


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


def rows_of(q: Array, kv_heads: int) -> Array:
    """Reshape queries [B, T, H, D] to [B, K, G * T, D], one matrix per kv head.

    Every backend is fastest with plain matrices; products with two row axes become plain loops on a CPU.
    """
    batch, length, heads, dim = q.shape
    group = heads // kv_heads
    rows = jnp.moveaxis(q.reshape(batch, length, kv_heads, group, dim), 1, 3)
    return rows.reshape(batch, kv_heads, group * length, dim)


def queries_of(rows: Array, shape: tuple[int, ...]) -> Array:
    """Invert :func:`rows_of`, for queries of a shape [B, T, H, D]."""
    batch, length, heads, dim = shape
    kv_heads = rows.shape[1]
    rows = rows.reshape(batch, kv_heads, heads // kv_heads, length, dim)
    return jnp.moveaxis(rows, 3, 1).reshape(shape)


def by_query(rows: Array, shape: tuple[int, ...]) -> Array:
    """:func:`queries_of` for a number per row: [B, K, G * T] to [B, T, H]."""
    batch, length, heads, _ = shape
    return jnp.moveaxis(rows.reshape(batch, heads, length), 1, 2)
