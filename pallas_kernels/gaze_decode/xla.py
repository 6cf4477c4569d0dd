"""gaze_decode in plain XLA: gather the selected regions, then one small softmax.

Only listed regions are read from the cache, directly from the stacked array: no layer's KV is sliced out
first. Rows and kv heads stay dimensions of every operation, so the compiler can split them over devices.
If the selections of a group's query heads add up to R regions or more, reading every region once under a
mask is less work than gathering. CPUs have their own program, in ``cpu.py``.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels import quantize
from pallas_kernels.dispatch import target
from pallas_kernels.gaze_decode import cpu, grow
from pallas_kernels.gaze_decode.cpu import Layered, Side
from pallas_kernels.gaze_decode.plan import first_mention, mentioned
from pallas_kernels.softmax import WithLse, finished
from pallas_kernels.spec import GazeSpec

Packed = tuple[Side, Side] | Layered
_Tree = TypeVar("_Tree")

TEXT_MULTIPLE = 1
_EXACT = jax.lax.Precision.HIGHEST  # float32 stays float32 on TPU; bfloat16 inputs are not affected


def supports(spec: GazeSpec) -> str | None:
    """Every spec, everywhere."""
    del spec
    return None


def pack(k: jax.Array, v: jax.Array, *, spec: GazeSpec) -> Packed:
    """Keep [L, B, K, R, P, D], where a region of a head is already contiguous; on a CPU, split by layer."""
    both = (Side(k), Side(v))
    if spec.visual_dtype == "int8":
        both = (Side(*quantize.quantize(k)), Side(*quantize.quantize(v)))
    return cpu.pack(both) if target() == "cpu" else both


def unpack(packed: Packed) -> tuple[jax.Array, jax.Array]:
    """Return k and v, [L, B, K, R, P, D] each; float32 if they were quantised."""
    if isinstance(packed, Layered):
        packed = cpu.unpack(packed)
    k, v = (a.values if a.scales is None else quantize.dequantize(a.values, a.scales) for a in packed)
    return k, v


def _axis(packed: Packed) -> int:
    """The axis R; arrays per layer have no axis L."""
    return 2 if isinstance(packed, Layered) else 3


def reserve(packed: Packed, regions: int, slots: int) -> Packed:
    """Pad R and P with zeros to the new sizes."""
    return larger(packed, _axis(packed), regions, slots)


def larger(sides: _Tree, axis: int, regions: int, slots: int) -> _Tree:
    """Pad R, which is at ``axis``, and P with zeros to the new sizes."""
    return jax.tree.map(lambda a: grow.fill(a, {axis: regions, axis + 1: slots}), sides)


def write(packed: Packed, piece: Packed, start: jax.Array) -> Packed:
    """Overwrite the regions from ``start`` on with those of ``piece``."""
    return grow.write(packed, piece, start, _axis(packed))


def _gather(array: jax.Array, layer: jax.Array, at: jax.Array) -> jax.Array:
    """Gather regions int32 [B, K, N, J] of a layer of [L, B, K, R, ...]: [B, K, N, J, ...]."""
    # Rows and kv heads are batch dimensions, not indices, so the partitioner can split them. Written out,
    # because vmap would move them to the front and transpose the cache.
    dims = jax.lax.GatherDimensionNumbers(
        offset_dims=tuple(range(4, array.ndim)),
        collapsed_slice_dims=(0, 3),
        start_index_map=(0, 3),
        operand_batching_dims=(1, 2),
        start_indices_batching_dims=(0, 1),
    )
    where = jnp.stack([jnp.broadcast_to(layer, at.shape), at], axis=-1)
    return jax.lax.gather(array, where, dims, (1, 1, 1, 1, *array.shape[4:]), mode="promise_in_bounds")


def _read(
    listed: Callable[[jax.Array], tuple[Side, Side]],
    everything: Callable[[], tuple[Side, Side]],
    picks: jax.Array | None,
    visual_seen: jax.Array,
) -> tuple[Side, Side, jax.Array]:
    """Keys and values to attend to, [B, K, N, A, D], and which of them count, bool [B, K, N, G/N or 1, A].

    N is G if each query head has its own selection, 1 if the group shares one or everything is read.
    """
    batch, regions, slots = visual_seen.shape
    if picks is not None and picks.shape[2] * picks.shape[3] < regions:
        at = jnp.clip(picks, 0, regions - 1)
        rows = jnp.arange(batch, dtype=jnp.int32)[:, None, None, None]
        seen = visual_seen[rows, at] & first_mention(picks, regions)[..., None]
        return *listed(at), seen.reshape(*picks.shape[:3], 1, -1)
    both = jax.tree.map(lambda a: a[:, :, None], everything())
    kv_heads = both[0].values.shape[1]
    seen = jnp.broadcast_to(visual_seen[:, None, None], (batch, kv_heads, 1, regions, slots))
    if picks is not None:
        seen = seen & mentioned(picks, regions)[..., None]
    return *both, seen.reshape(batch, kv_heads, 1, seen.shape[2], regions * slots)


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
    """See :func:`pallas_kernels.gaze_decode.api.gaze_decode`."""
    rest = (text_k, text_v, layer, indices, visual_seen, text_seen)
    if isinstance(visual, Layered):
        return cpu.gaze_decode(q, visual, *rest, scale=spec.scale)

    def tokens(read: Callable[[jax.Array], jax.Array]) -> tuple[Side, Side]:
        k, v = (cpu.tokens(jax.tree.map(read, side)) for side in visual)
        return k, v

    def listed(at: jax.Array) -> tuple[Side, Side]:
        return tokens(lambda a: _gather(a, layer, at))

    def everything() -> tuple[Side, Side]:
        return tokens(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False))

    return attend(listed, everything, q, *rest, scale=spec.scale)


def attend(
    listed: Callable[[jax.Array], tuple[Side, Side]],
    everything: Callable[[], tuple[Side, Side]],
    q: jax.Array,
    text_k: jax.Array,
    text_v: jax.Array,
    layer: jax.Array,
    indices: jax.Array | None,
    visual_seen: jax.Array,
    text_seen: jax.Array,
    *,
    scale: float,
) -> WithLse:
    """Attention in one layer, wherever its visual cache is stored.

    Args:
      listed: takes regions int32 [B, K, N, J]; returns their keys and values, [B, K, N, J * P, D] each.
      everything: returns all keys and values of the layer, [B, K, R * P, D] each.
      q, text_k, text_v, layer, indices, visual_seen, text_seen: as for :func:`gaze_decode`.
      scale: factor of the logits.
    """
    batch, heads, dim = q.shape
    kv_heads = text_k.shape[2]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
    picks = None if indices is None else indices.reshape(batch, kv_heads, -1, indices.shape[-1])
    keys, values, seen = _read(listed, everything, picks, visual_seen)
    rows = grouped.reshape(batch, kv_heads, keys.values.shape[2], -1, dim)

    def product(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = a.astype(q.dtype), b.astype(q.dtype)
        return jnp.einsum(form, a, b, precision=_EXACT, preferred_element_type=jnp.float32)

    # Unseen keys and values may be NaN. A key affects only its own logit, which is masked; a value is zeroed.
    logits = product("BKNGD,BKNAD->BKNGA", rows, keys.values) * scale
    if keys.scales is not None:
        logits = logits * keys.scales[:, :, :, None]
    logits = jnp.where(seen, logits, -jnp.inf)
    dk, dv = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (text_k, text_v))
    dv = jnp.where(text_seen[:, None, :, None], dv, jnp.zeros((), dv.dtype))
    text = product("BKGD,BKSD->BKGS", grouped, dk) * scale
    text = jnp.where(text_seen[:, None, None], text, -jnp.inf)

    top = jnp.maximum(
        jnp.max(logits, axis=-1, initial=-jnp.inf).reshape(text.shape[:3]),
        jnp.max(text, axis=-1, initial=-jnp.inf),
    )
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(logits - top.reshape(rows.shape[:4])[..., None])
    text = jnp.exp(text - top[..., None])
    total = jnp.sum(weights, axis=-1).reshape(top.shape) + jnp.sum(text, axis=-1)
    if values.scales is None:
        wanted = jnp.any(seen, axis=3)[..., None]
        values = Side(jnp.where(wanted, values.values, jnp.zeros((), values.values.dtype)))
    else:
        weights = jnp.where(seen, weights * values.scales[:, :, :, None], 0.0)
    out = product("BKNGA,BKNAD->BKNGD", weights, values.values).reshape(grouped.shape)
    out += product("BKGS,BKSD->BKGD", text, dv)
    out, lse = finished(out, top, total)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(batch, heads)
