"""gaze_decode for NVIDIA Hopper (sm_90): a Pallas Mosaic GPU kernel that splits the regions over the chip.

Layout. K and V are two arrays [L, B, K, R, P, D]: a region of a kv head is one contiguous block, which the
copy engine fetches by its number. Only these sizes change: D is padded to a multiple of 64 (nothing for 64
and 128; otherwise the zeros are read too), P above 64 is cut into equal pieces of at most 64 slots, and for
int8 with D = 64 odd pieces are padded by one slot. P = 36 is stored unchanged.

Split. A thread block (one warpgroup) handles a row, a kv head and a *split*: split s takes chunks s,
s + splits, ... of the region list, then of the text stream, counted from the end. It keeps an online softmax
in float32 and writes (maximum, sum, weighted values), which a small XLA reduction joins in a fixed order. So
a single sequence fills the chip.

If each query head has its own selection, their union is fetched once; every key carries a bit mask of the
heads that see it, which XLA gathers along with the list.

``gpu_kernel.py`` describes what happens to a chunk.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.dispatch import needs
from pallas_kernels.gaze_decode import grow
from pallas_kernels.gaze_decode.gpu_kernel import DIMS, ROWS, Operands, Shape, Tiles, launch
from pallas_kernels.gaze_decode.plan import Union, everything, union
from pallas_kernels.quantize import dequantize, quantize
from pallas_kernels.softmax import WithLse, finished
from pallas_kernels.spec import GazeSpec

# A text stream shorter than a chunk's tile is padded at every call; a longer one is not.
TEXT_MULTIPLE = 128
_PIECE = 64  # maximum number of token slots per copy
_MOST_COPIES = 16  # maximum number of copies per chunk and side, which are unrolled
_MOST_ROWS = 256  # maximum number of keys per tensor core instruction
_SHARED_MEMORY = 227 * 1024 - 1024  # limit per block on sm_90, less space for barriers
_PAIRS = 512  # longest list whose entries are compared pairwise
_LOG2E = math.log2(math.e)
_TILES = pathlib.Path(__file__).with_name("gpu_tiles.json")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """The visual cache; see "Layout" above.

    Attributes:
      k, v: [L, B, K, R, P', D'] floats or int8.
      k_scale, v_scale: float32 [L, B, K, R, P'] beside int8, else None.
      slots, dim: P and D.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None
    v_scale: jax.Array | None
    slots: int = dataclasses.field(metadata={"static": True})
    dim: int = dataclasses.field(metadata={"static": True})


def supports(spec: GazeSpec) -> str | None:
    """Every spec on an NVIDIA GPU, and every spec interpreted."""
    return needs("gpu", spec)


def _pieces(slots: int, dim: int, itemsize: int) -> tuple[int, int]:
    """Number of pieces of a region of P slots, and the slots of each."""
    count = -(-slots // _PIECE)
    each = -(-slots // count)
    if dim * itemsize % 128 and each % 2:
        each += 1  # copies start at multiples of 128 bytes in shared memory
    return count, each


def _wide(dim: int) -> int:
    return -(-dim // DIMS) * DIMS


def pack(k: jax.Array, v: jax.Array, *, spec: GazeSpec) -> Packed:
    """Pad D and P as the copy engine and the tensor cores need; round as ``spec`` says."""
    slots, dim = k.shape[-2:]
    k_scale = v_scale = None
    if spec.visual_dtype == "int8":
        (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
    count, each = _pieces(slots, _wide(dim), k.dtype.itemsize)
    k, v = (grow.fill(a, {4: count * each, 5: _wide(dim)}) for a in (k, v))
    if k_scale is not None and v_scale is not None:
        k_scale, v_scale = (grow.fill(a, {4: count * each}) for a in (k_scale, v_scale))
    return Packed(k, v, k_scale, v_scale, slots, dim)


def unpack(packed: Packed) -> tuple[jax.Array, jax.Array]:
    """Return k and v, [L, B, K, R, P, D] each; float32 if they were int8."""
    k, v = packed.k, packed.v
    if packed.k_scale is not None and packed.v_scale is not None:
        k, v = dequantize(k, packed.k_scale), dequantize(v, packed.v_scale)
    return k[..., : packed.slots, : packed.dim], v[..., : packed.slots, : packed.dim]


def reserve(packed: Packed, regions: int, slots: int) -> Packed:
    """Pad R and P with zeros to the new sizes; the slots of a region are consecutive however it is cut."""
    count, each = _pieces(slots, packed.k.shape[-1], packed.k.dtype.itemsize)
    larger = jax.tree.map(lambda a: grow.fill(a, {3: regions, 4: count * each}), packed)
    return dataclasses.replace(larger, slots=slots)


def write(packed: Packed, piece: Packed, start: jax.Array) -> Packed:
    """Overwrite the regions from ``start`` on with those of ``piece``."""
    return grow.write(packed, piece, start, 3)


def _parts(dtype: DTypeLike) -> int:
    """Number of bfloat16 arrays that represent the dtype exactly."""
    if dtype in (jnp.bfloat16, jnp.int8):
        return 1
    if dtype == jnp.float32:
        return 3
    raise NotImplementedError(
        f"gaze_decode 'gpu' keeps bfloat16, float32 and int8, not {jnp.dtype(dtype).name}."
    )


def _plan(indices: jax.Array | None, batch: int, kv_heads: int, group: int, regions: int) -> Union:
    """The regions to fetch; -1 may be anywhere in the list, and ``count`` includes those slots.

    If a group shares a short list, there is nothing to join: comparing all pairs, one small fused program,
    replaces two sorts.
    """
    if indices is None:
        return everything(batch, kv_heads, group, regions)
    capacity = indices.shape[-1]
    if indices.shape[1] != kv_heads or capacity > min(regions, _PAIRS):
        return union(indices, kv_heads, group, regions)
    earlier = jnp.tri(capacity, k=-1, dtype=bool)
    again = jnp.any((indices[..., :, None] == indices[..., None, :]) & earlier, axis=-1)
    fresh = (indices >= 0) & ~again
    return Union(
        jnp.where(fresh, indices, -1),
        jnp.where(fresh, jnp.int32((1 << group) - 1), 0),
        jnp.full((batch, kv_heads), capacity, jnp.int32),
    )


def _seen_rows(seen: jax.Array, chunks: int, rows: int) -> jax.Array:
    """Reshape int32 [..., N] to [..., chunks, rows], padded with zeros."""
    each = seen.shape[-1] // chunks
    return grow.fill(seen.reshape(*seen.shape[:-1], chunks, each), {seen.ndim: rows})


def _visual_operands(
    visual: Packed, plan: Union, layer: jax.Array, visual_seen: jax.Array, tiles: Tiles, rows: int
) -> dict[str, jax.Array]:
    """Which blocks to fetch, in chunks, and which heads see each key."""
    _, batch, kv_heads, regions, slots, dim = visual.k.shape
    count, piece = _pieces(visual.slots, dim, visual.k.dtype.itemsize)
    n = tiles.pieces
    listed = plan.regions.shape[-1]
    chunks = -(-listed * count // n)
    length = chunks * n

    b, h = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[:, None]
    at = jnp.maximum(plan.regions, 0)
    first = ((layer * batch + b) * kv_heads + h) * regions + at
    blocks = first[..., None] * count + jnp.arange(count, dtype=jnp.int32)
    blocks = jnp.where(plan.regions[..., None] >= 0, blocks, -1).reshape(batch, kv_heads, -1)
    blocks = jnp.pad(blocks, ((0, 0), (0, 0), (0, length - listed * count)), constant_values=-1)

    seen = grow.fill(visual_seen, {2: slots})[b, at]
    seen = jnp.where(seen, plan.heads[..., None], 0)

    def keys(a: jax.Array) -> jax.Array:
        a = grow.fill(a.reshape(batch, kv_heads, -1), {2: length * piece})
        return _seen_rows(a, chunks, rows)

    operands = {
        "blocks": blocks,
        "chunks": -(-plan.count * count // n),
        "seen": keys(seen),
        "k": visual.k.reshape(-1, piece, dim),
        "v": visual.v.reshape(-1, piece, dim),
    }
    for name in ("k_scale", "v_scale"):
        scale = getattr(visual, name)
        if scale is not None:
            operands[name] = keys(jnp.where(seen != 0, scale[layer, b, h, at], 0.0))
    return operands


def _text_operands(
    text_k: jax.Array, text_v: jax.Array, layer: jax.Array, text_seen: jax.Array, dim: int, rows: int
) -> dict[str, jax.Array]:
    """The text stream of all layers (of one layer if it has to be padded), and which keys are seen."""
    keys = text_k.shape[3]
    if keys < rows or text_k.shape[-1] != dim:
        text_k, text_v = (
            grow.fill(lax.dynamic_slice_in_dim(a, layer, 1), {3: max(keys, rows), 4: dim})
            for a in (text_k, text_v)
        )
        layer = jnp.zeros_like(layer)
    length = text_k.shape[3]
    chunks = -(-length // rows)
    place = jnp.arange(chunks)[:, None] * rows
    start = jnp.minimum(place, length - rows)
    key = start + jnp.arange(rows)
    fresh = key >= place
    seen = grow.fill(text_seen, {1: length})[:, key] & fresh
    last = jnp.where(jnp.any(seen, axis=-1), jnp.arange(1, chunks + 1, dtype=jnp.int32), 0)
    return {
        "layer": layer.astype(jnp.int32).reshape(1),
        "chunks": jnp.max(last, axis=-1),
        "seen": jnp.where(seen, -1, 0).astype(jnp.int32),
        "k": text_k.reshape(-1, length, dim),
        "v": text_v.reshape(-1, length, dim),
    }


def _queries(q: jax.Array, kv_heads: int, dim: int, parts: int) -> jax.Array:
    """bfloat16 [B * K * parts * 64, D]: the padded query rows of each kv head, as a sum of parts."""
    batch, heads, _ = q.shape
    q = q.reshape(batch, kv_heads, heads // kv_heads, q.shape[-1])
    q = grow.fill(q, {2: ROWS, 3: dim})
    found = []
    for _ in range(parts):
        found.append(lax.reduce_precision(q, 8, 7).astype(jnp.bfloat16))
        q = q - found[-1].astype(q.dtype)
    return jnp.stack(found, axis=2).reshape(-1, dim)


def _merge(partials: Sequence[jax.Array], group: int, dim: int) -> WithLse:
    """Join the partial softmaxes in the order of the splits: float32 [B, K, G, D] and [B, K, G]."""
    values, top, total = (a[:, :, :, :group] for a in partials)
    best = jnp.max(top, axis=2, keepdims=True)
    weights = jnp.exp2(top - jnp.where(jnp.isfinite(best), best, 0.0))
    total = jnp.sum(weights * total, axis=2)
    out = jnp.sum(weights[..., None] * values[..., :dim], axis=2)
    # The kernel's logits are in powers of two.
    return finished(out, best[:, :, 0] / _LOG2E, total)


def _splits(tiles: Tiles, rows: int, chunks: int) -> int:
    """Thread blocks per row and kv head (``rows`` of these in total); each has at least one chunk."""
    return min(max(tiles.blocks // rows, 1), chunks)


@functools.cache
def tuned() -> dict[str, dict[str, dict[str, int]]]:
    """Device kind or "default" -> dtype of the cache -> tiles; written by benchmarks/tune_decode.py."""
    return json.loads(_TILES.read_text())


def _tiles(spec: GazeSpec, piece: int, dtype: DTypeLike) -> Tiles:
    """Tiles tuned for this device; small when interpreted, so that tests have several chunks and splits."""
    if spec.interpret:
        return Tiles(pieces=2, stages=2, blocks=12)
    table = tuned()
    kind = jax.devices()[0].device_kind
    entry = table.get(kind, table["default"])[jnp.dtype(dtype).name]
    pieces = min(max(entry["keys"] // piece, 1), _MOST_COPIES)
    return Tiles(pieces, entry["stages"], entry["blocks"])


def fitted(
    spec: GazeSpec, slots: int, dim: int, dtypes: tuple[DTypeLike, DTypeLike, DTypeLike]
) -> tuple[Tiles, int, int]:
    """The tiles of a call, shrunk until they fit a block's shared memory.

    Args:
      spec: as of the call.
      slots: P.
      dim: D, padded.
      dtypes: dtypes of the queries, the visual cache and the text stream.

    Returns:
      The tiles, the rows of a chunk's tile, and the bytes of shared memory that a block takes.

    Raises:
      NotImplementedError: nothing fits.
    """
    _, piece = _pieces(slots, dim, jnp.dtype(dtypes[1]).itemsize)
    tiles = _tiles(spec, piece, dtypes[1])
    while True:
        rows = -(-tiles.pieces * piece // 64) * 64
        query = _parts(dtypes[0]) * ROWS * dim * 2
        streams = [
            tiles.stages * rows * (2 * dim * jnp.dtype(dtype).itemsize + 12) + _parts(dtype) * rows * dim * 2
            for dtype in dtypes[1:]
        ]
        taken = query + max(streams)
        if taken <= _SHARED_MEMORY and rows <= _MOST_ROWS:
            return tiles, rows, taken
        if tiles.pieces > 1:
            tiles = tiles._replace(pieces=tiles.pieces // 2)
        elif tiles.stages > 1:
            tiles = tiles._replace(stages=tiles.stages - 1)
        else:
            raise NotImplementedError(f"gaze_decode 'gpu' has no room for D = {dim} of {dtypes}.")


def gaze_decode(
    q: jax.Array,
    visual: Packed,
    text_k: jax.Array,
    text_v: jax.Array,
    layer: jax.Array,
    indices: jax.Array | None,
    visual_seen: jax.Array,
    text_seen: jax.Array,
    *,
    spec: GazeSpec,
) -> WithLse:
    """See :func:`pallas_kernels.gaze_decode.api.gaze_decode`.

    Raises:
      NotImplementedError: a dtype other than bfloat16, float32 and int8, more than 15 query heads per kv
        head, or a D too large for shared memory (above 256).
    """
    batch, heads, dim = q.shape
    kv_heads, keys = text_k.shape[2:4]
    group = heads // kv_heads
    regions = visual_seen.shape[1]
    wide = visual.k.shape[-1]
    plan = _plan(indices, batch, kv_heads, group, regions)
    listed = plan.regions.shape[-1]
    if not listed and not keys:
        return jnp.zeros_like(q), jnp.full((batch, heads), -jnp.inf, jnp.float32)

    _, piece = _pieces(visual.slots, wide, visual.k.dtype.itemsize)
    dtypes = (q.dtype, visual.k.dtype, text_k.dtype)
    query_parts, visual_parts, text_parts = map(_parts, dtypes)
    tiles, rows, _ = fitted(spec, visual.slots, wide, dtypes)
    operands: Operands = {"q": _queries(q, kv_heads, wide, query_parts)}
    if listed:
        operands["visual"] = _visual_operands(visual, plan, layer, visual_seen, tiles, rows)
    if keys:
        operands["text"] = _text_operands(text_k, text_v, layer, text_seen, wide, rows)
    chunks = sum(operands[kind]["seen"].shape[-2] for kind in ("visual", "text") if kind in operands)
    shape = Shape(
        rows=rows,
        dim=wide,
        piece=piece,
        tiles=tiles,
        splits=_splits(tiles, batch * kv_heads, chunks),
        heads=-(-group // 8) * 8,
        query_parts=query_parts,
        visual_parts=visual_parts,
        text_parts=text_parts,
        scale=spec.scale * _LOG2E,
    )
    partials = launch(shape, batch, kv_heads, operands, interpret=spec.interpret)
    out, lse = _merge(partials, group, dim)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(batch, heads)
