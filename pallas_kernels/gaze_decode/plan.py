"""Which regions lists of slots name, and which slots name one first."""

import jax
import jax.numpy as jnp


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
