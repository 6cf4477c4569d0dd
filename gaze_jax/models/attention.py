"""Gaze attention of one layer over all tokens of a batch: pool, score, select, attend.

Pure functions without parameters. Queries, keys and values of both streams are in one array [B, N, heads, D]
with N = R * P + S, visual tokens first. ``decode.py`` is the counterpart for one token.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int, Int32

from gaze_jax.core import masks, regions, routing
from gaze_jax.core.budget import count
from gaze_jax.core.routing import Routing
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.streams import EMPTY, Streams
from gaze_jax.core.types import AnyArray, Array, NamedArrays
from gaze_jax.models import context
from gaze_jax.models.config import GazeConfig
from gaze_jax.models.ops import gaze_prefill
from pallas_kernels import GazeSpec, KeyPlaces, Windows
from pallas_kernels.gaze_prefill.api import gaze_prefill_with_lse
from pallas_kernels.softmax import WithLse


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutedQueries:
    """The queries that select regions, and the regions they may select; the same in every layer.

    Attributes:
      visible: bool [B, T, R] regions that a query may select, cached regions first; False for queries that
        are not routed.
      count: int32 [B, T] how many regions those are.
      order: int32 [B, T] order of the queries.
      sample: int32 [B, T] or [B, 1] sample id, for random routing.
      first: int32 [B, R] order of each region's first token.
      permutation: int32 [B, R] regions sorted by first token, to break ties.
    """

    visible: Bool[Array, "B T R"]
    count: Int32[Array, "B T"]
    order: Int32[AnyArray, "B T"]
    sample: Int32[AnyArray, " B #T"]
    first: Int32[Array, "B R"]
    permutation: Int32[Array, "B R"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """Masks and orders of a batch that all layers share; computed once per forward pass.

    Attributes:
      visual, text: windows of the visual [B, R * P] and the text-stream [B, S] queries.
      places: order and segment of the keys, cached keys first.
      valid: bool [B, R, P] slots of the batch that hold a token.
      tokens: int32 [B, every] tokens of each region, cached regions first and those of all devices.
      routed: the text-stream queries [B, S] that select regions.
    """

    visual: Windows
    text: Windows
    places: KeyPlaces
    valid: Bool[Array, "B R P"]
    tokens: Int32[Array, "B every"]
    routed: RoutedQueries


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past:
    """One layer of the cache of earlier tokens.

    Attributes:
      visual_k, visual_v: [B, K, R, P, D].
      text_k, text_v: [B, K, S, D].
      descriptors: [B, K, R, E].
    """

    visual_k: Float[Array, "B K R P D"]
    visual_v: Float[Array, "B K R P D"]
    text_k: Float[Array, "B K S D"]
    text_v: Float[Array, "B K S D"]
    descriptors: Float[Array, "B K R E"]


def make_metadata(
    streams: Streams,
    gaze: GazeConfig,
    sample: Int[AnyArray, " B"] | Int[AnyArray, "B S"] | None = None,
    past: tuple[Int[Array, "B R P"], Int[Array, "B past"]] | None = None,
) -> AttentionMetadata:
    """Derive the metadata of a batch.

    Args:
      streams: the batch.
      gaze: the model's gaze settings.
      sample: int32 [B] or [B, S] sample ids for random routing; 0 by default.
      past: order of the cached tokens, int32 [B, R, P] and [B, S], -1 in empty slots. The batch then has one
        sample per row, which continues the row of the cache.
    """
    visual, text = masks.windows(streams, visual_scope=gaze.visual_scope, visual_causal=gaze.visual_causal)
    places = masks.key_places(streams)
    order = places.text_order
    if past is not None:

        def after(before: Int[Array, "B ..."], now: Int[AnyArray, "B ..."]) -> Int[Array, "B ..."]:
            return context.concatenate(before, now, 1)

        def segment(order: Int[Array, "B N"]) -> Int32[Array, "B N"]:
            return jnp.where(order >= 0, 0, EMPTY).astype(jnp.int32)

        places = KeyPlaces(
            visual_order=after(past[0], places.visual_order),
            region_segment=after(segment(jnp.max(past[0], axis=2)), places.region_segment),
            text_order=after(past[1], order),
            text_segment=after(segment(past[1]), places.text_segment),
        )
    # Every query is compared with every region, wherever on a mesh the region is.
    first, last, tokens = (
        nn.with_logical_constraint(a, ("batch", None))
        for a in (
            *regions.region_span(places.visual_order),
            jnp.sum(places.visual_order >= 0, axis=-1, dtype=jnp.int32),
        )
    )
    visible = masks.visible_regions(text, places, first, last) & text.routed[:, :, None]
    visible = nn.with_logical_constraint(visible, ("batch", "tokens", None))
    batch = streams.tokens.shape[0]
    return AttentionMetadata(
        visual=visual,
        text=text,
        places=places,
        valid=streams.visual_valid,
        tokens=tokens,
        routed=RoutedQueries(
            visible=visible,
            count=jnp.sum(visible, axis=-1, dtype=jnp.int32),
            order=order,
            sample=jnp.zeros((batch, 1), jnp.int32) if sample is None else sample.reshape(batch, -1),
            first=first,
            permutation=routing.tie_permutation(first),
        ),
    )


def region_scores(
    q: Float[Array, "B T H D"],
    kv_heads: int,
    routed: RoutedQueries,
    selection: Selection,
    *,
    gaze: GazeConfig,
    strategy: Routing,
    layer: Int[Array, ""],
    described: Callable[[Float[Array, "B T H E"]], Float32[Array, "B T Hs R"]],
    oracle: Callable[[], Float32[Array, "B T Hs R"]],
    first_head: Int[Array, ""] | int = 0,
) -> tuple[Float32[Array, "B T Hs R"], Bool[Array, "#B #T #Hs R"]]:
    """Scores of every region and whether it may be selected, for any strategy.

    Args:
      q: [B, T, H, D].
      kv_heads: K.
      routed: the T queries.
      selection: this layer's selection, without the axis L: ``forced`` int32 [B, T, Hs, J], broadcastable in
        T and Hs; ``bias`` float32 [B, R].
      gaze: the model's gaze settings.
      strategy: where scores come from.
      layer: int32 scalar.
      described: computes scores from descriptors; takes :func:`gaze_jax.core.routing.query_features`.
      oracle: computes the scores of strategy "oracle", which needs every key; see
        :func:`gaze_jax.core.routing.oracle_scores`.
      first_head: the number of the first selector, where a device has a part of them.

    Returns:
      float32 [B, T, Hs, R] and bool, broadcastable to it.
    """
    batch, queries = routed.order.shape
    heads = q.shape[2] if gaze.select_per == "head" else kv_heads
    seen = routed.visible[:, :, None, :]
    if strategy.strategy == "random":
        who = (routed.sample, routed.order, layer, heads, routed.first, first_head)
        return routing.random_scores(strategy.seed, *who), seen
    if strategy.strategy == "oracle":
        return oracle(), seen
    if selection.forced is not None:
        forced = jnp.broadcast_to(selection.forced, (batch, queries, heads, selection.forced.shape[-1]))
        scores, listed = routing.forced_scores(forced, routed.visible.shape[2])
        return scores, seen & listed
    scores = described(routing.query_features(q, gaze.descriptor))
    if selection.bias is None:
        return scores, seen
    return routing.steer(scores, seen, selection.bias, heads=q.shape[2], dim=q.shape[3])


def first_head(q: Float[Array, "B T H D"], kv_heads: int, select_per: str) -> Int[Array, ""] | int:
    """The number of the first selector of queries [B, T, H, D]; not 0 where a device has a part of them."""
    heads = q.shape[2] if select_per == "head" else kv_heads
    return 0 if context.ranks() == 1 else context.first_head_across(heads)


def split_streams(
    a: Float[Array, "B N K D"], regions: int, slots: int
) -> tuple[Float[Array, "B K {regions} {slots} D"], Float[Array, "B K S D"]]:
    """[B, N, K, D] of both streams to [B, K, R, P, D] and [B, K, S, D]."""
    tokens = regions * slots
    a = jnp.moveaxis(a, 2, 1)
    return a[:, :, :tokens].reshape(*a.shape[:2], regions, slots, a.shape[3]), a[:, :, tokens:]


def _after_past(past: Past | None, new: Past) -> Past:
    """Keys, values and descriptors of a cache followed by those of the batch."""
    if past is None:
        return new
    # A cache may store another dtype (int8) than the model computes in.
    dtype = new.visual_k.dtype
    return Past(
        visual_k=jnp.concatenate([past.visual_k.astype(dtype), new.visual_k], axis=2),
        visual_v=jnp.concatenate([past.visual_v.astype(dtype), new.visual_v], axis=2),
        text_k=jnp.concatenate([past.text_k, new.text_k], axis=2),
        text_v=jnp.concatenate([past.text_v, new.text_v], axis=2),
        descriptors=jnp.concatenate([past.descriptors, new.descriptors], axis=2),
    )


def gaze_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N K D"],
    v: Float[Array, "B N K D"],
    metadata: AttentionMetadata,
    selection: Selection,
    spec: SelectionSpec,
    *,
    gaze: GazeConfig,
    layer: Int[Array, ""],
    past: Past | None = None,
) -> tuple[Float[Array, "B N H D"], NamedArrays]:
    """Attention of all tokens of a batch, in training or prefill.

    Args:
      q: [B, N, H, D] post-RoPE.
      k, v: [B, N, K, D], keys post-RoPE.
      metadata: attention metadata of the batch.
      selection: this layer's selection, without the axis L; ``budget`` is broadcastable to [B, S].
      spec: static settings; ``capacity`` is not used here.
      gaze: the model's gaze settings.
      layer: int32 scalar, index of the layer.
      past: keys and values of earlier tokens; ``metadata`` includes their order.

    Returns:
      [B, N, H, D], and a dict with "visual_k", "visual_v" [B, K, R, P, D], "text_k", "text_v" [B, K, S, D]
      and "descriptors" [B, K, R, E] of these tokens; with ``spec.return_trace`` and a budget also "scores"
      float32 and "selected" bool [B, S, Hs, R], where R has the cached regions first; with
      ``spec.return_entries`` and a budget also "entries", float32 [B, S]: visual keys that a query attends
      to, mean over heads.
    """
    call = functools.partial(_attention, spec=spec, gaze=gaze)
    if context.ranks() == 1:
        return call(q, k, v, metadata, selection, layer, past)
    context.check(spec.routing, None, context.ranks())
    rows, keys = (*_TOKENS, "heads"), ("batch", "kv_heads", "regions")
    found: dict[str, context.Names] = {field.name: keys for field in dataclasses.fields(Past)}
    if selection.budget is not None:
        found |= {"scores": rows, "selected": rows} if spec.return_trace else {}
        found |= {"entries": _TOKENS} if spec.return_entries else {}
    return context.on_ranks(
        call,
        (q, k, v, metadata, selection, layer, past),
        (rows, rows, rows, METADATA_AXES, SELECTION_AXES, (), keys),
        (context.spec(rows), {name: context.spec(names) for name, names in found.items()}),
    )


_TOKENS, _REGIONS = ("batch", "tokens"), ("batch", "regions")
METADATA_AXES: context.Axes = {
    "visual": _TOKENS,
    "text": _TOKENS,
    "places": {
        "visual_order": _REGIONS,
        "region_segment": _REGIONS,
        "text_order": _TOKENS,
        "text_segment": _TOKENS,
    },
    "valid": _REGIONS,
    "tokens": ("batch",),
    "routed": {
        **dict.fromkeys(("visible", "count", "order", "sample"), _TOKENS),
        **dict.fromkeys(("first", "permutation"), ("batch",)),
    },
}
"""Logical axes of a batch's metadata, where sequences are split."""

SELECTION_AXES: context.Axes = {
    "budget": _TOKENS,
    "bias": ("batch",),
    "forced": (*_TOKENS, "heads"),
    "full_layers": (),
}
"""The same for a layer's selection."""


def _attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N K D"],
    v: Float[Array, "B N K D"],
    metadata: AttentionMetadata,
    selection: Selection,
    layer: Int[Array, ""],
    past: Past | None,
    *,
    spec: SelectionSpec,
    gaze: GazeConfig,
) -> tuple[Float[Array, "B N H D"], NamedArrays]:
    """:func:`gaze_attention`; if sequences are split, of one rank's tokens."""
    num_regions, slots = metadata.valid.shape[1:]
    tokens = num_regions * slots
    (visual_k, text_k), (visual_v, text_v) = (split_streams(a, num_regions, slots) for a in (k, v))
    descriptors = regions.describe(visual_k, metadata.valid, gaze.descriptor)
    new = Past(visual_k, visual_v, text_k, text_v, descriptors)
    out: NamedArrays = {field.name: getattr(new, field.name) for field in dataclasses.fields(new)}
    keys = _after_past(past, new)
    op = GazeSpec(
        scale=q.shape[3] ** -0.5,
        select_per=gaze.select_per,
        query_block=gaze.query_block,
        local=gaze.visual_scope == "view",
        interpret=gaze.interpret,
    )

    def attend(
        q: Float[Array, "B T H D"], queries: Windows, selected: Bool[Array, "B T Hs R"] | None
    ) -> Float[Array, "B T H D"]:
        stored = (keys.visual_k, keys.visual_v, keys.text_k, keys.text_v)
        name = gaze.prefill_implementation
        if context.ranks() == 1:
            return gaze_prefill(q, *stored, queries, metadata.places, selected, spec=op, implementation=name)

        def here(q: Array, queries: Windows, selected: Array | None) -> WithLse:
            asked = (queries, metadata.places, selected)
            return gaze_prefill_with_lse(q, *stored, *asked, spec=op, implementation=name)

        return context.attend_across(here, q, queries, selected, most=gaze.query_block)

    if selection.budget is None or keys.descriptors.shape[2] == 0:
        queries = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), metadata.visual, metadata.text)
        return attend(q, queries, None), out
    scores, selected = _select(
        q[:, tokens:], keys, metadata, selection, spec.routing, op, gaze=gaze, layer=layer
    )
    if spec.return_trace:
        out |= {"scores": jax.lax.stop_gradient(scores), "selected": selected}
    if spec.return_entries:
        out["entries"] = _entries(selected, metadata.tokens)
    text_out = attend(q[:, tokens:], metadata.text, selected)
    if tokens == 0:
        return text_out, out
    visual_out = attend(q[:, :tokens], metadata.visual, None)
    return jnp.concatenate([visual_out, text_out], axis=1), out


def _entries(selected: Bool[Array, "B S Hs R"], tokens: Int32[Array, "B R"]) -> Float32[Array, "B S"]:
    heads = jnp.sum(selected, axis=2, dtype=jnp.int32).astype(jnp.float32) / selected.shape[2]
    entries = jnp.einsum("BSR,BR->BS", heads, tokens.astype(jnp.float32))
    return entries if context.ranks() == 1 else context.mean_over_heads_across(entries)


def _select(
    q: Float[Array, "B S H D"],
    keys: Past,
    metadata: AttentionMetadata,
    selection: Selection,
    strategy: Routing,
    op: GazeSpec,
    *,
    gaze: GazeConfig,
    layer: Int[Array, ""],
) -> tuple[Float32[Array, "B S Hs R"], Bool[Array, "B S Hs R"]]:
    """Float32 scores and bool selection, [B, S, Hs, R] each, of text-stream queries [B, S, H, D]."""

    def oracle() -> Float32[Array, "B S Hs R"]:
        return routing.oracle_scores(
            q,
            keys.visual_k,
            keys.text_k,
            *masks.visible_keys(metadata.text, metadata.places),
            scale=op.scale,
            select_per=gaze.select_per,
            query_block=gaze.query_block,
        )

    def described(features: Float[Array, "B S H E"]) -> Float32[Array, "B S Hs R"]:
        score = functools.partial(
            routing.descriptor_scores, descriptors=keys.descriptors, select_per=gaze.select_per
        )
        return score(features) if context.ranks() == 1 else context.scores_across(score, features)

    routed = metadata.routed
    assert selection.budget is not None, "dense attention selects nothing"
    scores, seen = region_scores(
        q,
        keys.descriptors.shape[1],
        routed,
        selection,
        gaze=gaze,
        strategy=strategy,
        layer=layer,
        described=described,
        oracle=oracle,
        first_head=first_head(q, keys.descriptors.shape[1], gaze.select_per),
    )
    budget = count(selection.budget, routed.count)
    return scores, routing.select_mask(scores, seen, budget, routed.permutation)
