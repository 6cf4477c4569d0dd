"""How the TPU kernel of gaze_decode stores the visual cache, so that a region is one copy.

A *word row* is 128 lanes of 32 bits, one row of a TPU register. A word holds two bfloat16 values or four
int8 values, so the last two axes of the cache are ``[n, 128]`` with n = 4 / itemsize (2 for float32 as well,
to share the code). XLA stores such an array without padding. The axis before, word rows of one region, is
untiled, so a region may start and end anywhere.

The n entries of a word row hold:

    D in (64, 128]    bfloat16  K V          one token: its key and its value
                      int8      K K V V      two tokens
    D in [1, 64]      bfloat16  KV KV        two tokens, each with 64 lanes of K and 64 of V
                      int8      KV KV KV KV  four tokens

Smaller D is padded with zeros to 64 or 128 lanes. The scales of an int8 region are float32 values in the
bytes of one more word row (several, for more than 64 tokens): of the keys of the first token of all word
rows, of the second, ..., then of the values. So those of one step of the kernel are neighbours. A separate
table of scales would be laid out, copied or cached as a whole by the compiler.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.gaze_decode import grow
from pallas_kernels.quantize import dequantize, quantize
from pallas_kernels.spec import GazeSpec

LANES, SUBLANES = 128, 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A visual cache in word rows.

    Attributes:
      words: [L, B, K, R, W, n, 128] in the cache's dtype; R and W are at least 1.
      empty: there is no region, and the one in ``words`` holds nothing.
      slots, dim: P and D before padding.
    """

    words: jax.Array
    empty: bool = dataclasses.field(metadata={"static": True})
    slots: int = dataclasses.field(metadata={"static": True})
    dim: int = dataclasses.field(metadata={"static": True})

    @property
    def regions(self) -> int:
        """R; of a device's part of a cache that is split over a mesh, its own."""
        return 0 if self.empty else self.words.shape[-4]

    @property
    def joint(self) -> bool:
        """K and V of a token share 128 lanes."""
        return self.dim <= LANES // 2

    @property
    def per_row(self) -> int:
        """Tokens in a word row."""
        places = self.words.shape[-2]
        return places if self.joint else places // 2

    @property
    def rows(self) -> int:
        """Word rows of a region that hold tokens; scales follow."""
        return _rows(self.slots, self.per_row)

    @property
    def scaled(self) -> bool:
        """Whether values are int8 with scales."""
        return self.words.dtype == jnp.int8


def _rows(slots: int, per_row: int) -> int:
    return max(1, -(-slots // per_row))


def pack(k: jax.Array, v: jax.Array, *, spec: GazeSpec) -> Packed:
    """Pack [L, B, K, R, P, D] keys and values into word rows; see the module's docstring.

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
    scales: tuple[jax.Array, jax.Array] | None = None
    if spec.visual_dtype == "int8":
        (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
        scales = (k_scale, v_scale)
    places = 4 if spec.visual_dtype == "int8" else 2
    joint = dim <= LANES // 2
    width = LANES // 2 if joint else LANES
    per_row = places if joint else places // 2
    rows = _rows(slots, per_row)

    def cut(a: jax.Array) -> jax.Array:
        a = grow.fill(a, {-1: width, -2: rows * per_row, -3: max(1, regions)})
        return a.reshape(*lead, max(1, regions), rows, per_row, width)

    words = jnp.concatenate([cut(k), cut(v)], axis=-1 if joint else -2)
    if scales is not None:
        words = jnp.concatenate([words, _scale_rows(*scales, max(1, regions), per_row)], axis=-3)
    return Packed(words, regions == 0, slots, dim)


def _scale_rows(k_scale: jax.Array, v_scale: jax.Array, regions: int, per_row: int) -> jax.Array:
    """Scales float32 [..., R, P] as word rows int8 [..., regions, E, 4, 128], for :func:`scales_of`."""

    def by_token(a: jax.Array) -> jax.Array:
        rows = _rows(a.shape[-1], per_row)
        a = grow.fill(a, {-1: rows * per_row})
        return jnp.swapaxes(a.reshape(*a.shape[:-1], rows, per_row), -1, -2).reshape(a.shape)

    both = jnp.concatenate([by_token(k_scale), by_token(v_scale)], axis=-1)
    both = grow.fill(both, {-1: -(-both.shape[-1] // LANES) * LANES, -2: regions})
    as_bytes = jax.lax.bitcast_convert_type(both.reshape(*both.shape[:-1], -1, LANES), jnp.int8)
    return jnp.swapaxes(as_bytes, -1, -2)


def scales_of(rows: jax.Array, slots: int, per_row: int) -> tuple[jax.Array, jax.Array]:
    """Read the scales of keys and values, float32 [..., P] each, in their word rows int8 [..., E, 4, 128]."""
    both = jax.lax.bitcast_convert_type(jnp.swapaxes(rows, -1, -2), jnp.float32)
    both = both.reshape(*both.shape[:-2], both.shape[-2] * LANES)
    word_rows = _rows(slots, per_row)

    def by_slot(first: int) -> jax.Array:
        a = both[..., first : first + word_rows * per_row]
        a = jnp.swapaxes(a.reshape(*a.shape[:-1], per_row, word_rows), -1, -2)
        return a.reshape(*a.shape[:-2], word_rows * per_row)[..., :slots]

    return by_slot(0), by_slot(word_rows * per_row)


def unpack(packed: Packed) -> tuple[jax.Array, jax.Array]:
    """[L, B, K, R, P, D] keys and values; float32 if they were quantised."""
    words = packed.words[..., : packed.regions, :, :, :]
    tokens = words[..., : packed.rows, :, :]

    def whole(a: jax.Array) -> jax.Array:
        *lead, rows, per_row, width = a.shape
        return a.reshape(*lead, rows * per_row, width)[..., : packed.slots, : packed.dim]

    k, v = map(whole, jnp.split(tokens, 2, axis=-1 if packed.joint else -2))
    if packed.scaled:
        k_scale, v_scale = scales_of(words[..., packed.rows :, :, :], packed.slots, packed.per_row)
        return dequantize(k, k_scale), dequantize(v, v_scale)
    return k, v


def reserve(packed: Packed, regions: int, slots: int) -> Packed:
    """Grow R and P to the new sizes with word rows of zeros."""
    rows = _rows(slots, packed.per_row)
    tokens = grow.fill(packed.words[..., : packed.rows, :, :], {3: max(1, regions), 4: rows})
    if not packed.scaled:
        return Packed(tokens, regions == 0, slots, packed.dim)
    # The scales of the values directly follow those of the keys, so a larger P moves them.
    scales = scales_of(packed.words[..., packed.rows :, :, :], packed.slots, packed.per_row)
    k_scale, v_scale = (grow.fill(a, {-1: slots}) for a in scales)
    words = jnp.concatenate([tokens, _scale_rows(k_scale, v_scale, max(1, regions), packed.per_row)], axis=-3)
    return Packed(words, regions == 0, slots, packed.dim)


def write(packed: Packed, piece: Packed, start: jax.Array) -> Packed:
    """Overwrite the regions from ``start`` on with those of ``piece``."""
    return grow.write(packed, piece, start, 3)
