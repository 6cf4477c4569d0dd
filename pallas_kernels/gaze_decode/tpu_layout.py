"""How the TPU kernel of gaze_decode keeps the visual cache, so that a region is one copy.

A *word row* is 128 lanes of 32 bits, the unit that a TPU register holds whole. bfloat16 packs two
values into a word and int8 four, so the last two axes of the cache are ``[n, 128]`` with n = 4 / itemsize
(2 for float32 as well, to share the code): XLA lays such an array out without padding, and the axis
before it, word rows of one region, is untiled, so a region starts and ends anywhere.

What stands in the n places of a word row:

    D in (64, 128]    bfloat16  K V          one token: its key and its value
                      int8      K K V V      two tokens
    D in [1, 64]      bfloat16  KV KV        two tokens, each with 64 lanes of K and 64 of V
                      int8      KV KV KV KV  four tokens

Smaller D is padded with zeros to 64 or 128 lanes. Scales of an int8 cache stand apart, per token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import dequantize, quantize
from pallas_kernels.spec import GazeSpec

LANES = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A visual cache in word rows.

    Attributes:
      words: [L, B, K, R, W, n, 128] in the cache's dtype; R and W are at least 1.
      scales: float32 [L, B, K, R', 2 * P'] of keys, then values, for int8; else None. R' and 2 * P' are
        rounded up to whole registers (8 and 128), or XLA would copy all of them to gather a few.
      regions, slots, dim: R, P and D before padding.
    """

    words: jax.Array
    scales: jax.Array | None
    regions: int = dataclasses.field(metadata={"static": True})
    slots: int = dataclasses.field(metadata={"static": True})
    dim: int = dataclasses.field(metadata={"static": True})

    @property
    def joint(self) -> bool:
        """K and V of a token share 128 lanes."""
        return self.dim <= LANES // 2

    @property
    def per_row(self) -> int:
        """Tokens in a word row."""
        places = self.words.shape[-2]
        return places if self.joint else places // 2


def _pad(a: jax.Array, axis: int, size: int) -> jax.Array:
    pad = [(0, 0)] * a.ndim
    pad[axis] = (0, size - a.shape[axis])
    return jnp.pad(a, pad)


def pack(k: jax.Array, v: jax.Array, *, spec: GazeSpec) -> Packed:
    """Lay [L, B, K, R, P, D] keys and values out as the module says.

    Raises:
      NotImplementedError: D is more than 128, or the dtype is neither float32 nor bfloat16.
    """
    *lead, regions, slots, dim = k.shape
    if dim > LANES:
        raise NotImplementedError(f"gaze_decode implementation 'tpu' takes D up to {LANES}, not {dim}.")
    if k.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            f"gaze_decode implementation 'tpu' keeps float32 and bfloat16 caches, not {k.dtype}."
        )
    scales = None
    if spec.visual_dtype == "int8":
        (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
        width = -(-2 * slots // LANES) * LANES // 2
        scales = jnp.concatenate([_pad(scale, -1, width) for scale in (k_scale, v_scale)], axis=-1)
        scales = _pad(scales, -2, max(8, -(-regions // 8) * 8))
    places = 4 if spec.visual_dtype == "int8" else 2
    joint = dim <= LANES // 2
    width = LANES // 2 if joint else LANES
    per_row = places if joint else places // 2
    rows = max(1, -(-slots // per_row))

    def cut(a: jax.Array) -> jax.Array:
        a = _pad(_pad(_pad(a, -1, width), -2, rows * per_row), -3, max(1, regions))
        return a.reshape(*lead, max(1, regions), rows, per_row, width)

    words = jnp.concatenate([cut(k), cut(v)], axis=-1 if joint else -2)
    return Packed(words, scales, regions, slots, dim)


def unpack(packed: Packed) -> tuple[jax.Array, jax.Array]:
    """[L, B, K, R, P, D] keys and values; float32 if they were quantised."""
    words = packed.words
    axis = -1 if packed.joint else -2

    def whole(a: jax.Array, side: int) -> jax.Array:
        a = a.reshape(*a.shape[:-3], -1, a.shape[-1])
        a = a[..., : packed.regions, : packed.slots, : packed.dim]
        if packed.scales is None:
            return a
        scale = jnp.split(packed.scales, 2, axis=-1)[side]
        return dequantize(a, scale[..., : packed.regions, : packed.slots])

    k, v = jnp.split(words, 2, axis=axis)
    return whole(k, 0), whole(v, 1)


def by_row(packed: Packed, slots: Any) -> jax.Array:
    """Order token slots [..., C, P] as the kernel meets them in C regions: [..., N].

    Word rows are split into their places, so the kernel sees the first token of all rows, then the second.
    """
    rows = packed.words.shape[-3]
    slots = _pad(slots, -1, rows * packed.per_row)
    lead, chunk = slots.shape[:-2], slots.shape[-2]
    slots = slots.reshape(*lead, chunk * rows, packed.per_row)
    return jnp.swapaxes(slots, -1, -2).reshape(*lead, -1)
