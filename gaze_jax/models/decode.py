"""Gaze attention of one layer while decoding, one token per row.

Pure functions without parameters; ``attention.py`` is the counterpart for all tokens of a batch.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int, Int32

from gaze_jax.core import routing
from gaze_jax.core.accounting import mask_from_indices
from gaze_jax.core.budget import count
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.types import Array, NamedArrays
from gaze_jax.models.attention import RoutedQueries, region_scores
from gaze_jax.models.cache import Cache, decode_spec, layer_keys
from gaze_jax.models.config import GazeConfig
from gaze_jax.models.ops import gaze_decode


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
    """

    visual: Bool[Array, "B R P"]
    text: Bool[Array, "B S"]
    routed: RoutedQueries


def decode_masks(cache: Cache, position: DecodePosition) -> DecodeMasks:
    """The masks of a decoding step; ``cache.text_order`` must already include its tokens."""
    order = position.order[:, None]
    first, last = cache.first, cache.last
    return DecodeMasks(
        visual=(cache.visual_order >= 0) & (cache.visual_order <= order[:, :, None]),
        text=(cache.text_order >= 0) & (cache.text_order <= order),
        routed=RoutedQueries(
            visible=((last >= 0) & (last <= order))[:, None, :],
            order=order,
            sample=position.sample[:, None],
            first=first,
            permutation=routing.tie_permutation(first),
        ),
    )


def append_token(
    cache: Cache,
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K D"],
    layer: Int[Array, ""],
    write_index: Int[Array, ""],
) -> Cache:
    """Write one token's key and value [B, 1, K, D] in place."""

    def write(stack: Float[Array, "L B K S D"], new: Float[Array, "B 1 K D"]) -> Float[Array, "L B K S D"]:
        new = jnp.moveaxis(new, 1, 2)[None].astype(stack.dtype)
        zero = jnp.zeros((), jnp.int32)
        return jax.lax.dynamic_update_slice(stack, new, (layer, zero, zero, write_index, zero))

    return dataclasses.replace(cache, text_k=write(cache.text_k, k), text_v=write(cache.text_v, v))


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
      both float32 [B, H, R], see :func:`gaze_jax.core.routing.attention_shares`.
    """
    dim, num_regions = q.shape[3], cache.visual_order.shape[1]
    op = decode_spec(gaze, dim)
    indices, out = None, {}
    if selection.budget is not None and num_regions > 0:
        indices, scores = _select(q, cache, masks, selection, spec, gaze=gaze, layer=layer)
        out = {"indices": indices, "scores": scores}

    def attend(indices: Int32[Array, "B Hs J"] | None) -> Float[Array, "B H D"]:
        return gaze_decode(
            q[:, 0],
            cache.visual,
            cache.text_k,
            cache.text_v,
            layer,
            indices,
            masks.visual,
            masks.text,
            spec=op,
            implementation=gaze.decode_implementation,
        )

    if indices is None or selection.full_layers is None:
        heads = attend(indices)
    else:
        heads = jax.lax.cond(selection.full_layers, lambda: attend(None), lambda: attend(indices))
    if spec.return_trace and num_regions > 0:
        selected = None
        if indices is not None:
            selected = mask_from_indices(indices, num_regions)
            if selection.full_layers is not None:
                selected |= selection.full_layers & masks.routed.visible
            out["selected"] = selected
        keys = layer_keys(cache, layer, gaze, dim)
        out["attention"], out["dense"] = routing.attention_shares(
            q[:, 0], *keys, masks.visual, masks.text, selected, scale=op.scale
        )
    return heads[:, None], out


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
    """The selected regions int32 [B, Hs, J], best first, and all scores float32 [B, Hs, R]."""
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
    descriptors = jax.lax.dynamic_index_in_dim(cache.descriptors, layer, keepdims=False)
    scores, seen = region_scores(
        q, descriptors, routed, selection, gaze=gaze, strategy=spec.routing, layer=layer, oracle=oracle
    )
    budget = count(selection.budget, routed.visible)
    capacity = descriptors.shape[2] if spec.capacity is None else spec.capacity
    indices = routing.select_indices(scores, seen, budget, capacity, routed.permutation)
    return indices[:, 0], scores[:, 0]
