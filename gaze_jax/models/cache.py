"""The KV cache of a decoder, to which regions and text-stream tokens are appended.

Nothing is evicted. The cache is stacked over layers; every layer gets all of it and its own index.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Int32

from gaze_jax.core import regions
from gaze_jax.core.streams import EMPTY, Streams
from gaze_jax.core.types import Array, ArrayTree, NamedArrays
from gaze_jax.models import context
from gaze_jax.models.attention import Past
from gaze_jax.models.config import GazeConfig
from pallas_kernels import GazeSpec
from pallas_kernels.gaze_decode import api


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of one batch of sequences, one sequence per row.

    Attributes:
      visual: packed by the decode implementation from [L, B, K, R, P, D] keys and values.
      descriptors: [L, B, K, R, E], E as in :func:`gaze_jax.core.regions.descriptor_width`.
      text_k, text_v: [L, B, K, S, D]; S includes free slots for later tokens.
      visual_order: int32 [B, R, P], -1 in empty slots.
      text_order: int32 [B, S], -1 in free slots.
    """

    visual: ArrayTree
    descriptors: Float[Array, "L B K R E"]
    text_k: Float[Array, "L B K S D"]
    text_v: Float[Array, "L B K S D"]
    visual_order: Int32[Array, "B R P"]
    text_order: Int32[Array, "B S"]

    @property
    def first(self) -> Int32[Array, "B R"]:
        """int32 [B, R], order of each region's first token."""
        return regions.region_span(self.visual_order)[0]

    @property
    def last(self) -> Int32[Array, "B R"]:
        """int32 [B, R], order of each region's last token."""
        return regions.region_span(self.visual_order)[1]


def decode_spec(gaze: GazeConfig, head_dim: int) -> GazeSpec:
    """The static settings of a model's decode op."""
    return GazeSpec(
        scale=head_dim**-0.5,
        select_per=gaze.select_per,
        query_block=gaze.query_block,
        visual_dtype=gaze.visual_dtype,
        interpret=gaze.interpret,
    )


def packed_layer(layer: NamedArrays, gaze: GazeConfig) -> dict[str, ArrayTree]:
    """The part of a layer's prefill output that the cache keeps, packed now if it is offloaded to the host.

    Packing all layers at once would need all of them in device memory.
    """
    if gaze.decode_implementation != "offload":
        return layer
    kept = {name: a for name, a in layer.items() if name not in ("visual_k", "visual_v")}
    spec = decode_spec(gaze, layer["visual_k"].shape[-1])
    k, v = (layer[name][None] for name in ("visual_k", "visual_v"))
    return kept | {"visual": api.pack(k, v, spec=spec, implementation=gaze.decode_implementation)}


def build_cache(
    layers: dict[str, ArrayTree], streams: Streams, gaze: GazeConfig, *, free_slots: int
) -> Cache:
    """Make a cache from the output of prefill.

    Args:
      layers: "visual_k", "visual_v" [L, B, K, R, P, D], or the stacked result of :func:`packed_layer`;
        "text_k", "text_v" [L, B, K, S, D] and "descriptors" [L, B, K, R, E].
      streams: the prefilled batch, one sample per row (not packed).
      gaze: the model's gaze settings.
      free_slots: text-stream slots to add for tokens that will be decoded, rounded up to the
        implementation's tiles of S.
    """
    spec = decode_spec(gaze, layers["text_k"].shape[-1])
    if "visual" in layers:
        # The scan stacked one-layer caches: merge the two layer axes.
        visual = jax.tree.map(lambda a: a.reshape(a.shape[0], *a.shape[2:]), layers["visual"])
    else:
        visual = api.pack(
            layers["visual_k"], layers["visual_v"], spec=spec, implementation=gaze.decode_implementation
        )
    cache = Cache(
        visual=visual,
        descriptors=layers["descriptors"],
        text_k=layers["text_k"],
        text_v=layers["text_v"],
        visual_order=jnp.where(streams.visual_valid, streams.visual_order, EMPTY),
        text_order=jnp.where(streams.text_segment >= 0, streams.text_order, EMPTY),
    )
    return with_free_slots(cache, gaze, free_slots)


def with_free_slots(cache: Cache, gaze: GazeConfig, free_slots: int) -> Cache:
    """The cache with ``free_slots`` more text-stream slots, rounded up to the implementation's tiles of S."""
    multiple = api.text_multiple(gaze.decode_implementation) * context.ranks()
    free_slots += -(cache.text_order.shape[1] + free_slots) % multiple
    return dataclasses.replace(
        cache,
        text_k=context.pad(cache.text_k, 3, free_slots),
        text_v=context.pad(cache.text_v, 3, free_slots),
        text_order=context.pad(cache.text_order, 1, free_slots, EMPTY),
    )


def with_regions(cache: Cache, gaze: GazeConfig, head_dim: int, *, regions: int, slots: int) -> Cache:
    """The cache with ``regions`` more free regions, each of at least ``slots`` token slots."""
    spec = decode_spec(gaze, head_dim)
    wider = max(slots - cache.visual_order.shape[2], 0)
    reserve = functools.partial(
        api.reserve,
        regions=regions // context.ranks(),
        slots=cache.visual_order.shape[2] + wider,
        spec=spec,
        implementation=gaze.decode_implementation,
    )
    axes = api.cache_axes(cache.visual)
    visual_order = jnp.pad(cache.visual_order, ((0, 0), (0, 0), (0, wider)), constant_values=EMPTY)
    return dataclasses.replace(
        cache,
        visual=reserve(cache.visual)
        if context.ranks() == 1
        else context.on_ranks(reserve, (cache.visual,), (axes,), context.spec(axes)),
        descriptors=context.pad(cache.descriptors, 3, regions),
        visual_order=context.pad(visual_order, 1, regions, EMPTY),
    )


def append(
    cache: Cache,
    layers: dict[str, ArrayTree],
    streams: Streams,
    gaze: GazeConfig,
    *,
    region: Int[Array, ""],
    write_index: Int[Array, ""],
) -> Cache:
    """Write later tokens into the free regions and slots of a cache.

    Args:
      cache: the cache. The caller must make sure that the tokens fit; otherwise they overwrite others.
      layers, streams: as in :func:`build_cache`.
      gaze: the model's gaze settings.
      region, write_index: int32 scalars, the first free region and text-stream slot, the same in every row.
        Ranks that share sequences must have free as many as the tokens, and one more.
    """
    visual_order = jnp.where(streams.visual_valid, streams.visual_order, EMPTY)
    slots = cache.visual_order.shape[2] - visual_order.shape[2]
    visual_order = jnp.pad(visual_order, ((0, 0), (0, 0), (0, slots)), constant_values=EMPTY)
    text_order = jnp.where(streams.text_segment >= 0, streams.text_order, EMPTY)
    kept = {name: layers[name] for name in ("visual_k", "visual_v", "descriptors", "text_k", "text_v")}
    write = functools.partial(_append, gaze=gaze)
    arguments = (cache, kept, visual_order, text_order, region, write_index)
    if context.ranks() == 1:
        return write(*arguments)
    axes, keys = cache_axes(cache), ("layers", "batch", "kv_heads", "regions")
    leaves, tree = jax.tree_util.tree_flatten_with_path(cache)
    found = context.on_ranks(
        lambda *parts: jax.tree.leaves(write(*parts)),
        arguments,
        (axes, keys, axes["visual_order"], axes["text_order"], (), ()),
        [context.spec_at(axes, path, leaf) for path, leaf in leaves],
    )
    return jax.tree.unflatten(tree, found)


def _append(
    cache: Cache,
    layers: dict[str, ArrayTree],
    visual_order: Int32[Array, "B R P"],
    text_order: Int32[Array, "B S"],
    region: Int[Array, ""],
    write_index: Int[Array, ""],
    *,
    gaze: GazeConfig,
) -> Cache:
    spec = decode_spec(gaze, cache.text_k.shape[-1])
    zero = jnp.zeros((), jnp.int32)
    if context.ranks() > 1:
        region, write_index = (context.first_across(number) for number in (region, write_index))

    def write(
        stack: Float[Array, "L B K space D"], new: Float[Array, "L B K N D"], start: Int[Array, ""]
    ) -> Float[Array, "L B K space D"]:
        """Write along the second-last axis of [L, B, K, N, D]."""
        at = (zero, zero, zero, start, zero)
        return jax.lax.dynamic_update_slice(stack, new.astype(stack.dtype), at)

    extended = cache
    if visual_order.shape[1]:
        extended = dataclasses.replace(
            extended,
            visual=api.append(
                cache.visual,
                layers["visual_k"],
                layers["visual_v"],
                region,
                spec=spec,
                implementation=gaze.decode_implementation,
            ),
            descriptors=write(cache.descriptors, layers["descriptors"], region),
            visual_order=jax.lax.dynamic_update_slice(cache.visual_order, visual_order, (zero, region, zero)),
        )
    return dataclasses.replace(
        extended,
        text_k=write(cache.text_k, layers["text_k"], write_index),
        text_v=write(cache.text_v, layers["text_v"], write_index),
        text_order=jax.lax.dynamic_update_slice(cache.text_order, text_order, (zero, write_index)),
    )


def _layer(
    cache: Cache, layer: Int[Array, ""], gaze: GazeConfig, head_dim: int
) -> tuple[Float[Array, "B K R P D"], Float[Array, "B K R P D"]]:
    """Visual keys and values [B, K, R, P, D] of a layer."""
    one = api.one_layer(cache.visual, layer)
    k, v = api.unpack(one, spec=decode_spec(gaze, head_dim), implementation=gaze.decode_implementation)
    return k[0], v[0]


def layer_keys(
    cache: Cache, layer: Int[Array, ""], gaze: GazeConfig, head_dim: int
) -> tuple[Float[Array, "B K R P D"], Float[Array, "B K S D"]]:
    """All keys of a layer: visual [B, K, R, P, D] and text stream [B, K, S, D]."""
    visual, _ = _layer(cache, layer, gaze, head_dim)
    return visual, jax.lax.dynamic_index_in_dim(cache.text_k, layer, keepdims=False)


def past_of(cache: Cache, layer: Int[Array, ""], gaze: GazeConfig, head_dim: int) -> Past:
    """One layer of the cache, unpacked, for the tokens that follow it."""

    def take(a: Float[Array, " L *rest"]) -> Float[Array, "*rest"]:
        return jax.lax.dynamic_index_in_dim(a, layer, keepdims=False)

    return Past(
        *_layer(cache, layer, gaze, head_dim),
        take(cache.text_k),
        take(cache.text_v),
        take(cache.descriptors),
    )


def constrained(cache: Cache) -> Cache:
    """The cache, sharded by its logical axes; unchanged without a mesh."""

    def split(tree: ArrayTree, names: context.Names) -> ArrayTree:
        return jax.tree.map(
            lambda a: nn.with_logical_constraint(a, (*names, *(None,) * (a.ndim - len(names)))), tree
        )

    return by_axes(cache, split)


def by_axes(cache: Cache, split: Callable[[ArrayTree, context.Names], ArrayTree]) -> Cache:
    """``split`` of each part of a cache, with the logical axes of its leading dimensions."""
    return Cache(**{name: split(getattr(cache, name), axes) for name, axes in cache_axes(cache).items()})


def cache_axes(cache: Cache) -> dict[str, context.Names]:
    """The logical axes of the leading dimensions of each part of a cache; those of ``visual``'s arrays."""
    stack = ("layers", "batch", "kv_heads")
    return {
        "visual": api.cache_axes(cache.visual),
        "descriptors": (*stack, "regions"),
        "text_k": (*stack, "tokens"),
        "text_v": (*stack, "tokens"),
        "visual_order": ("batch", "regions"),
        "text_order": ("batch", "tokens"),
    }
