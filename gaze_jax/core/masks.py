"""Who sees what: the mask table, as intervals of ``order``.

Every mask also requires the same segment; "earlier" is by ``order`` and includes the token itself.

| query                        | text-stream keys       | visual keys                                     |
|------------------------------|------------------------|-------------------------------------------------|
| text, newline outside a view | all earlier            | Top-K of the regions that ended earlier         |
| visual, newline in its view  | all earlier            | scope "all": all earlier; "view": own view's;   |
|                              |                        | not causal: also its own view's later tokens    |
| context                      | its view's newlines,   | all of its view                                 |
|                              | context up to itself   |                                                 |
| padding                      | none: output 0         | none                                            |

A view is contiguous in ``order`` and its context tokens follow it directly, so each cell of the table
is one interval. The mask of one sequence, with scope "all" and causal visual tokens: rows are queries,
columns are keys; ``t`` text, ``v`` visual (two regions), ``c`` context; ``#`` seen, ``R`` seen if its
region is selected::

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
from jaxtyping import Bool, Int, Int32

from gaze_jax.core.streams import EMPTY, Kind, Streams
from gaze_jax.core.types import AnyArray, Array
from pallas_kernels.spec import KeyPlaces, Windows


def key_places(streams: Streams) -> KeyPlaces:
    """Order and segment of every key; empty slots and padding get order -1."""
    return KeyPlaces(
        visual_order=jnp.where(streams.visual_valid, streams.visual_order, EMPTY),
        region_segment=streams.region_segment,
        text_order=jnp.where(streams.kind == Kind.PAD, EMPTY, streams.text_order),
        text_segment=streams.text_segment,
    )


def view_spans(streams: Streams) -> tuple[Int32[Array, "B views"], Int32[Array, "B views"]]:
    """First and last order of each view's visual tokens.

    Returns:
      Two int32 [B, R * P], indexed by view id (a row cannot have more views than visual slots). An absent
      view has an empty span (first > last).
    """
    batch = streams.visual_view.shape[0]
    view = streams.visual_view.reshape(batch, -1)
    order = streams.visual_order.reshape(batch, -1)
    slots = view.shape[1]
    bucket = jnp.where(streams.visual_valid.reshape(batch, -1), view, slots)

    def spans(order: Array, bucket: Array) -> tuple[Array, Array]:
        first = jax.ops.segment_min(order, bucket, num_segments=slots + 1)
        last = jax.ops.segment_max(order, bucket, num_segments=slots + 1)
        return first[:slots], last[:slots]

    return jax.vmap(spans)(order, bucket)


def _lookup(spans: Int32[Array, "B views"], view: Int[AnyArray, "B N"]) -> Int32[Array, "B N"]:
    return jnp.take_along_axis(spans, jnp.maximum(view, 0), axis=1)


def windows(streams: Streams, *, visual_scope: str, visual_causal: bool) -> tuple[Windows, Windows]:
    """Turn the mask table into intervals for the queries of both streams.

    Args:
      streams: the batch.
      visual_scope: "all" or "view".
      visual_causal: False lets visual tokens also see later ones of their own view.

    Returns:
      Windows of the visual queries [B, R * P] and of the text-stream queries [B, S].
    """
    batch = streams.tokens.shape[0]
    first, last = view_spans(streams)

    def inside_view(order: Array, view: Array) -> tuple[Array, Array]:
        """Visual interval of a visual token, or of a newline inside its view."""
        start = _lookup(first, view) if visual_scope == "view" else jnp.zeros_like(order)
        end = order if visual_causal else jnp.maximum(order, _lookup(last, view))
        return start, end

    order = streams.visual_order.reshape(batch, -1)
    view = streams.visual_view.reshape(batch, -1)
    valid = streams.visual_valid.reshape(batch, -1)
    slots_per_region = streams.visual_order.shape[2]
    segment = jnp.repeat(streams.region_segment, slots_per_region, axis=1)
    lo, hi = inside_view(order, view)
    visual = Windows(
        segment=jnp.where(valid, segment, EMPTY),
        visual_lo=lo,
        visual_hi=hi,
        text_lo=jnp.zeros_like(order),
        text_hi=order,
        routed=jnp.zeros_like(valid),
    )

    order, view = streams.text_order, streams.text_view
    is_context = streams.kind == Kind.CONTEXT
    in_view = (streams.kind == Kind.NEWLINE) & (view >= 0)
    start, end = _lookup(first, view), _lookup(last, view)
    lo, hi = inside_view(order, view)
    text = Windows(
        segment=jnp.where(streams.kind == Kind.PAD, EMPTY, streams.text_segment),
        visual_lo=jnp.where(is_context, start, jnp.where(in_view, lo, 0)),
        visual_hi=jnp.where(is_context, end, jnp.where(in_view, hi, order)),
        # The only text-stream keys between a view's first token and one of its context tokens are the
        # view's newlines and its earlier context tokens, as the table demands.
        text_lo=jnp.where(is_context, start, 0),
        text_hi=order,
        routed=~(is_context | in_view | (streams.kind == Kind.PAD)),
    )
    return visual, text


def visible_keys(queries: Windows, places: KeyPlaces) -> tuple[Bool[Array, "B T R P"], Bool[Array, "B T S"]]:
    """The keys that queries see under dense attention: bool [B, T, R, P] and [B, T, S].

    Args:
      queries: windows of the queries, [B, T].
      places: order and segment of the keys.
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
    text = inside(places.text_order, places.text_segment, queries.text_lo, queries.text_hi)
    return visual.reshape(batch, -1, regions, slots), text


def visible_regions(
    queries: Windows, places: KeyPlaces, first: Int[Array, "B R"], last: Int[Array, "B R"]
) -> Bool[Array, "B T R"]:
    """Regions that a routed query may select.

    Args:
      queries: windows of the queries, [B, T].
      places: order and segment of the keys.
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
