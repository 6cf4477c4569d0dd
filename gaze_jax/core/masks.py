"""Who sees what: the mask table, as intervals of ``order``.

Every mask also requires the same segment; "earlier" is by ``order`` and includes the token itself.

| query                        | dense keys             | visual keys                                     |
|------------------------------|------------------------|-------------------------------------------------|
| text, newline outside a unit | all earlier            | Top-K of the regions that ended earlier         |
| visual, newline in its unit  | all earlier            | scope "all": all earlier; "unit": own unit's;   |
|                              |                        | not causal: also the own unit's later ones      |
| context                      | its unit's newlines,   | all of its unit                                 |
|                              | context up to itself   |                                                 |
| padding                      | none: output 0         | none                                            |

A unit is contiguous in ``order`` and its context tokens follow it directly, so each cell of the table
is one interval. A picture of one row, ``t`` text, ``v`` visual (two regions), ``c`` context; scope
"all", causal, ``#`` seen, ``R`` seen if its region is selected::

            t v v v v c c t
        t   #
        v   # #
        v   # # #
        v   # # # #
        v   # # # # #
        c     # # # # #
        c     # # # # # #
        t   # R R R R # # #
"""

import jax
import jax.numpy as jnp

from gaze_jax.core.streams import EMPTY, Kind, Streams
from pallas_kernels.spec import KeyPlaces, Windows

Array = jax.Array


def key_places(streams: Streams) -> KeyPlaces:
    """Where every key stands, with empty slots and padding at order -1."""
    return KeyPlaces(
        visual_order=jnp.where(streams.visual_valid, streams.visual_order, EMPTY),
        region_segment=streams.region_segment,
        dense_order=jnp.where(streams.kind == Kind.PAD, EMPTY, streams.dense_order),
        dense_segment=streams.dense_segment,
    )


def unit_spans(streams: Streams) -> tuple[Array, Array]:
    """First and last order of each unit's visual tokens.

    Returns:
      Two int32 [B, R * P], indexed by unit id (a row cannot have more units than visual slots); an
      absent unit spans nothing (first > last).
    """
    batch = streams.visual_unit.shape[0]
    unit = streams.visual_unit.reshape(batch, -1)
    order = streams.visual_order.reshape(batch, -1)
    slots = unit.shape[1]
    bucket = jnp.where(streams.visual_valid.reshape(batch, -1), unit, slots)

    def spans(order: Array, bucket: Array) -> tuple[Array, Array]:
        first = jax.ops.segment_min(order, bucket, num_segments=slots + 1)
        last = jax.ops.segment_max(order, bucket, num_segments=slots + 1)
        return first[:slots], last[:slots]

    return jax.vmap(spans)(order, bucket)


def _lookup(spans: Array, unit: Array) -> Array:
    return jnp.take_along_axis(spans, jnp.maximum(unit, 0), axis=1)


def windows(streams: Streams, *, visual_scope: str, visual_causal: bool) -> tuple[Windows, Windows]:
    """Turn the table above into intervals for both streams' queries.

    Args:
      streams: the batch.
      visual_scope: "all" or "unit".
      visual_causal: False lets visual tokens also see later ones of their own unit.

    Returns:
      Windows of the visual queries [B, R * P] and of the dense queries [B, S].
    """
    batch = streams.tokens.shape[0]
    first, last = unit_spans(streams)

    def inside_unit(order: Array, unit: Array) -> tuple[Array, Array]:
        """Visual interval of a visual token, or of a newline inside its unit."""
        start = _lookup(first, unit) if visual_scope == "unit" else jnp.zeros_like(order)
        end = order if visual_causal else jnp.maximum(order, _lookup(last, unit))
        return start, end

    order = streams.visual_order.reshape(batch, -1)
    unit = streams.visual_unit.reshape(batch, -1)
    valid = streams.visual_valid.reshape(batch, -1)
    slots_per_region = streams.visual_order.shape[2]
    segment = jnp.repeat(streams.region_segment, slots_per_region, axis=1)
    lo, hi = inside_unit(order, unit)
    visual = Windows(
        segment=jnp.where(valid, segment, EMPTY),
        visual_lo=lo,
        visual_hi=hi,
        dense_lo=jnp.zeros_like(order),
        dense_hi=order,
        routed=jnp.zeros_like(valid),
    )

    order, unit = streams.dense_order, streams.dense_unit
    is_context = streams.kind == Kind.CONTEXT
    in_unit = (streams.kind == Kind.NEWLINE) & (unit >= 0)
    start, end = _lookup(first, unit), _lookup(last, unit)
    lo, hi = inside_unit(order, unit)
    dense = Windows(
        segment=jnp.where(streams.kind == Kind.PAD, EMPTY, streams.dense_segment),
        visual_lo=jnp.where(is_context, start, jnp.where(in_unit, lo, 0)),
        visual_hi=jnp.where(is_context, end, jnp.where(in_unit, hi, order)),
        # Between its unit's first token and itself a context token finds only the unit's newlines
        # and the unit's earlier context tokens: exactly the table's cell.
        dense_lo=jnp.where(is_context, start, 0),
        dense_hi=order,
        routed=~(is_context | in_unit | (streams.kind == Kind.PAD)),
    )
    return visual, dense


def visible_keys(queries: Windows, places: KeyPlaces) -> tuple[Array, Array]:
    """The keys that queries see under dense attention: bool [B, T, R, P] and [B, T, S].

    Args:
      queries: [B, T].
      places: the keys.
    """

    def inside(order: Array, segment: Array, lo: Array, hi: Array) -> Array:
        """[B, T, N] for keys [B, N]."""
        same = (queries.segment[:, :, None] == segment[:, None]) & (queries.segment[:, :, None] >= 0)
        order = order[:, None]
        return same & (order >= jnp.maximum(lo, 0)[:, :, None]) & (order <= hi[:, :, None])

    batch, regions, slots = places.visual_order.shape
    visual = inside(
        places.visual_order.reshape(batch, -1),
        jnp.repeat(places.region_segment, slots, axis=1),
        queries.visual_lo,
        queries.visual_hi,
    )
    dense = inside(places.dense_order, places.dense_segment, queries.dense_lo, queries.dense_hi)
    return visual.reshape(batch, -1, regions, slots), dense


def visible_regions(queries: Windows, places: KeyPlaces, first: Array, last: Array) -> Array:
    """Regions that a routed query may choose from.

    Args:
      queries: [B, T].
      places: the keys.
      first, last: int32 [B, R] from :func:`gaze_jax.core.regions.region_span`.

    Returns:
      bool [B, T, R]: same segment, not empty, and the last valid token is within the window.
    """
    same = queries.segment[:, :, None] == places.region_segment[:, None, :]
    inside = (first[:, None, :] >= queries.visual_lo[:, :, None]) & (
        last[:, None, :] <= queries.visual_hi[:, :, None]
    )
    alive = (queries.segment >= 0)[:, :, None] & (last >= 0)[:, None, :]
    return same & inside & alive
