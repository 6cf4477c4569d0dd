"""How the GPU kernels store the visual cache.

K and V are two arrays [L, B, K, R, P, D]: a region of a kv head is one contiguous block, which the copy
engine fetches by its number. Only these sizes change: D is padded to a multiple of 64 (nothing for 64 and
128; otherwise the zeros are read too), P above 64 is cut into equal pieces of at most 64 slots, and for int8
with D = 64 odd pieces are padded by one slot. P = 36 is stored unchanged. The scales of int8 are apart, those
of a piece padded to a multiple of 32.
"""

import dataclasses

import jax

from pallas_kernels.gaze_decode import grow
from pallas_kernels.gaze_decode.gpu_math import DIMS
from pallas_kernels.quantize import dequantize, quantize
from pallas_kernels.spec import GazeSpec

SCALES = 32  # floats in 128 bytes
_PIECE = 64  # maximum number of token slots per copy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """The visual cache; see the top of this file.

    Attributes:
      k, v: [L, B, K, R, P', D'] floats or int8.
      k_scale, v_scale: float32 [L, B, K, R, P''] beside int8, else None.
      slots, dim: P and D.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None
    v_scale: jax.Array | None
    slots: int = dataclasses.field(metadata={"static": True})
    dim: int = dataclasses.field(metadata={"static": True})

    @property
    def pieces(self) -> tuple[int, int]:
        """Number of pieces of a region, and the slots of each."""
        return pieces_of(self.slots, self.k.shape[-1], self.k.dtype.itemsize)


def pieces_of(slots: int, dim: int, itemsize: int) -> tuple[int, int]:
    """Number of pieces of a region of P slots, and the slots of each."""
    count = -(-slots // _PIECE)
    each = -(-slots // count)
    if dim * itemsize % 128 and each % 2:
        each += 1  # copies are of multiples of 128 bytes
    return count, each


def _with_gaps(scales: jax.Array, count: int, each: int) -> jax.Array:
    """[..., count * each] to [..., count * W], the scales of a piece in a multiple of 128 bytes."""
    cut = scales.reshape(*scales.shape[:-1], count, each)
    cut = grow.fill(cut, {cut.ndim - 1: -(-each // SCALES) * SCALES})
    return cut.reshape(*scales.shape[:-1], -1)


def _without_gaps(scales: jax.Array, count: int, each: int) -> jax.Array:
    """The inverse of :func:`_with_gaps`."""
    cut = scales.reshape(*scales.shape[:-1], count, -1)[..., :each]
    return cut.reshape(*scales.shape[:-1], count * each)


def padded(dim: int) -> int:
    """D rounded up to what a tile of shared memory has."""
    return -(-dim // DIMS) * DIMS


def pack(k: jax.Array, v: jax.Array, *, spec: GazeSpec) -> Packed:
    """Pad D and P as the copy engine and the tensor cores need; round as ``spec`` says."""
    slots, dim = k.shape[-2:]
    k_scale = v_scale = None
    if spec.visual_dtype == "int8":
        (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
    count, each = pieces_of(slots, padded(dim), k.dtype.itemsize)
    k, v = (grow.fill(a, {4: count * each, 5: padded(dim)}) for a in (k, v))
    if k_scale is not None and v_scale is not None:
        k_scale, v_scale = (
            _with_gaps(grow.fill(a, {4: count * each}), count, each) for a in (k_scale, v_scale)
        )
    return Packed(k, v, k_scale, v_scale, slots, dim)


def unpack(packed: Packed) -> tuple[jax.Array, jax.Array]:
    """Return k and v, [L, B, K, R, P, D] each; float32 if they were int8."""
    k, v = packed.k, packed.v
    if packed.k_scale is not None and packed.v_scale is not None:
        k_scale, v_scale = (_without_gaps(a, *packed.pieces) for a in (packed.k_scale, packed.v_scale))
        k, v = dequantize(k, k_scale), dequantize(v, v_scale)
    return k[..., : packed.slots, : packed.dim], v[..., : packed.slots, : packed.dim]


def reserve(packed: Packed, regions: int, slots: int) -> Packed:
    """Pad R and P with zeros to the new sizes; the slots of a region are consecutive however it is cut."""
    count, each = pieces_of(slots, packed.k.shape[-1], packed.k.dtype.itemsize)
    sizes = {3: regions, 4: count * each}

    def scales(a: jax.Array | None) -> jax.Array | None:
        return (
            None if a is None else _with_gaps(grow.fill(_without_gaps(a, *packed.pieces), sizes), count, each)
        )

    k, v = (grow.fill(a, sizes) for a in (packed.k, packed.v))
    return Packed(k, v, scales(packed.k_scale), scales(packed.v_scale), slots, packed.dim)


def write(packed: Packed, piece: Packed, start: jax.Array) -> Packed:
    """Overwrite the regions from ``start`` on with those of ``piece``."""
    return grow.write(packed, piece, start, 3)
