"""gaze_decode in XLA, tuned for CPUs; ``xla.py`` calls it when the program is compiled for a CPU.

A CPU differs from an accelerator in three ways. A gather writes a copy, which should still be in the cache
when it is multiplied: so one selection is gathered and multiplied at a time. A slice of a stacked array is
copied before a product, a whole array is not: so the visual cache is packed as one array per layer, and
the layer index picks a branch. And CPUs do not compute in bfloat16: gathered values are converted, which
is free at that point.

XLA does not partition loops over selections; on a mesh this runs under ``jax.shard_map``.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gaze_decode.plan import first_mention, mentioned
from pallas_kernels.softmax import WithLse, finished

Array = jax.Array
Arguments = tuple[Array, Array, Array, Array, Array | None, Array, Array]

_EXACT = jax.lax.Precision.HIGHEST


class Side(NamedTuple):
    """Keys or values: [L, B, K, R, P, D] floats; or int8 and the float32 [L, B, K, R, P] scales."""

    values: Array
    scales: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layered:
    """A cache with one array per layer: keys and values, each a :class:`Side` without the axis L."""

    layers: tuple[tuple[Side, Side], ...]


def pack(both: tuple[Side, Side]) -> Layered:
    """Split stacked keys and values into layers."""
    layers = jax.tree.leaves(both)[0].shape[0]
    return Layered(tuple(jax.tree.map(lambda a, i=i: a[i], both) for i in range(layers)))


def unpack(packed: Layered) -> tuple[Side, Side]:
    """Stack the layers again."""
    return jax.tree.map(lambda *a: jnp.stack(a), *packed.layers)


def gaze_decode(
    q: Array,
    visual: Layered,
    text_k: Array,
    text_v: Array,
    layer: Array,
    indices: Array | None,
    visual_seen: Array,
    text_seen: Array,
    *,
    scale: float,
) -> WithLse:
    """See :func:`pallas_kernels.gaze_decode.api.gaze_decode`."""
    rest = (q, text_k, text_v, layer, indices, visual_seen, text_seen)
    branches = [functools.partial(_resident, both, scale=scale) for both in visual.layers]
    return jax.lax.switch(layer, branches, *rest)


@functools.partial(jax.jit, static_argnames="scale")  # traced for one layer, whatever their number
def _resident(both: tuple[Side, Side], *arguments: *Arguments, scale: float) -> WithLse:
    """Attention in one layer; its visual keys and values are [B, K, R, P, D]."""

    def listed(at: Array) -> Callable[[Array, Array, Array], tuple[Side, Side]]:
        def one(b: Array, h: Array, n: Array) -> tuple[Side, Side]:
            k, v = (jax.tree.map(lambda a: _gather(a, b, h, at[b, h, n]), side) for side in both)
            return tokens(k), tokens(v)

        return one

    return attend(listed, lambda: (tokens(both[0]), tokens(both[1])), *arguments, scale=scale)


def attend(
    listed: Callable[[Array], Callable[[Array, Array, Array], tuple[Side, Side]]],
    everything: Callable[[], tuple[Side, Side]],
    q: Array,
    text_k: Array,
    text_v: Array,
    layer: Array,
    indices: Array | None,
    visual_seen: Array,
    text_seen: Array,
    *,
    scale: float,
) -> WithLse:
    """Attention in one layer, wherever its visual cache is stored.

    Args:
      listed: takes regions int32 [B, K, N, J]; returns a function of (row, kv head, list) that returns the
        keys and values of that list, [J * P, D] each.
      everything: returns all keys and values of the layer, [B, K, R * P, D] each.
      q, text_k, text_v, layer, indices, visual_seen, text_seen, scale: as for :func:`gaze_decode`.
    """
    batch, heads, dim = q.shape
    kv_heads = text_k.shape[2]
    group, regions = heads // kv_heads, visual_seen.shape[1]
    rows = q.reshape(batch, kv_heads, group, dim).astype(jnp.float32)
    picks = None if indices is None else indices.reshape(batch, kv_heads, -1, indices.shape[-1])
    part = functools.partial(_part, scale=scale)

    if picks is not None and picks.shape[2] * picks.shape[3] < regions:
        # One selection at a time: one per kv head, or one per query head.
        lists = picks.shape[2]
        fresh = first_mention(picks, regions)
        places = jnp.clip(picks, 0, regions - 1)
        fetch = listed(places)

        def one(i: Array) -> Part:
            b, h, n = i // (kv_heads * lists), i // lists % kv_heads, i % lists
            seen = (visual_seen[b, places[b, h, n]] & fresh[b, h, n][:, None]).reshape(1, -1)
            k, v = fetch(b, h, n)
            return part(rows[b, h].reshape(lists, group // lists, dim)[n], k, v, seen)

        # Single-row products use the machine fully only two at a time; larger products do so alone.
        together = 2 if lists > 1 else None
        many = jnp.arange(batch * kv_heads * lists, dtype=jnp.int32)
        visual = jax.lax.map(one, many, batch_size=together)
    else:
        seen = jnp.broadcast_to(visual_seen[:, None, None], (batch, kv_heads, 1, *visual_seen.shape[1:]))
        if picks is not None:
            seen = seen & mentioned(picks, regions)[..., None]
        seen = seen.reshape(*seen.shape[:3], -1)
        both = everything()
        if both[0].values.dtype == jnp.float32:
            visual = _whole(part, rows, *both, seen)
        else:

            def head(i: Array) -> Part:
                b, h = i // kv_heads, i % kv_heads
                k, v = jax.tree.map(lambda a: a[b, h], both)
                return part(rows[b, h], k, v, seen[b, h])

            visual = jax.lax.map(head, jnp.arange(batch * kv_heads, dtype=jnp.int32))

    dk, dv = (
        jax.lax.dynamic_index_in_dim(a, layer, keepdims=False).astype(jnp.float32) for a in (text_k, text_v)
    )
    text_seen = jnp.broadcast_to(text_seen[:, None, None], (batch, kv_heads, 1, text_seen.shape[-1]))
    text = jax.vmap(jax.vmap(part))(rows, Side(dk), Side(dv), text_seen)
    visual = jax.tree.map(lambda a, like: a.reshape(like.shape), visual, text)
    out, lse = _merge(visual, text)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(batch, heads)


class Part(NamedTuple):
    """Partial softmax over some keys: weighted values [..., G, D], maximum and sum [..., G], float32."""

    values: Array
    top: Array
    total: Array


def _merge(a: Part, b: Part) -> WithLse:
    """Join two partial softmaxes: [..., G, D] and [..., G]; see :func:`pallas_kernels.softmax.finished`."""
    top = jnp.maximum(a.top, b.top)
    shares = [jnp.exp(part.top - jnp.where(jnp.isfinite(top), top, 0.0)) for part in (a, b)]
    total = a.total * shares[0] + b.total * shares[1]
    out = a.values * shares[0][..., None] + b.values * shares[1][..., None]
    return finished(out, top, total)


def _whole(part: Callable[..., Part], rows: Array, keys: Side, values: Side, seen: Array) -> Part:
    """:func:`_part` for all rows [B, K, G, D] over all keys and values [B, K, A, D], without a copy."""

    def run(clean: bool) -> Part:
        return jax.vmap(jax.vmap(functools.partial(part, clean=clean, keys_first=True)))(
            rows, keys, values, seen
        )

    # Cleaning V would copy it. NaN in unseen values is rare, so clean only if the result shows one.
    out = run(clean=False)
    return jax.lax.cond(jnp.isfinite(out.values).all(), lambda: out, lambda: run(clean=True))


def _gather(array: Array, b: Array, h: Array, at: Array) -> Array:
    """Regions int32 [J] of one row and kv head of [B, K, R, ...]: [J, ...]."""
    dims = jax.lax.GatherDimensionNumbers(
        offset_dims=tuple(range(1, array.ndim - 2)),
        collapsed_slice_dims=(0, 1, 2),
        start_index_map=(0, 1, 2),
    )
    where = jnp.stack([jnp.full_like(at, b), jnp.full_like(at, h), at], axis=-1)
    return jax.lax.gather(array, where, dims, (1, 1, 1, *array.shape[3:]), mode="promise_in_bounds")


def tokens(side: Side) -> Side:
    """Reshape [..., R, P, D] to [..., R * P, D], and the scales likewise."""
    *lead, regions, slots, dim = side.values.shape
    values = side.values.reshape(*lead, regions * slots, dim)
    return Side(values, None if side.scales is None else side.scales.reshape(*lead, regions * slots))


def _part(
    q: Array,
    keys: Side,
    values: Side,
    seen: Array,
    *,
    scale: float,
    clean: bool = True,
    keys_first: bool = False,
) -> Part:
    """Attention of one kv head over some keys, before the division by the sum.

    Args:
      q: float32 [G, D].
      keys, values: [A, D] with scales [A] or None.
      seen: bool [G or 1, A].
      scale: factor of the logits.
      clean: set unseen values to zero; otherwise they must be finite.
      keys_first: whether the keys are the left side of the first product. This is faster if they are a
        whole layer, slower if they were just gathered.
    """
    # Not q @ k.T: XLA would transpose k in memory.
    dot = functools.partial(jnp.einsum, precision=_EXACT)
    k, v = keys.values.astype(jnp.float32), values.values.astype(jnp.float32)
    logits = scale * (dot("AD,GD->AG", k, q).T if keys_first else dot("GD,AD->GA", q, k))
    if keys.scales is not None:
        logits = logits * keys.scales
    # Unseen keys may be NaN. A key affects only its own logit, which is masked here.
    logits = jnp.where(seen, logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, initial=-jnp.inf)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0.0)[:, None])
    total = jnp.sum(weights, axis=-1)
    if values.scales is not None:
        weights = jnp.where(seen, weights * values.scales, 0.0)
    if clean:
        v = jnp.where(jnp.any(seen, axis=0)[:, None], v, 0.0)
    return Part(dot("GA,AD->GD", weights, v), top, total)
