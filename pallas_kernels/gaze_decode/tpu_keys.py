"""Keys and values of the TPU kernel of gaze_decode: from copied regions and tiles to operands of products.

Axis letters as in ``tpu_kernel.py``.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.gaze_decode.tpu_layout import LANES, SUBLANES

# Pallas refs have no public type.
Ref = Any
Scalar = jax.Array | int


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


class Keys(NamedTuple):
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


def region_keys(static: Static, words: Ref, side: Ref, group: int, first: jax.Array) -> list[Keys]:
    """Keys of the regions of a part of a chunk, one group for each token of a word row.

    Args:
      static: static arguments.
      words: VMEM [X, n, 128], the word rows of these regions; those of scales hold no keys.
      side: as in :class:`tpu_kernel.Inputs`.
      group: G.
      first: int32, the place of the first region in the row's list.
    """
    rows = static.part * static.word_rows
    values = words[...] if static.interpret else None
    places = split_words(words) if values is None else split_values(values)
    tokens = len(places) // (1 if static.joint else 2)
    region, row = _divided(jax.lax.broadcasted_iota(jnp.int32, (1, rows), 1), static.word_rows)
    mine = jax.lax.broadcasted_iota(jnp.int32, (static.part, rows), 0) == region

    def spread(values: jax.Array) -> jax.Array:
        """[regions, 1 or X], of each region, to [1, X]: of each key's own region."""
        return jnp.sum(jnp.where(mine, values, 0), axis=0, keepdims=True)

    facts = _facts(static, side, first)
    heads, *seen = (spread(facts[:, i : i + 1]) for i in range(1 + -(-static.slots // 32)))
    head = jax.lax.broadcasted_iota(jnp.int32, (group, 1), 0)
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
        k_scale: jax.Array | float = 1.0
        v_scale: jax.Array | float = 1.0
        if scales is not None:
            width = static.word_rows - static.scale_rows
            aligned = (
                _aligned(scales, (which * tokens + token) * width, static.word_rows, rows) for which in (0, 1)
            )
            k_scale, v_scale = (jnp.where(read > 0, spread(a), 0.0) for a in aligned)
        keys = (k.astype(static.compute), v.astype(static.compute), ((read >> head) & 1) == 1)
        groups.append(Keys(*keys, k_scale, v_scale))
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


def text_keys(static: Static, k: Ref, v: Ref, seen: Ref, group: int) -> Keys:
    """Keys of a tile of the text stream; the references as in :class:`tpu_kernel.Inputs`."""
    counts = seen[0]
    nonzero = (counts if static.lanes_are_tokens else _column(counts)) > 0
    # 0 * NaN is NaN, and keys that do not count may hold NaN.
    values = jnp.where(nonzero, v[0, 0, 0].astype(jnp.float32), 0.0).astype(static.compute)
    read = jnp.broadcast_to(counts > 0, (group, counts.shape[1]))
    return Keys(k[0, 0, 0].astype(static.compute), values, read, lanes_are_tokens=static.lanes_are_tokens)
