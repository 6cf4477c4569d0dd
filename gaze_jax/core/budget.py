"""The budget of a query, top_k: how many regions it selects, as a count or a fraction of what it sees.

Axis letters as in :mod:`gaze_jax.core.streams`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Int32

from gaze_jax.core.types import AnyArray, Array

ALL_REGIONS = jnp.iinfo(jnp.int32).max
"""A budget larger than the number of regions of any sequence."""

PerQuery = Int[Array, ""] | Int[Array, " #T"] | Int[Array, "#B #T"] | int
"""One integer per query: broadcastable to [B, T]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keep:
    """A budget as a fraction of the regions visible to a query, instead of a count.

    Images of 16 regions and videos of 555 can share one setting, and the budget grows with the number of
    visible regions.

    Attributes:
      fraction: float32; 1 keeps every region. It broadcasts as a count would.
      most: int32 of the same shape, the most regions in any case. With a fraction of 1 it is a count, so that
        one program serves both kinds of budget.
    """

    fraction: Float[AnyArray, "..."] | float
    most: Int[AnyArray, "..."] | int = ALL_REGIONS


def count(top_k: PerQuery | Keep, visible: Int[Array, "B T"]) -> PerQuery:
    """A budget as a count, int32 broadcastable to [B, T], of ``visible`` regions, int32 [B, T]."""
    if not isinstance(top_k, Keep):
        return top_k
    return jnp.minimum(budget_from_keep(top_k.fraction, visible), top_k.most)


def budget_from_keep(
    keep: Float[Array, ""] | Float[Array, " #T"] | Float[Array, "#B #T"] | float,
    visible: Int[Array, "B T"],
) -> Int32[Array, "B T"]:
    """Turn a fraction of the visible regions into a count.

    Args:
      keep: float, broadcastable to [B, T]; 1 keeps everything.
      visible: int32 [B, T], number of regions that a query may select.

    Returns:
      int32 [B, T]: round(keep * visible regions), but at least 1.
    """
    wanted = jnp.round(jnp.asarray(keep, jnp.float32) * visible.astype(jnp.float32)).astype(jnp.int32)
    return jnp.maximum(wanted, 1)
