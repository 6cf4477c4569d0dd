"""Which regions a kernel fetches for a kv head, and which of its query heads selected each.

Query heads of one kv head read the same keys. If each head has its own selection, fetching every selection
would read a region up to G times; a kernel fetches the union once and masks per head.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Union:
    """The regions to fetch for each kv head, each listed once.

    Attributes:
      regions: int32 [B, K, U], ascending (memory order); -1 at the end.
      heads: int32 [B, K, U]; bit g is set if query head g of the group reads the region; 0 at the end.
      count: int32 [B, K], number of regions before the first -1.
    """

    regions: jax.Array
    heads: jax.Array
    count: jax.Array


def everything(batch: int, kv_heads: int, group: int, regions: int) -> Union:
    """The union for dense attention: all R regions, for all heads."""
    shape = (batch, kv_heads, regions)
    return Union(
        jnp.broadcast_to(jnp.arange(regions, dtype=jnp.int32), shape),
        jnp.full(shape, (1 << group) - 1, jnp.int32),
        jnp.full(shape[:2], regions, jnp.int32),
    )


def union(indices: jax.Array, kv_heads: int, group: int, regions: int) -> Union:
    """Join the selections of a kv head's query heads.

    Sorts J or G * J numbers per kv head, never R; the result is the same on every device.

    Args:
      indices: int32 [B, Hs, J] with Hs = K * G or K; -1 in unused slots; duplicates count once.
      kv_heads: K.
      group: G, at most 15: the sum of all slots' bits has to fit an int32.
      regions: R.

    Returns:
      A :class:`Union` with U = min(slots per kv head, R).
    """
    if group > 15:
        raise NotImplementedError(
            f"Kernels of gaze_decode take at most 15 query heads per kv head, not {group}."
        )
    batch, shared, capacity = indices.shape
    lists = shared // kv_heads
    picks = indices.reshape(batch, kv_heads, lists, capacity)
    # Region and head in one number; unused slots sort to the end.
    head = jnp.arange(lists, dtype=jnp.int32)[:, None]
    unused = jnp.int32(regions * lists)
    keys = jnp.where((picks >= 0) & (picks < regions), picks * lists + head, unused)
    keys = jnp.sort(keys.reshape(batch, kv_heads, lists * capacity), axis=-1)

    before = jnp.concatenate([jnp.full((batch, kv_heads, 1), -1, jnp.int32), keys[..., :-1]], axis=-1)
    used = keys < unused
    region = keys // lists
    starts = used & (region != jnp.where(before < 0, -1, before // lists))
    bit = jnp.int32((1 << group) - 1) if lists == 1 else jnp.int32(1) << (keys % lists)
    bits = jnp.where(used & (keys != before), bit, 0)
    # A region's entries are now adjacent: the increase of the running sum over them gives its heads.
    total = jnp.cumsum(bits, axis=-1, dtype=jnp.int32)

    width = min(lists * capacity, regions)
    places = jnp.arange(lists * capacity, dtype=jnp.int32)
    at = jnp.sort(jnp.where(starts, places, lists * capacity), axis=-1)[..., :width]
    count = jnp.sum(starts, axis=-1, dtype=jnp.int32)
    filled = at < lists * capacity
    at = jnp.minimum(at, lists * capacity - 1)
    below = jnp.where(filled, jnp.take_along_axis(total - bits, at, axis=-1), total[..., -1:])
    above = jnp.concatenate([below[..., 1:], total[..., -1:]], axis=-1)
    listed = jnp.where(filled, jnp.take_along_axis(region, at, axis=-1), -1)
    return Union(listed, above - below, count)


def _mentions(picks: jax.Array, regions: int) -> tuple[jax.Array, jax.Array]:
    """First slot that names each region, int32 [B, K, N, R + 1], J if none; and each slot's index into it."""
    # All unused slots map to the extra index R.
    place = jnp.where(picks >= 0, picks, regions)
    slots = jnp.arange(picks.shape[-1], dtype=jnp.int32)
    nobody = jnp.full((regions + 1,), picks.shape[-1], jnp.int32)
    one = jax.vmap(jax.vmap(jax.vmap(lambda place: nobody.at[place].min(slots))))
    return one(place), place


def mentioned(picks: jax.Array, regions: int) -> jax.Array:
    """bool [B, K, N, R]: whether any slot names the region."""
    return _mentions(picks, regions)[0][..., :regions] < picks.shape[-1]


def first_mention(picks: jax.Array, regions: int) -> jax.Array:
    """bool [B, K, N, J]: whether the slot names a region that no earlier slot names."""
    first, place = _mentions(picks, regions)
    slots = jnp.arange(picks.shape[-1], dtype=jnp.int32)
    return (jnp.take_along_axis(first, place, axis=-1) == slots) & (picks >= 0)
