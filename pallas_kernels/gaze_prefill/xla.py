"""gaze_prefill in plain XLA: dense matmuls under a mask, in blocks of queries.

Memory is bounded by ``spec.query_block``: logits exist for one block at a time and the backward pass
recomputes them. Keys that no query of a block sees are skipped where that pays (``chunks.py``): on a CPU, and
on every device with ``spec.local``. Skipping regions that no query of a block selected would gain little:
even at 10 % kept regions, the block's queries together select almost all of them.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import target
from pallas_kernels.gaze_prefill import chunks
from pallas_kernels.gaze_prefill.rows import Keys, by_query, keys_of, queries_of, rows_of
from pallas_kernels.softmax import WithLse
from pallas_kernels.spec import GazeSpec, KeyPlaces, Windows

_Tree = TypeVar("_Tree")

_EXACT = jax.lax.Precision.HIGHEST  # float32 stays float32 on TPU; bfloat16 inputs are not affected


def supports(spec: GazeSpec) -> str | None:
    """Every spec, everywhere."""
    del spec
    return None


def in_chunks(visual_k: jax.Array, text_k: jax.Array, spec: GazeSpec) -> bool:
    """Whether keys [B, K, R, P, D] and [B, K, S, D] are attended to in chunks, the unseen left out."""
    # Short sequences fit the CPU's cache without chunks.
    long = visual_k.shape[2] * visual_k.shape[3] + text_k.shape[2] > chunks.CHUNK
    return long and (spec.local or target() == "cpu")


def _inside(
    queries: Windows, lo: jax.Array, hi: jax.Array, order: jax.Array, segment: jax.Array
) -> jax.Array:
    """bool [B, T, N]: whether key n is in query t's segment and interval; order -1 is no key."""
    segment_of = queries.segment[:, :, None]
    order, segment = order[:, None, :], segment[:, None, :]
    near = (segment == segment_of) & (segment_of >= 0)
    return near & (order >= jnp.maximum(lo, 0)[:, :, None]) & (order <= hi[:, :, None])


def _seen(
    queries: Windows, places: KeyPlaces, selected: jax.Array | None, heads: int
) -> tuple[jax.Array, jax.Array]:
    """Masks of visual and text-stream keys: bool [B, T, Hs or 1, R, P] and [B, T, 1, S]."""
    batch, regions, slots = places.visual_order.shape
    visual = _inside(
        queries,
        queries.visual_lo,
        queries.visual_hi,
        places.visual_order.reshape(batch, -1),
        jnp.repeat(places.region_segment, slots, axis=1),
    ).reshape(batch, queries.segment.shape[1], 1, regions, slots)
    text = _inside(queries, queries.text_lo, queries.text_hi, places.text_order, places.text_segment)
    if selected is not None:
        open_to = selected | ~queries.routed[:, :, None, None]
        visual = visual & open_to[..., None]
    return visual, text[:, :, None, :]


def _attend(
    q: jax.Array,
    visual: Keys,
    text: Keys,
    visual_seen: jax.Array,
    text_seen: jax.Array,
    scale: float,
) -> WithLse:
    """One softmax over both streams for one block of queries, under the masks."""
    batch, length, heads = q.shape[:3]
    kv_heads, tokens = visual.k.shape[1:3]
    group = heads // kv_heads
    rows = rows_of(q, kv_heads)

    def by_group(mask: jax.Array) -> jax.Array:
        """Reshape [B, T, 1 or K or H, N] to [B, K or 1, G or 1, T, N]."""
        shared = mask.shape[2]
        if shared == heads:
            mask = mask.reshape(batch, length, kv_heads, group, mask.shape[-1])
        else:
            mask = mask[:, :, :, None]
        return jnp.moveaxis(mask, 1, 3)

    def logits(keys: Keys, mask: jax.Array) -> jax.Array:
        product = jnp.einsum(
            "BKMD,BKND->BKMN", rows, keys.k, precision=_EXACT, preferred_element_type=jnp.float32
        ).reshape(batch, kv_heads, group, length, keys.k.shape[2])
        return jnp.where(by_group(mask), product * scale + keys.poison[:, :, None, None], -jnp.inf)

    both = jnp.concatenate([logits(visual, visual_seen), logits(text, text_seen)], axis=-1)
    top = jax.lax.stop_gradient(jnp.max(both, axis=-1, keepdims=True, initial=-jnp.inf))
    weights = jnp.exp(both - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    none = total == 0
    divisor = jnp.where(none, 1.0, total)
    lse = jnp.where(none, -jnp.inf, top + jnp.log(divisor)).reshape(batch, kv_heads, -1)
    weights = (weights / divisor).astype(q.dtype)

    def weigh(weights: jax.Array, values: jax.Array) -> jax.Array:
        weights = weights.reshape(batch, kv_heads, group * length, values.shape[2])
        return jnp.einsum(
            "BKMN,BKND->BKMD", weights, values, precision=_EXACT, preferred_element_type=jnp.float32
        )

    out = weigh(weights[..., :tokens], visual.v) + weigh(weights[..., tokens:], text.v)
    return queries_of(out, q.shape).astype(q.dtype), by_query(lse, q.shape)


def _blocked(tree: _Tree, count: int, block: int) -> _Tree:
    """Pad axis 1 of every leaf to count * block and move the blocks to the front."""

    def leaf(a: jax.Array) -> jax.Array:
        pad = [(0, 0)] * a.ndim
        pad[1] = (0, count * block - a.shape[1])
        a = jnp.pad(a, pad)
        return jnp.moveaxis(a.reshape(a.shape[0], count, block, *a.shape[2:]), 1, 0)

    return jax.tree.map(leaf, tree)


def gaze_prefill(
    q: jax.Array,
    visual_k: jax.Array,
    visual_v: jax.Array,
    text_k: jax.Array,
    text_v: jax.Array,
    queries: Windows,
    places: KeyPlaces,
    selected: jax.Array | None,
    *,
    spec: GazeSpec,
) -> WithLse:
    """See :func:`pallas_kernels.gaze_prefill.api.gaze_prefill`."""
    batch, length, heads, dim = q.shape
    kv_heads, regions, slots = visual_k.shape[1:4]
    flat = (batch, kv_heads, regions * slots, dim)
    visual = keys_of(visual_k.reshape(flat), visual_v.reshape(flat))
    text = keys_of(text_k, text_v)
    if in_chunks(visual_k, text_k, spec):
        by_region: Keys = jax.tree.map(
            lambda a: a.reshape(*a.shape[:2], regions, slots, *a.shape[3:]), visual
        )
        return chunks.attend(q, by_region, text, queries, places, selected, spec=spec)
    block = min(spec.query_block, length)
    count = -(-length // block)

    def attend(xs: tuple[jax.Array, Windows, jax.Array | None]) -> WithLse:
        visual_seen, text_seen = _seen(xs[1], places, xs[2], heads)
        visual_seen = visual_seen.reshape(*visual_seen.shape[:3], regions * slots)
        return _attend(xs[0], visual, text, visual_seen, text_seen, spec.scale)

    if count == 1:
        return attend((q, queries, selected))
    blocks = _blocked((q, queries, selected), count, block)
    # Padding queries are zeros, so their segment is 0; set it to -1 so that they see nothing.
    alive = (jnp.arange(count * block) < length).reshape(count, 1, block)
    windows = dataclasses.replace(blocks[1], segment=jnp.where(alive, blocks[1].segment, -1))
    out, lse = jax.lax.map(jax.checkpoint(attend), (blocks[0], windows, blocks[2]))

    def joined(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a, 0, 1).reshape(batch, count * block, *a.shape[3:])[:, :length]

    return joined(out), joined(lse)
