"""Gaze attention of one layer: pool, score, select, attend. Pure functions; no parameters.

Queries, keys and values of both streams travel as one array [B, N, heads, D] with N = R * P + S, the
visual tokens first.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gaze_jax.core import masks, regions, routing
from gaze_jax.core.routing import Routing
from gaze_jax.core.streams import Streams
from gaze_jax.models.config import GazeConfig
from gaze_jax.models.ops import gaze_prefill
from pallas_kernels import GazeSpec, KeyPlaces, Windows

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What all layers share about a batch; computed once per forward pass.

    Attributes:
      visual, dense: windows of the visual [B, R * P] and the dense [B, S] queries.
      places: where the keys stand.
      valid: bool [B, R, P] slots that hold a token.
      visible: bool [B, S, R] regions a dense query may choose from; False for unrouted queries.
      first: int32 [B, R] order of each region's first token.
      permutation: int32 [B, R] regions by first token, for ties.
      sample: int32 [B, S] or [B, 1], names the sample for random routing.
    """

    visual: Windows
    dense: Windows
    places: KeyPlaces
    valid: Array
    visible: Array
    first: Array
    permutation: Array
    sample: Array


def make_plan(streams: Streams, gaze: GazeConfig, sample: Array | None = None) -> Plan:
    """Derive the plan of a batch; ``sample`` is int32 [B] or [B, S] (default 0), of random routing."""
    visual, dense = masks.windows(streams, visual_scope=gaze.visual_scope, visual_causal=gaze.visual_causal)
    places = masks.key_places(streams)
    first, last = regions.region_span(places.visual_order)
    visible = masks.visible_regions(dense, places, first, last) & dense.routed[:, :, None]
    batch = streams.tokens.shape[0]
    return Plan(
        visual=visual,
        dense=dense,
        places=places,
        valid=streams.visual_valid,
        visible=visible,
        first=first,
        permutation=routing.tie_permutation(first),
        sample=jnp.zeros((batch, 1), jnp.int32) if sample is None else sample.reshape(batch, -1),
    )


def region_scores(
    q: Array,
    descriptors: Array,
    visible: Array,
    *,
    gaze: GazeConfig,
    route: Routing,
    sample: Array,
    order: Array,
    first: Array,
    layer: Array,
    forced: Array | None,
    oracle: Callable[[], Array],
) -> tuple[Array, Array]:
    """Scores of every region and whether it may be chosen, for any strategy.

    Args:
      q: [B, T, H, D].
      descriptors: [B, K, R, E].
      visible: bool [B, T, R].
      gaze: of the model.
      route: the strategy.
      sample: int32 broadcastable to [B, T].
      order: int32 [B, T].
      first: int32 [B, R].
      layer: int32 scalar.
      forced: int32 [B, T, Hs, J] for strategy "forced", broadcastable in T and Hs; else None.
      oracle: makes the scores of strategy "oracle", which needs every key; see
        :func:`gaze_jax.core.routing.oracle_scores`.

    Returns:
      float32 [B, T, Hs, R] and bool, broadcastable to it.

    Raises:
      ValueError: ``forced`` is given without strategy "forced", or the reverse.
    """
    if (forced is not None) != (route.strategy == "forced"):
        raise ValueError("forced regions and Routing(strategy='forced') go together: give both or neither.")
    batch, queries = order.shape
    heads = q.shape[2] if gaze.share == "head" else descriptors.shape[1]
    seen = visible[:, :, None, :]
    if route.strategy == "random":
        return routing.random_scores(route.seed, sample, order, layer, heads, first), seen
    if route.strategy == "oracle":
        return oracle(), seen
    if forced is not None:
        forced = jnp.broadcast_to(forced, (batch, queries, heads, forced.shape[-1]))
        scores, listed = routing.forced_scores(forced, descriptors.shape[2])
        return scores, seen & listed
    features = routing.query_features(q, gaze.descriptor)
    return routing.descriptor_scores(features, descriptors, share=gaze.share), seen


def gaze_attention(
    q: Array,
    k: Array,
    v: Array,
    plan: Plan,
    *,
    gaze: GazeConfig,
    route: Routing,
    layer: Array,
    top_k: Array | None,
    forced: Array | None,
    collect: bool,
) -> tuple[Array, dict[str, Any]]:
    """Attention of all tokens of a batch, training or prefill.

    Args:
      q: [B, N, H, D] post-RoPE.
      k, v: [B, N, K, D], keys post-RoPE.
      plan: of the batch.
      gaze: of the model.
      route: the strategy.
      layer: int32 scalar.
      top_k: int32 broadcastable to [B, S]; None is dense attention.
      forced: see :func:`region_scores`.
      collect: also return what the routing saw.

    Returns:
      [B, N, H, D], and a dict with the regional "visual_k", "visual_v" [B, K, R, P, D], "dense_k",
      "dense_v" [B, K, S, D] and "descriptors" [B, K, R, E]; with ``collect`` and routing also "scores"
      float32 and "selected" bool [B, S, Hs, R].
    """
    batch, _, _, dim = q.shape
    num_regions, slots = plan.valid.shape[1:]
    tokens = num_regions * slots

    def split(a: Array) -> tuple[Array, Array]:
        a = jnp.moveaxis(a, 2, 1)
        return a[:, :, :tokens].reshape(batch, a.shape[1], num_regions, slots, dim), a[:, :, tokens:]

    (visual_k, dense_k), (visual_v, dense_v) = split(k), split(v)
    out: dict[str, Any] = {
        "visual_k": visual_k,
        "visual_v": visual_v,
        "dense_k": dense_k,
        "dense_v": dense_v,
        "descriptors": regions.describe(visual_k, plan.valid, gaze.descriptor),
    }
    spec = GazeSpec(scale=dim**-0.5, share=gaze.share, query_block=gaze.query_block)

    def attend(q: Array, queries: Windows, selected: Array | None) -> Array:
        return gaze_prefill(
            q,
            visual_k,
            visual_v,
            dense_k,
            dense_v,
            queries,
            plan.places,
            selected,
            spec=spec,
            implementation=gaze.prefill_implementation,
        )

    if top_k is None or tokens == 0:
        everyone = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), plan.visual, plan.dense)
        return attend(q, everyone, None), out

    def oracle() -> Array:
        return routing.oracle_scores(
            q[:, tokens:],
            visual_k,
            dense_k,
            *masks.visible_keys(plan.dense, plan.places),
            scale=spec.scale,
            share=gaze.share,
            query_block=gaze.query_block,
        )

    scores, seen = region_scores(
        q[:, tokens:],
        out["descriptors"],
        plan.visible,
        gaze=gaze,
        route=route,
        sample=plan.sample,
        order=plan.places.dense_order,
        first=plan.first,
        layer=layer,
        forced=forced,
        oracle=oracle,
    )
    selected = routing.select_mask(scores, seen, top_k, plan.permutation)
    if collect:
        out |= {"scores": jax.lax.stop_gradient(scores), "selected": selected}
    visual_out = attend(q[:, :tokens], plan.visual, None)
    dense_out = attend(q[:, tokens:], plan.dense, selected)
    return jnp.concatenate([visual_out, dense_out], axis=1), out
