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
from gaze_jax.core.routing import Keep, Routing
from gaze_jax.core.streams import EMPTY, Streams
from gaze_jax.models.config import GazeConfig
from gaze_jax.models.ops import gaze_prefill
from pallas_kernels import GazeSpec, KeyPlaces, Windows

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """What all layers share about a batch; computed once per forward pass.

    Attributes:
      visual, text: windows of the visual [B, R * P] and the dense [B, S] queries.
      places: where the keys stand, those of a cache first.
      order: int32 [B, S] of the text-stream queries.
      valid: bool [B, R, P] slots of the batch that hold a token.
      visible: bool [B, S, R] regions a text-stream query may choose from, those of a cache first; False for
        unrouted queries.
      first: int32 [B, R] order of each region's first token.
      permutation: int32 [B, R] regions by first token, for ties.
      sample: int32 [B, S] or [B, 1], names the sample for random routing.
    """

    visual: Windows
    text: Windows
    places: KeyPlaces
    order: Array
    valid: Array
    visible: Array
    first: Array
    permutation: Array
    sample: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past:
    """What was read before, as one layer sees it.

    Attributes:
      visual_k, visual_v: [B, K, R, P, D].
      text_k, text_v: [B, K, S, D].
      descriptors: [B, K, R, E].
    """

    visual_k: Array
    visual_v: Array
    text_k: Array
    text_v: Array
    descriptors: Array


def make_metadata(
    streams: Streams,
    gaze: GazeConfig,
    sample: Array | None = None,
    past: tuple[Array, Array] | None = None,
) -> AttentionMetadata:
    """Derive the plan of a batch.

    Args:
      streams: the batch.
      gaze: of the model.
      sample: int32 [B] or [B, S] (default 0), of random routing.
      past: order of what a cache holds, int32 [B, R, P] and [B, S], -1 where nothing is; the batch goes on
        with it, one sample per row.
    """
    visual, text = masks.windows(streams, visual_scope=gaze.visual_scope, visual_causal=gaze.visual_causal)
    places = masks.key_places(streams)
    order = places.text_order
    if past is not None:

        def after(before: Array, now: Array) -> Array:
            return jnp.concatenate([before, now], axis=1)

        def segment(order: Array) -> Array:
            return jnp.where(order >= 0, 0, EMPTY).astype(jnp.int32)

        places = KeyPlaces(
            visual_order=after(past[0], places.visual_order),
            region_segment=after(segment(jnp.max(past[0], axis=2)), places.region_segment),
            text_order=after(past[1], order),
            text_segment=after(segment(past[1]), places.text_segment),
        )
    first, last = regions.region_span(places.visual_order)
    visible = masks.visible_regions(text, places, first, last) & text.routed[:, :, None]
    batch = streams.tokens.shape[0]
    return AttentionMetadata(
        visual=visual,
        text=text,
        places=places,
        order=order,
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
    bias: Array | None,
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
      bias: float32 [B, R] of :func:`gaze_jax.core.routing.steer`, for strategy "descriptor"; or None.
      oracle: makes the scores of strategy "oracle", which needs every key; see
        :func:`gaze_jax.core.routing.oracle_scores`.

    Returns:
      float32 [B, T, Hs, R] and bool, broadcastable to it.

    Raises:
      ValueError: ``forced`` is given without strategy "forced", or the reverse; or ``bias`` with another
        strategy than "descriptor".
    """
    if bias is not None and route.strategy != "descriptor":
        raise ValueError(f"A bias steers scores of descriptors, not Routing(strategy={route.strategy!r}).")
    if (forced is not None) != (route.strategy == "forced"):
        raise ValueError("forced regions and Routing(strategy='forced') go together: give both or neither.")
    batch, queries = order.shape
    heads = q.shape[2] if gaze.select_per == "head" else descriptors.shape[1]
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
    scores = routing.descriptor_scores(features, descriptors, select_per=gaze.select_per)
    if bias is None:
        return scores, seen
    return routing.steer(scores, seen, bias, heads=q.shape[2], dim=q.shape[3])


def gaze_attention(
    q: Array,
    k: Array,
    v: Array,
    metadata: AttentionMetadata,
    *,
    gaze: GazeConfig,
    route: Routing,
    layer: Array,
    top_k: Array | Keep | None,
    forced: Array | None,
    collect: bool,
    bias: Array | None = None,
    past: Past | None = None,
) -> tuple[Array, dict[str, Any]]:
    """Attention of all tokens of a batch, training or prefill.

    Args:
      q: [B, N, H, D] post-RoPE.
      k, v: [B, N, K, D], keys post-RoPE.
      metadata: of the batch.
      gaze: of the model.
      route: the strategy.
      layer: int32 scalar.
      top_k: int32 broadcastable to [B, S], or a fraction; None is dense attention.
      forced, bias: see :func:`region_scores`.
      collect: also return what the routing saw.
      past: keys and values that were read before; ``metadata`` was made with their order.

    Returns:
      [B, N, H, D], and a dict with the regional "visual_k", "visual_v" [B, K, R, P, D], "text_k",
      "text_v" [B, K, S, D] and "descriptors" [B, K, R, E] of these tokens; with ``collect`` and routing
      also "scores" float32 and "selected" bool [B, S, Hs, R], where R has the regions of the past first.
    """
    batch, _, _, dim = q.shape
    num_regions, slots = metadata.valid.shape[1:]
    tokens = num_regions * slots

    def split(a: Array) -> tuple[Array, Array]:
        a = jnp.moveaxis(a, 2, 1)
        return a[:, :, :tokens].reshape(batch, a.shape[1], num_regions, slots, dim), a[:, :, tokens:]

    (visual_k, text_k), (visual_v, text_v) = split(k), split(v)
    out: dict[str, Any] = {
        "visual_k": visual_k,
        "visual_v": visual_v,
        "text_k": text_k,
        "text_v": text_v,
        "descriptors": regions.describe(visual_k, metadata.valid, gaze.descriptor),
    }
    descriptors = out["descriptors"]
    if past is not None:
        # A cache may keep other kinds of numbers than the model computes with (int8).
        kind = visual_k.dtype
        visual_k = jnp.concatenate([past.visual_k.astype(kind), visual_k], axis=2)
        visual_v = jnp.concatenate([past.visual_v.astype(kind), visual_v], axis=2)
        text_k = jnp.concatenate([past.text_k, text_k], axis=2)
        text_v = jnp.concatenate([past.text_v, text_v], axis=2)
        descriptors = jnp.concatenate([past.descriptors, descriptors], axis=2)
    spec = GazeSpec(scale=dim**-0.5, select_per=gaze.select_per, query_block=gaze.query_block)

    def attend(q: Array, queries: Windows, selected: Array | None) -> Array:
        return gaze_prefill(
            q,
            visual_k,
            visual_v,
            text_k,
            text_v,
            queries,
            metadata.places,
            selected,
            spec=spec,
            implementation=gaze.prefill_implementation,
        )

    if top_k is None or descriptors.shape[2] == 0:
        everyone = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), metadata.visual, metadata.text)
        return attend(q, everyone, None), out

    def oracle() -> Array:
        return routing.oracle_scores(
            q[:, tokens:],
            visual_k,
            text_k,
            *masks.visible_keys(metadata.text, metadata.places),
            scale=spec.scale,
            select_per=gaze.select_per,
            query_block=gaze.query_block,
        )

    scores, seen = region_scores(
        q[:, tokens:],
        descriptors,
        metadata.visible,
        gaze=gaze,
        route=route,
        sample=metadata.sample,
        order=metadata.order,
        first=metadata.first,
        layer=layer,
        forced=forced,
        bias=bias,
        oracle=oracle,
    )
    top_k = routing.count(top_k, metadata.visible)
    selected = routing.select_mask(scores, seen, top_k, metadata.permutation)
    if collect:
        out |= {"scores": jax.lax.stop_gradient(scores), "selected": selected}
    text_out = attend(q[:, tokens:], metadata.text, selected)
    if tokens == 0:
        return text_out, out
    visual_out = attend(q[:, :tokens], metadata.visual, None)
    return jnp.concatenate([visual_out, text_out], axis=1), out
