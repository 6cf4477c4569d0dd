"""Gaze attention of one layer while decoding, one token per row.

Pure functions without parameters; ``attention.py`` is the counterpart for all tokens of a batch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int, Int32

from gaze_jax.core import routing
from gaze_jax.core.accounting import mask_from_indices
from gaze_jax.core.budget import count
from gaze_jax.core.candidates import candidates
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.types import Array, ArrayTree, NamedArrays
from gaze_jax.models import context
from gaze_jax.models.attention import RoutedQueries, first_head, region_scores
from gaze_jax.models.cache import Cache, cache_axes, decode_spec, layer_keys
from gaze_jax.models.config import GazeConfig
from gaze_jax.models.ops import gaze_decode, route_and_decode
from pallas_kernels.gaze_decode import api
from pallas_kernels.gaze_decode.api import gaze_decode_with_lse
from pallas_kernels.softmax import WithLse


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodePosition:
    """Order and cache slot of the token being decoded.

    Attributes:
      order: int32 [B] index in the spliced sequence.
      write_index: int32 scalar, the text-stream slot to write to, the same in every row.
      sample: int32 [B] sample ids, for random routing.
    """

    order: Int32[Array, " B"]
    write_index: Int32[Array, ""]
    sample: Int32[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeMasks:
    """What the tokens of a decoding step may see; the same in every layer.

    Attributes:
      visual: bool [B, R, P] visual keys; a routed query attends to those of its selected regions.
      text: bool [B, S] text-stream keys.
      routed: the queries, T = 1. A region may be selected if all its tokens are earlier.
      step: what the op makes of them once for all layers, see :func:`pallas_kernels.gaze_decode.api.masks`;
        None: it makes the same in every layer.
    """

    visual: Bool[Array, "B R P"]
    text: Bool[Array, "B S"]
    routed: RoutedQueries
    step: ArrayTree | None = None


def decode_masks(cache: Cache, position: DecodePosition) -> DecodeMasks:
    """The masks of a decoding step; ``cache.text_order`` must already include its tokens."""
    order = position.order[:, None]
    first, last = cache.first, cache.last
    visible = ((last >= 0) & (last <= order))[:, None, :]
    # On a mesh every rank sorts its own regions.
    by_rank = first.reshape(first.shape[0] * context.ranks(), -1)
    return DecodeMasks(
        visual=(cache.visual_order >= 0) & (cache.visual_order <= order[:, :, None]),
        text=(cache.text_order >= 0) & (cache.text_order <= order),
        routed=RoutedQueries(
            visible=visible,
            count=jnp.sum(visible, axis=-1, dtype=jnp.int32),
            order=order,
            sample=position.sample[:, None],
            first=first,
            permutation=routing.tie_permutation(by_rank).reshape(first.shape),
        ),
    )


def with_step(masks: DecodeMasks, cache: Cache, gaze: GazeConfig) -> DecodeMasks:
    """The masks with what the decode op makes of them, to be called once before the layers."""
    if context.ranks() > 1:
        return masks  # a rank's part is made where its masks are
    routed = masks.routed
    step = api.masks(
        cache.visual,
        *(masks.visual, masks.text, routed.visible[:, 0], routed.permutation),
        spec=decode_spec(gaze, cache.text_k.shape[-1]),
        implementation=gaze.decode_implementation,
    )
    return dataclasses.replace(masks, step=step)


def append_token(
    cache: Cache,
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K D"],
    layer: Int[Array, ""],
    write_index: Int[Array, ""],
) -> Cache:
    """Write one token's key and value [B, 1, K, D] in place."""
    zero = jnp.zeros((), jnp.int32)

    def write(
        stack: Float[Array, "L B K S D"],
        new: Float[Array, "B 1 K D"],
        layer: Int[Array, ""],
        at_slot: Int[Array, ""],
        mine: Bool[Array, "1"] | None,
    ) -> Float[Array, "L B K S D"]:
        new = jnp.moveaxis(new, 1, 2)[None].astype(stack.dtype)
        at = (layer, zero, zero, at_slot, zero)
        if mine is not None:
            new = jnp.where(mine, new, jax.lax.dynamic_slice(stack, at, new.shape))
        return jax.lax.dynamic_update_slice(stack, new, at)

    if context.ranks() == 1:
        stacks = [write(*pair, layer, write_index, None) for pair in ((cache.text_k, k), (cache.text_v, v))]
    else:
        rank, at_slot = write_index % context.ranks(), write_index // context.ranks()
        mine = jnp.arange(context.ranks(), dtype=jnp.int32) == rank
        names = ("layers", "batch", "kv_heads", "tokens")
        axes = (names, ("batch", None, "kv_heads"), (), (), ("tokens",))
        stacks = [
            context.on_ranks(write, (*pair, layer, at_slot, mine), axes, context.spec(names))
            for pair in ((cache.text_k, k), (cache.text_v, v))
        ]
    return dataclasses.replace(cache, text_k=stacks[0], text_v=stacks[1])


def decode_attention(
    q: Float[Array, "B 1 H D"],
    cache: Cache,
    masks: DecodeMasks,
    selection: Selection,
    spec: SelectionSpec,
    *,
    gaze: GazeConfig,
    layer: Int[Array, ""],
) -> tuple[Float[Array, "B 1 H D"], NamedArrays]:
    """Select regions and attend to them.

    Args:
      q: [B, 1, H, D] post-RoPE.
      cache: the cache of all layers, which already contains this token.
      masks: masks of the step.
      selection: this layer's selection, without the axis L; ``budget`` is broadcastable to [B, 1].
      spec: static settings.
      gaze: the model's gaze settings.
      layer: int32 scalar, index of the layer.

    Returns:
      [B, 1, H, D], and a dict: with a budget "indices" int32 [B, Hs, J] and "scores" float32 [B, Hs, R];
      with ``spec.return_trace`` also "selected" bool [B, Hs, R] (with a budget), "attention" and "dense",
      both float32 [B, H, R], see :func:`gaze_jax.core.routing.attention_shares`. If sequences are split over
      ranks, with a budget also "rank_regions" and "rank_passes" int32 [B, ranks], see
      :func:`gaze_jax.models.context.work_across`.
    """
    call = functools.partial(_decode, spec=spec, gaze=gaze)
    if context.ranks() == 1:
        return call(q, cache, masks, selection, layer)
    context.check(spec.routing, gaze.decode_implementation, context.ranks())
    heads, by_rank = ("batch", "heads"), ("batch", "regions")
    found: dict[str, context.Names] = {}
    if selection.budget is not None:
        found = {"indices": heads, "scores": (*heads, "regions")}
        found |= {"rank_regions": by_rank, "rank_passes": by_rank}
        found |= {"selected": heads} if spec.return_trace else {}
    if spec.return_trace:
        found |= {"attention": heads, "dense": heads}
    rows = ("batch", None, "heads")
    return context.on_ranks(
        call,
        (q, cache, masks, selection, layer),
        (rows, cache_axes(cache), MASK_AXES, SELECTION_AXES, ()),
        (context.spec(rows), {name: context.spec(names) for name, names in found.items()}),
    )


MASK_AXES: context.Axes = {
    "visual": ("batch", "regions"),
    "text": ("batch", "tokens"),
    "routed": {
        "visible": ("batch", None, "regions"),
        **dict.fromkeys(("count", "order", "sample"), ("batch",)),
        **dict.fromkeys(("first", "permutation"), ("batch", "regions")),
    },
}
"""Logical axes of a step's masks, where sequences are split."""

SELECTION_AXES: context.Axes = {
    "budget": ("batch",),
    "bias": ("batch", "regions"),
    "forced": ("batch", None, "heads"),
    "full_layers": (),
}
"""The same for a layer's selection."""


def _decode(
    q: Float[Array, "B 1 H D"],
    cache: Cache,
    masks: DecodeMasks,
    selection: Selection,
    layer: Int[Array, ""],
    *,
    spec: SelectionSpec,
    gaze: GazeConfig,
) -> tuple[Float[Array, "B 1 H D"], NamedArrays]:
    """:func:`decode_attention`; if sequences are split, of one rank's part of the cache."""
    dim, num_regions = q.shape[3], cache.visual_order.shape[1]
    op = decode_spec(gaze, dim)
    indices, out, heads = None, {}, None
    if _in_one_call(selection, spec, gaze) and num_regions > 0:
        heads, indices, scores = _route_and_attend(q, cache, masks, selection, spec, gaze=gaze, layer=layer)
        out = {"indices": indices, "scores": scores}
    elif selection.budget is not None and num_regions > 0:
        indices, scores = _select(q, cache, masks, selection, spec, gaze=gaze, layer=layer)
        out = {"indices": indices, "scores": scores}
        if context.ranks() > 1:
            out |= context.work_across(indices, masks.routed.visible, selection.full_layers)

    def attend(indices: Int32[Array, "B Hs J"] | None) -> Float[Array, "B H D"]:
        stored = (cache.visual, cache.text_k, cache.text_v, layer)
        name = gaze.decode_implementation
        if context.ranks() == 1:
            seen = (masks.visual, masks.text, masks.step)
            return gaze_decode(q[:, 0], *stored, indices, *seen, spec=op, implementation=name)

        def here(listed: Int32[Array, "B Hs A"] | None, with_text: bool) -> WithLse:
            seen = (masks.visual, masks.text if with_text else jnp.zeros_like(masks.text))
            return gaze_decode_with_lse(q[:, 0], *stored, listed, *seen, spec=op, implementation=name)

        if indices is None:
            return context.join_across(here(None, True))
        return context.join_across(context.attend_in_passes(here, indices, num_regions))

    if heads is None and (indices is None or selection.full_layers is None):
        heads = attend(indices)
    elif heads is None:
        heads = jax.lax.cond(selection.full_layers, lambda: attend(None), lambda: attend(indices))
    if spec.return_trace and num_regions > 0:
        visible = masks.routed.visible
        keys = layer_keys(cache, layer, gaze, dim)
        masses = routing.log_masses(q[:, 0], *keys, masks.visual, masks.text, scale=op.scale)
        if context.ranks() > 1:
            visible, masses = context.gathered_across(visible, 2), context.masses_across(*masses)
        selected = None
        if indices is not None:
            selected = mask_from_indices(indices, visible.shape[2])
            if selection.full_layers is not None:
                selected |= selection.full_layers & visible
            out["selected"] = selected
        out["attention"], out["dense"] = routing.attention_shares(*masses, selected)
    return heads[:, None], out


def _in_one_call(selection: Selection, spec: SelectionSpec, gaze: GazeConfig) -> bool:
    """Whether the op selects too: by descriptors alone, where the implementation can."""
    plain = selection.bias is None and selection.full_layers is None and spec.routing.strategy == "descriptor"
    here = selection.budget is not None and context.ranks() == 1
    return plain and here and api.routes(gaze.decode_implementation)


def _route_and_attend(
    q: Float[Array, "B 1 H D"],
    cache: Cache,
    masks: DecodeMasks,
    selection: Selection,
    spec: SelectionSpec,
    *,
    gaze: GazeConfig,
    layer: Int[Array, ""],
) -> tuple[Float[Array, "B H D"], Int32[Array, "B Hs J"], Float32[Array, "B Hs R"]]:
    """Attention to the regions that it selects, these, best first, and all scores."""
    routed, num_regions = masks.routed, cache.visual_order.shape[1]
    assert selection.budget is not None, "dense attention selects nothing"
    budget = jnp.broadcast_to(count(selection.budget, routed.count), routed.count.shape)[:, 0]
    found = route_and_decode(
        q[:, 0],
        *(cache.visual, cache.text_k, cache.text_v, layer, masks.visual, masks.text),
        *(routing.query_features(q[:, 0], gaze.descriptor), cache.descriptors, budget),
        *(routed.visible[:, 0], routed.permutation, masks.step),
        capacity=num_regions if spec.capacity is None else spec.capacity,
        spec=decode_spec(gaze, q.shape[3]),
        implementation=gaze.decode_implementation,
    )
    return found.out, found.indices, found.scores


def _select(
    q: Float[Array, "B 1 H D"],
    cache: Cache,
    masks: DecodeMasks,
    selection: Selection,
    spec: SelectionSpec,
    *,
    gaze: GazeConfig,
    layer: Int[Array, ""],
) -> tuple[Int32[Array, "B Hs J"], Float32[Array, "B Hs R"]]:
    """The selected regions int32 [B, Hs, J], best first, and all scores float32 [B, Hs, R].

    If sequences are split, the regions are those of all ranks, by their number in the whole cache, and the
    scores those of this rank.
    """
    dim = q.shape[3]

    def oracle() -> Float32[Array, "B 1 Hs R"]:
        return routing.oracle_scores(
            q,
            *layer_keys(cache, layer, gaze, dim),
            masks.visual[:, None],
            masks.text[:, None],
            scale=dim**-0.5,
            select_per=gaze.select_per,
            query_block=1,
        )

    routed = masks.routed
    assert selection.budget is not None, "dense attention selects nothing"
    budget = count(selection.budget, routed.count)
    descriptors = jax.lax.dynamic_index_in_dim(cache.descriptors, layer, keepdims=False)
    num_regions = descriptors.shape[2]

    def described(features: Float[Array, "B 1 H E"]) -> Float32[Array, "B 1 Hs R"]:
        return routing.descriptor_scores(features, descriptors, select_per=gaze.select_per)

    start: Array | int = 0 if context.ranks() == 1 else context.start_across(num_regions)
    if selection.forced is not None and context.ranks() > 1:
        # Of another rank's regions none is listed here.
        local = selection.forced - start
        mine = (local >= 0) & (local < num_regions)
        selection = dataclasses.replace(selection, forced=jnp.where(mine, local, -1))
    scores, seen = region_scores(
        q,
        descriptors.shape[1],
        routed,
        selection,
        gaze=gaze,
        strategy=spec.routing,
        layer=layer,
        described=described,
        oracle=oracle,
        first_head=first_head(q, descriptors.shape[1], gaze.select_per),
    )
    capacity = num_regions * context.ranks() if spec.capacity is None else spec.capacity
    if context.ranks() == 1:
        indices = routing.select_indices(scores, seen, budget, capacity, routed.permutation)[:, 0]
    else:
        found = candidates(scores, seen, capacity, routed.permutation, routed.first, start)
        indices = context.best_across(found, budget, capacity)
    return indices, scores[:, 0]
