"""int8 keys and values: symmetric, one float32 scale per token of a kv head.

Scales are per token because tokens are written and masked one at a time: a token (or a NaN in it) never
changes what another token decodes to. The largest error of an element is half a step, max|x| / 254.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import without_gradient

_NO_GRADIENT = (
    "Keys and values that are rounded to int8 have no gradient; to differentiate, set GazeSpec.visual_dtype "
    "(gaze.visual_dtype) to None."
)


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Round to 255 levels.

    Args:
      x: [..., D] floats; a NaN or an infinity makes the scale of its token NaN and affects nothing else.

    Returns:
      int8 [..., D] and float32 [...] scales, 0 for a token of zeros.

    Raises:
      NotImplementedError: it is differentiated. Only the scales would have a gradient, which is a wrong one.
    """
    wide = without_gradient(x, _NO_GRADIENT).astype(jnp.float32)
    top = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    steps = jnp.round(wide * jnp.where(top > 0, 127.0 / top, 0.0))
    scale = jnp.where(jnp.isfinite(top), top / 127.0, jnp.nan)
    return jnp.where(jnp.isfinite(steps), steps, 0.0).astype(jnp.int8), scale[..., 0]


def dequantize(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Invert :func:`quantize`, up to rounding: float32 [..., D]."""
    return x.astype(jnp.float32) * scale[..., None]
