"""Softmax over keys in several places: each place's output, and the number by which they are joined."""

import jax
import jax.numpy as jnp

WithLse = tuple[jax.Array, jax.Array]
"""What attention returns: its output [..., D], and the log-sum-exp of each query's logits, float32 [...].

Where a query sees no key they are 0 and -inf."""


def finished(out: jax.Array, top: jax.Array, total: jax.Array) -> WithLse:
    """Divide an online softmax's output by its sum.

    Args:
      out: float32 [..., D], sum of exp(logit - top) * value.
      top: float32 [...], the largest logit, or any number where no key is seen.
      total: float32 [...], sum of exp(logit - top); 0 where no key is seen.
    """
    # A sum of NaN is no sum of 0: the output of a query that sees NaN is not that of one that sees no key.
    none = total == 0
    divisor = jnp.where(none, 1.0, total)
    return out / divisor[..., None], jnp.where(none, -jnp.inf, top + jnp.log(divisor))


def joined(out: jax.Array, lse: jax.Array, axis: int) -> WithLse:
    """Attention to the keys of all parts, from the attention to those of each.

    Args:
      out: [..., D] with an axis of parts.
      lse: float32 [...] with the same.
      axis: the axis of parts, counted from the front.

    Returns:
      Both without the axis; the output in the dtype of ``out``.
    """
    top = jax.lax.stop_gradient(jnp.max(lse, axis=axis, keepdims=True))
    # A part that saw no key weighs 0 and has a gradient of 0, not of inf - inf.
    none = lse == -jnp.inf
    base = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.where(none, 0.0, jnp.exp(jnp.where(none, 0.0, lse - base)))
    values = jnp.sum(out.astype(jnp.float32) * weights[..., None], axis=axis)
    values, total = finished(values, jnp.squeeze(top, axis), jnp.sum(weights, axis=axis))
    return values.astype(out.dtype), total
