"""gaze_decode over a visual cache in host memory: only the regions that are read move to the device.

Layout. A region of a kv head is one contiguous row in host memory, first keys, then values, so that one
gather fetches both. Its last axes are [n, 128] with n = 4 / itemsize (2 for float32 as well), the tile of
the TPU compiler: so a tile belongs to one region, for any dtype, P and D.

In each step the device computes which rows to read; the host gathers them and copies only them; the device
attends to them with the arithmetic of ``xla.py`` (on a CPU ``cpu.py``), so that on a CPU the result is
bit-identical to implementation "xla". Each query head reads the rows of its own list: with static shapes
the union of the lists would be as long, J * G.

If the lists hold R regions or more, or nothing is listed (dense attention), the layer's whole visual cache
is copied to the device, used and dropped, layer by layer. This is correct but slow.

Under ``jax.vmap`` the cache stays in host memory, mapped or not, and only what is read moves. If its mapped
axis is not the first one, it is transposed there.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import compute_on

from pallas_kernels import quantize
from pallas_kernels.dispatch import target
from pallas_kernels.gaze_decode import cpu, grow, xla
from pallas_kernels.gaze_decode.cpu import Arguments, Side
from pallas_kernels.softmax import WithLse
from pallas_kernels.spec import GazeSpec

Array = jax.Array

TEXT_MULTIPLE = 1
LANES = 128
_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device

# The same function under the two names it has had: jax 0.10 has an older ``compute_on``, a context manager,
# and calls this one ``compute_on2``. With ``out_memory_spaces=_HOST`` the TPU compiler copies results from
# the device to the host and back. Where a scan is traced in parts, this one's results still count as the
# host's, so each is put on the device once more, which compiles to nothing.
_NAME = "compute_on2" if hasattr(compute_on, "compute_on2") else "compute_on"
_on_host = getattr(compute_on, _NAME)(compute_type="device_host", out_memory_spaces=_DEVICE)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A visual cache in host memory (memory kind "pinned_host").

    Attributes:
      rows: [L, B, K, R, W, n, 128]: the keys [P, D], the values [P, D], for int8 the bytes of the float32
        scales of the keys [P] and values [P], then zeros to the end of the row.
      slots, dim: P and D.
    """

    rows: Array
    slots: int = dataclasses.field(metadata={"static": True})
    dim: int = dataclasses.field(metadata={"static": True})


def supports(spec: GazeSpec) -> str | None:
    """Every spec, wherever JAX can compute on the host: CPU, TPU and GPU."""
    del spec
    return None


def _rows(k: Side, v: Side) -> Array:
    """Join keys and values [..., P, D] into rows [..., W, n, 128]."""
    *lead, slots, dim = k.values.shape
    parts = [side.values.reshape(*lead, slots * dim) for side in (k, v)]
    for side in (k, v):
        if side.scales is not None:
            scale_bytes = jax.lax.bitcast_convert_type(side.scales, jnp.int8)
            parts.append(scale_bytes.reshape(*lead, slots * 4))
    flat = jnp.concatenate(parts, axis=-1)
    tile = (4 if flat.dtype == jnp.int8 else 2, LANES)
    count = -(-flat.shape[-1] // math.prod(tile))
    return grow.fill(flat, {-1: count * math.prod(tile)}).reshape(*lead, count, *tile)


def _sides(rows: Array, slots: int, dim: int) -> tuple[Side, Side]:
    """Split rows [..., W, n, 128] into keys and values [..., P, D] each."""
    lead = rows.shape[:-3]
    flat = rows.reshape(*lead, math.prod(rows.shape[-3:]))

    def cut(first: int, *shape: int) -> Array:
        part = jax.lax.slice_in_dim(flat, first, first + math.prod(shape), axis=-1)
        return part.reshape(*lead, *shape)

    def side(which: int) -> Side:
        values = cut(which * slots * dim, slots, dim)
        if rows.dtype != jnp.int8:
            return Side(values)
        scale_bytes = cut(2 * slots * dim + which * 4 * slots, slots, 4)
        return Side(values, jax.lax.bitcast_convert_type(scale_bytes, jnp.float32))

    return side(0), side(1)


def _to_host(k: Side, v: Side) -> Packed:
    slots, dim = k.values.shape[-2:]
    return Packed(jax.device_put(_rows(k, v), _HOST), slots, dim)


def _to_device(packed: Packed) -> tuple[Side, Side]:
    """Copy the whole cache to the device: keys and values [L, B, K, R, P, D]."""
    return _sides(jax.device_put(packed.rows, _DEVICE), packed.slots, packed.dim)


def pack(k: Array, v: Array, *, spec: GazeSpec) -> Packed:
    """Lay out keys and values [L, B, K, R, P, D] as the module describes and move them to the host."""
    if spec.visual_dtype == "int8":
        return _to_host(Side(*quantize.quantize(k)), Side(*quantize.quantize(v)))
    return _to_host(Side(k), Side(v))


def unpack(packed: Packed) -> tuple[Array, Array]:
    """Return k and v, [L, B, K, R, P, D] each, on the device; float32 if they were quantised."""
    return xla.unpack(_to_device(packed))


def reserve(packed: Packed, regions: int, slots: int) -> Packed:
    """Pad R and P with zeros to the new sizes; passes through the device, which must hold the whole cache."""
    k, v = xla.larger(_to_device(packed), 3, regions, slots)
    return _to_host(k, v)


def write(packed: Packed, piece: Packed, start: Array) -> Packed:
    """Overwrite the regions from ``start`` on with those of ``piece``."""
    # Written by the device: the result of a host computation would pass whole through device memory.
    return grow.write(packed, piece, start, 3)


@functools.cache
def _reader(slots: int, dim: int) -> Callable[[Array, Array], tuple[Side, Side]]:
    """A function that copies parts of the cache to the device; under ``vmap`` the cache stays as it is.

    The function takes host memory [*lead, W, n, 128] and int32 numbers [..., N], each along the first N axes;
    it returns keys and values, with [..., *lead[N:]] in front of their last axes, R and P merged.
    """

    @jax.custom_batching.custom_vmap
    def read(stored: Array, where: Array) -> tuple[Side, Side]:
        count = where.shape[-1]
        rest = stored.shape[count:]
        first = where.ndim - 1
        dims = jax.lax.GatherDimensionNumbers(
            offset_dims=tuple(range(first, first + len(rest))),
            collapsed_slice_dims=tuple(range(count)),
            start_index_map=tuple(range(count)),
        )

        @_on_host
        def gather(stored: Array, where: Array) -> tuple[Side, Side]:
            rows = jax.lax.gather(stored, where, dims, (1,) * count + rest, mode="promise_in_bounds")
            k, v = map(cpu.tokens, _sides(rows, slots, dim))
            return k, v

        return jax.device_put(gather(stored, jax.device_put(where, _HOST)), _DEVICE)

    @read.def_vmap
    def _mapped(
        size: int, mapped: list[bool], stored: Array, where: Array
    ) -> tuple[tuple[Side, Side], tuple[Side, Side]]:
        # A mapped cache gets one more number in front. JAX's own rules would make its numbers on the device.
        if mapped[0]:
            if not mapped[1]:
                where = jnp.broadcast_to(where, (size, *where.shape))
            entry = jax.lax.broadcasted_iota(jnp.int32, (*where.shape[:-1], 1), 0)
            where = jnp.concatenate([entry, where], axis=-1)
        found = read(stored, where)
        return found, jax.tree.map(lambda _: True, found)

    return read


def _fetch(visual: Packed, layer: Array, at: Array) -> tuple[Side, Side]:
    """Copy regions ``at`` [B, K, N, J] of a layer to the device: keys and values [B, K, N, J * P, D]."""
    b, h = (jax.lax.broadcasted_iota(jnp.int32, at.shape, axis) for axis in (0, 1))
    where = jnp.stack([jnp.broadcast_to(layer.astype(jnp.int32), at.shape), b, h, at], axis=-1)
    return _reader(visual.slots, visual.dim)(visual.rows, where)


def _everything(visual: Packed, layer: Array) -> tuple[Side, Side]:
    """Copy all regions of a layer to the device: keys and values [B, K, R * P, D]."""
    if visual.rows.shape[3] == 0:  # host computations on empty arrays fail
        rows = jnp.zeros(visual.rows.shape[1:], visual.rows.dtype)
        k, v = map(cpu.tokens, _sides(rows, visual.slots, visual.dim))
        return k, v
    return _reader(visual.slots, visual.dim)(visual.rows, layer.astype(jnp.int32)[None])


@jax.custom_batching.custom_vmap
def _valid(layer: Array, layers: int) -> Array:
    """Whether there is such a layer, bool; under ``vmap`` one answer for all, so that it chooses a branch."""
    return layer < layers


@_valid.def_vmap
def _valid_mapped(size: int, mapped: list[bool], layer: Array, layers: int) -> tuple[Array, bool]:
    del size, mapped
    return _valid(layer.max(), layers), False


def gaze_decode(
    q: Array,
    visual: Packed,
    text_k: Array,
    text_v: Array,
    layer: Array,
    indices: Array | None,
    visual_seen: Array,
    text_seen: Array,
    *,
    spec: GazeSpec,
) -> WithLse:
    """See :func:`pallas_kernels.gaze_decode.api.gaze_decode`."""
    rest = (q, text_k, text_v, layer, indices, visual_seen, text_seen)
    fetch = functools.partial(_fetch, visual, layer)
    everything = functools.partial(_everything, visual, layer)
    if target() != "cpu":
        return xla.attend(fetch, everything, *rest, scale=spec.scale)

    # The resident form is a branch of a conditional, so this is one too: otherwise the compiler could fuse it
    # with the surrounding code and round differently.
    def attend(*rest: *Arguments) -> WithLse:
        def listed(at: Array) -> Callable[[Array, Array, Array], tuple[Side, Side]]:
            both = fetch(at)
            return lambda b, h, n: jax.tree.map(lambda a: a[b, h, n], both)

        return cpu.attend(listed, everything, *rest, scale=spec.scale)

    def nothing(q: Array, *_: Array | None) -> WithLse:
        return jnp.zeros_like(q), jnp.full(q.shape[:2], -jnp.inf, jnp.float32)

    return jax.lax.cond(_valid(layer, visual.rows.shape[0]), attend, nothing, *rest)
