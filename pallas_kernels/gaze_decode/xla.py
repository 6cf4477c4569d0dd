"""gaze_decode in plain XLA: read the selected regions tile by tile, then one small softmax.

Only listed regions are read from the cache, straight out of the stacked array: no layer's KV is
sliced out first. A *tile* is what one step of a loop reads of every row and kv head, which therefore stay
dimensions of the program and may be sharded. On a CPU tiles fit its cache: a gather writes what it read,
and a matmul must find that copy before it falls out. Elsewhere one tile is everything.

Where the selections of a group's query heads add up to R regions or more, reading each region once under
a mask is less work than gathering; so it is with lists that can hold every region.

On a CPU the cache is packed as an array per layer, and the layer index picks a branch: XLA copies a slice
of a stacked array before it multiplies, but hands a whole array to the product as it is.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import quantize
from pallas_kernels.dispatch import target
from pallas_kernels.spec import GazeSpec


class Side(NamedTuple):
    """Keys or values: [L, B, K, R, P, D] floats; or int8 and the float32 [L, B, K, R, P] scales."""

    values: jax.Array
    scales: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layered:
    """A CPU's cache: keys and values of each layer, as :class:`Side` with L = 1."""

    layers: tuple[tuple[Side, Side], ...]


Packed = tuple[Side, Side] | Layered

DENSE_MULTIPLE = 1

_EXACT = jax.lax.Precision.HIGHEST  # float32 stays float32 on TPU; bfloat16 inputs are not affected
# Of keys in one tile on a CPU, as float32: a third of the second-level cache that one core usually has.
# Larger tiles are split over two threads by XLA, which a quiet machine likes and a busy one does not.
_TILE_BYTES = 3 * 2**17


def supports(spec: GazeSpec) -> str | None:
    """Every spec, everywhere."""
    del spec
    return None


def pack(k: jax.Array, v: jax.Array, *, spec: GazeSpec) -> Packed:
    """Keep [L, B, K, R, P, D]: a region of a head is one contiguous block already."""
    both = (Side(k), Side(v))
    if spec.visual_dtype == "int8":
        both = (Side(*quantize.quantize(k)), Side(*quantize.quantize(v)))
    if target() != "cpu":
        return both
    cut = [jax.tree.map(lambda a, i=i: a[i : i + 1], both) for i in range(k.shape[0])]
    return Layered(tuple(cut))


def unpack(packed: Packed) -> tuple[jax.Array, jax.Array]:
    """Keep [L, B, K, R, P, D], or make it float32 again."""
    if isinstance(packed, Layered):
        return unpack(jax.tree.map(lambda *a: jnp.concatenate(a), *packed.layers))
    k, v = (a.values if a.scales is None else quantize.dequantize(a.values, a.scales) for a in packed)
    return k, v


class _Plan(NamedTuple):
    """What the tiles read, n tiles in front; ``whole`` says that the only tile is all there is.

    N is G selections per kv head, or the single one that the group shares; A = tile regions * P.
    """

    at: jax.Array  # int32 [n, B, K, N, A / P] regions to gather, or [n] first regions of slices
    seen: jax.Array  # bool [n, B, K, N, G / N or 1, A] logits that count
    # (array [L, B, K, R, ...], layer, one of ``at``) -> [B, K, N, A / P, ...]
    read: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    whole: bool = False


def _tile_regions(regions: int, bytes_per_region: int) -> int:
    """Regions of a tile: all of them but on a CPU, else as equal as a tile's size allows."""
    if target() != "cpu":
        return regions
    most = max(1, _TILE_BYTES // max(bytes_per_region, 1))
    return math.ceil(regions / math.ceil(regions / most))


def _gather(array: jax.Array, layer: jax.Array, at: jax.Array) -> jax.Array:
    """[L, B, K, R, ...] at int32 [B, K, N, c]: [B, K, N, c, ...]."""
    # Rows and kv heads are batch dimensions, not indices: the partitioner can split them. Written out,
    # because vmap would put them first and turn the cache around.
    dims = jax.lax.GatherDimensionNumbers(
        offset_dims=tuple(range(4, array.ndim)),
        collapsed_slice_dims=(0, 3),
        start_index_map=(0, 3),
        operand_batching_dims=(1, 2),
        start_indices_batching_dims=(0, 1),
    )
    where = jnp.stack([jnp.broadcast_to(layer, at.shape), at], axis=-1)
    return jax.lax.gather(array, where, dims, (1, 1, 1, 1, *array.shape[4:]), mode="promise_in_bounds")


def _listed(picks: jax.Array, visual_seen: jax.Array, bytes_per_region: int) -> _Plan:
    """Gather what int32 [B, K, N, J] lists."""
    batch, kv_heads, many, capacity = picks.shape
    regions = visual_seen.shape[1]
    tile = _tile_regions(capacity, bytes_per_region * batch * kv_heads * many)
    count = -(-capacity // tile)
    fresh = _first_mention(picks, regions)
    pad = ((0, 0),) * 3 + ((0, count * tile - capacity),)
    at, fresh = (
        jnp.moveaxis(jnp.pad(a, pad).reshape(batch, kv_heads, many, count, tile), 3, 0)
        for a in (jnp.clip(picks, 0, regions - 1), fresh)
    )
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None, None, None]
    seen = visual_seen[rows, at] & fresh[..., None]
    return _Plan(at, seen.reshape(count, batch, kv_heads, many, 1, -1), _gather)


def _all(
    picks: jax.Array | None, kv_heads: int, visual_seen: jax.Array, bytes_per_region: int, whole: bool
) -> _Plan:
    """Slice out every region once; int32 [B, K, N, J] decides by mask."""
    batch, regions, slots = visual_seen.shape
    tile = regions if whole else _tile_regions(regions, bytes_per_region * batch * kv_heads)
    count = -(-regions // tile)
    seen = jnp.broadcast_to(visual_seen[:, None, None], (batch, kv_heads, 1, regions, slots))
    if picks is not None:
        seen = seen & _mentioned(picks, regions)[..., None]
    # The last tile starts early enough to be whole; what it reads again does not count again.
    begin = jnp.arange(count, dtype=jnp.int32) * tile
    start = jnp.minimum(begin, regions - tile)
    at = start[:, None] + jnp.arange(tile, dtype=jnp.int32)
    seen = jnp.moveaxis(seen[:, :, :, at] & (at >= begin[:, None])[..., None], 3, 0)

    def read(array: jax.Array, layer: jax.Array, start: jax.Array) -> jax.Array:
        at: list[Any] = [layer, 0, 0, start] + [0] * (array.ndim - 4)
        return jax.lax.dynamic_slice(array, at, (1, batch, kv_heads, tile, *array.shape[4:]))[0][:, :, None]

    return _Plan(start, seen.reshape(count, batch, kv_heads, 1, -1, tile * slots), read, whole)


def _mentions(picks: jax.Array, regions: int) -> tuple[jax.Array, jax.Array]:
    """int32 [B, K, N, R + 1] first slot that names each region, J if none; and the place of each slot."""
    # Unused slots are all sent to the extra place R.
    place = jnp.where(picks >= 0, picks, regions)
    slots = jnp.arange(picks.shape[-1], dtype=jnp.int32)
    nobody = jnp.full((regions + 1,), picks.shape[-1], jnp.int32)
    one = jax.vmap(jax.vmap(jax.vmap(lambda place: nobody.at[place].min(slots))))
    return one(place), place


def _mentioned(picks: jax.Array, regions: int) -> jax.Array:
    """bool [B, K, N, R]: some slot names the region."""
    return _mentions(picks, regions)[0][..., :regions] < picks.shape[-1]


def _first_mention(picks: jax.Array, regions: int) -> jax.Array:
    """bool [B, K, N, J]: the slot names a region that no earlier slot names."""
    first, place = _mentions(picks, regions)
    slots = jnp.arange(picks.shape[-1], dtype=jnp.int32)
    return (jnp.take_along_axis(first, place, axis=-1) == slots) & (picks >= 0)


def _each_tile(body: Callable[..., jax.Array], xs: Any) -> jax.Array:
    """[n, ...] results of ``body``; a single tile needs no loop."""
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        return body(jax.tree.map(lambda a: a[0], xs))[None]
    return jax.lax.map(body, xs)


def _sum_of_tiles(body: Callable[..., jax.Array], xs: Any, shape: tuple[int, ...]) -> jax.Array:
    """Sum of ``body``, which makes float32 of ``shape``."""
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        return body(jax.tree.map(lambda a: a[0], xs))
    zero = jnp.zeros(shape, jnp.float32)
    return jax.lax.scan(lambda total, x: (total + body(x), None), zero, xs)[0]


def gaze_decode(
    q: jax.Array,
    visual: Packed,
    dense_k: jax.Array,
    dense_v: jax.Array,
    layer: jax.Array,
    indices: jax.Array | None,
    visual_seen: jax.Array,
    dense_seen: jax.Array,
    *,
    spec: GazeSpec,
) -> jax.Array:
    """See :func:`pallas_kernels.gaze_decode.api.gaze_decode`."""
    rest: Any = (q, dense_k, dense_v, layer, indices, visual_seen, dense_seen)
    if not isinstance(visual, Layered):
        return _attend(*visual, layer, *rest, scale=spec.scale)
    only = jnp.zeros((), jnp.int32)
    branches = [functools.partial(_attend, k, v, only, scale=spec.scale) for k, v in visual.layers]
    return jax.lax.switch(layer, branches, *rest)


def _attend(
    keys: Side,
    values: Side,
    visual_layer: jax.Array,
    q: jax.Array,
    dense_k: jax.Array,
    dense_v: jax.Array,
    layer: jax.Array,
    indices: jax.Array | None,
    visual_seen: jax.Array,
    dense_seen: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """The op with the visual cache's sides and its own layer index apart."""
    batch, heads, dim = q.shape
    kv_heads = dense_k.shape[2]
    regions, slots = visual_seen.shape[1:]
    # A CPU has no bfloat16 arithmetic; in a tile the conversion costs nothing.
    dtype = jnp.dtype(jnp.float32) if target() == "cpu" else q.dtype
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim).astype(dtype)

    def product(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(form, a, b.astype(dtype), precision=_EXACT, preferred_element_type=jnp.float32)

    # What is not seen may be NaN: of a key only its own logit is, and that is overruled; a value must go.
    dk, dv = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (dense_k, dense_v))
    dv = jnp.where(dense_seen[:, None, :, None], dv, jnp.zeros((), dv.dtype))
    dense = product("BKGD,BKSD->BKGS", grouped, dk)
    dense = jnp.where(dense_seen[:, None, None, :], dense * scale, -jnp.inf)
    if regions == 0:
        weights, total = _exponentials(dense, jnp.max(dense, axis=-1, initial=-jnp.inf))
        out = product("BKGS,BKSD->BKGD", weights.astype(dtype), dv)
        return (out / jnp.where(total > 0, total, 1.0)[..., None]).reshape(q.shape).astype(q.dtype)

    picks = None if indices is None else indices.reshape(batch, kv_heads, -1, indices.shape[-1])
    bytes_per_region = slots * dim * dtype.itemsize
    if picks is None or picks.shape[2] * picks.shape[3] >= regions:
        # An array of its own, in the dtype of the product, needs no tiles: nothing of it is copied.
        whole = target() == "cpu" and keys.values.shape[0] == 1 and keys.values.dtype == dtype
        plan = _all(picks, kv_heads, visual_seen, bytes_per_region, whole)
    else:
        plan = _listed(picks, visual_seen, bytes_per_region)
    many = plan.seen.shape[3]
    rows = grouped.reshape(batch, kv_heads, many, -1, dim)

    def read(array: jax.Array, at: jax.Array) -> jax.Array:
        tile = plan.read(array, visual_layer, at)
        return tile.reshape(batch, kv_heads, many, -1, *array.shape[5:])

    def score(at: jax.Array) -> jax.Array:
        logits = product("BKNGD,BKNAD->BKNGA", rows, read(keys.values, at))
        return logits if keys.scales is None else logits * read(keys.scales, at)[..., None, :]

    def weigh(x: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        at, weights, seen = x
        tile = read(values.values, at)
        if plan.whole:
            # To clean V would copy it; NaN where nobody looks is rare enough to be found afterwards.
            out = product("BKNGA,BKNAD->BKNGD", weights.astype(dtype), tile)
            return jax.lax.cond(
                jnp.isfinite(out).all(), lambda: out, lambda: weigh_clean(weights, tile, seen)
            )
        if values.scales is not None:
            weights = jnp.where(seen, weights * read(values.scales, at)[..., None, :], 0.0)
            return product("BKNGA,BKNAD->BKNGD", weights.astype(dtype), tile)
        return weigh_clean(weights, tile, seen)

    def weigh_clean(weights: jax.Array, tile: jax.Array, seen: jax.Array) -> jax.Array:
        tile = jnp.where(jnp.any(seen, axis=3)[..., None], tile, jnp.zeros((), tile.dtype))
        return product("BKNGA,BKNAD->BKNGD", weights.astype(dtype), tile)

    logits = jnp.where(plan.seen, _each_tile(score, plan.at) * scale, -jnp.inf)
    top = jnp.maximum(
        jnp.max(logits, axis=(0, 5)).reshape(dense.shape[:3]), jnp.max(dense, axis=-1, initial=-jnp.inf)
    )
    weights, total = _exponentials(dense, top)
    out = product("BKGS,BKSD->BKGD", weights.astype(dtype), dv)
    weights = jnp.exp(logits - _finite(top).reshape(rows.shape[:4])[..., None])
    total += jnp.sum(weights, axis=(0, 5)).reshape(total.shape)
    out += _sum_of_tiles(weigh, (plan.at, weights, plan.seen), rows.shape).reshape(grouped.shape)
    return (out / jnp.where(total > 0, total, 1.0)[..., None]).reshape(q.shape).astype(q.dtype)


def _finite(top: jax.Array) -> jax.Array:
    """0 for the maximum of nothing: exp(-inf - 0) is 0, exp(-inf + inf) would be NaN."""
    return jnp.where(jnp.isfinite(top), top, 0.0)


def _exponentials(logits: jax.Array, top: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(logits - top) and its sum over the last axis."""
    weights = jnp.exp(logits - _finite(top)[..., None])
    return weights, jnp.sum(weights, axis=-1)
