"""The Top-K of regions whose scores are in several places: a few candidates of each are compared.

The order is that of :mod:`gaze_jax.core.routing`: highest score first, ties to the region whose first token
comes first. Axis letters as there; N candidates per selector.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float32, Int, Int32

from gaze_jax.core.budget import ALL_REGIONS, PerQuery
from gaze_jax.core.routing import UNSEEN, select_indices, sortable
from gaze_jax.core.types import Array


class Candidates(NamedTuple):
    """Regions that may be among the best.

    Attributes:
      key: int32 [B, Hs, N], higher for a higher score; :data:`gaze_jax.core.routing.UNSEEN` where there is no
        region.
      first: int32 [B, Hs, N], order of the region's first token.
      region: int32 [B, Hs, N], its number.
    """

    key: Int32[Array, "B Hs N"]
    first: Int32[Array, "B Hs N"]
    region: Int32[Array, "B Hs N"]


def candidates(
    scores: Float32[Array, "B 1 Hs R"],
    seen: Bool[Array, "#B 1 #Hs R"],
    capacity: int,
    permutation: Int[Array, "B R"],
    first: Int[Array, "B R"],
    start: Int[Array, ""] | int,
) -> Candidates:
    """The best regions of one place, at most ``capacity`` per selector.

    Args:
      scores, seen: of this place's regions; see :func:`gaze_jax.core.routing.select_indices`.
      capacity: J, static.
      permutation: int32 [B, R] from :func:`gaze_jax.core.routing.tie_permutation`.
      first: int32 [B, R], order of each region's first token.
      start: int32 scalar, the number of this place's first region.
    """
    width = min(capacity, scores.shape[-1])
    indices = select_indices(scores, seen, ALL_REGIONS, width, permutation)[:, 0]
    at = jnp.maximum(indices, 0)
    keys = jnp.take_along_axis(sortable(jax.lax.stop_gradient(scores), seen)[:, 0], at, axis=-1)
    firsts = jnp.take_along_axis(jnp.broadcast_to(first[:, None], scores[:, 0].shape), at, axis=-1)
    return Candidates(jnp.where(indices >= 0, keys, UNSEEN), firsts, at + start)


def best(found: Candidates, budget: PerQuery, capacity: int) -> Int32[Array, "B Hs {capacity}"]:
    """The regions that :func:`gaze_jax.core.routing.select_indices` would select from all scores.

    Args:
      found: candidates of all places; of each place at least ``capacity``, or all that it has.
      budget: int32, broadcastable to [B, 1].
      capacity: J, static.

    Returns:
      int32 [B, Hs, J] numbers of regions, best first; -1 in the slots beyond the budget or the visible count.
    """
    # ~x is the order of -x without its overflow.
    keys, _, regions = jax.lax.sort((~found.key, found.first, found.region), dimension=-1, num_keys=2)
    width = min(capacity, regions.shape[-1])
    limit = jnp.broadcast_to(budget, (regions.shape[0], 1))[:, :, None]
    kept = (keys[..., :width] < ~jnp.int32(UNSEEN)) & (jnp.arange(width, dtype=jnp.int32) < limit)
    chosen = jnp.where(kept, regions[..., :width], -1)
    return jnp.pad(chosen, ((0, 0), (0, 0), (0, capacity - width)), constant_values=-1)
