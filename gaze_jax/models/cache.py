"""The KV cache of a decoder: visual regions stay, dense tokens are appended.

Nothing is evicted. The cache is stacked over layers and handed whole to every layer with its index.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gaze_jax.core import regions
from gaze_jax.core.streams import EMPTY, Streams
from gaze_jax.models.config import GazeConfig
from pallas_kernels import GazeSpec
from pallas_kernels.gaze_decode import api

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of one batch of sequences, one sequence per row.

    Attributes:
      visual: packed by the decode implementation from [L, B, K, R, P, D] keys and values.
      descriptors: [L, B, K, R, E], E as in :func:`gaze_jax.core.regions.descriptor_width`.
      dense_k, dense_v: [L, B, K, S, D]; S leaves room for the tokens to come.
      visual_order: int32 [B, R, P], -1 in empty slots.
      dense_order: int32 [B, S], -1 where no token is yet.
    """

    visual: Any
    descriptors: Array
    dense_k: Array
    dense_v: Array
    visual_order: Array
    dense_order: Array

    @property
    def first(self) -> Array:
        """int32 [B, R], order of each region's first token."""
        return regions.region_span(self.visual_order)[0]

    @property
    def last(self) -> Array:
        """int32 [B, R], order of each region's last token."""
        return regions.region_span(self.visual_order)[1]


def decode_spec(gaze: GazeConfig, head_dim: int) -> GazeSpec:
    """The static choices of a model's decode op."""
    return GazeSpec(scale=head_dim**-0.5, share=gaze.share, query_block=gaze.query_block)


def build_cache(layers: dict[str, Array], streams: Streams, gaze: GazeConfig, *, room: int) -> Cache:
    """Make a cache of what prefill computed.

    Args:
      layers: "visual_k", "visual_v" [L, B, K, R, P, D], "dense_k", "dense_v" [L, B, K, S, D] and
        "descriptors" [L, B, K, R, E].
      streams: the prefilled batch; not packed (one sample per row).
      gaze: of the model.
      room: dense slots to add for tokens that will be decoded; a few more come with them where the
        implementation wants S in whole tiles.
    """
    spec = decode_spec(gaze, layers["dense_k"].shape[-1])
    cache = Cache(
        visual=api.pack(
            layers["visual_k"], layers["visual_v"], spec=spec, implementation=gaze.decode_implementation
        ),
        descriptors=layers["descriptors"],
        dense_k=layers["dense_k"],
        dense_v=layers["dense_v"],
        visual_order=jnp.where(streams.visual_valid, streams.visual_order, EMPTY),
        dense_order=jnp.where(streams.dense_segment >= 0, streams.dense_order, EMPTY),
    )
    return with_room(cache, gaze, room)


def with_room(cache: Cache, gaze: GazeConfig, room: int) -> Cache:
    """The cache with ``room`` more dense slots, and a few more where the implementation wants S in tiles."""
    room += -(cache.dense_order.shape[1] + room) % api.dense_multiple(gaze.decode_implementation)
    pad = ((0, 0),) * 3 + ((0, room), (0, 0))
    return dataclasses.replace(
        cache,
        dense_k=jnp.pad(cache.dense_k, pad),
        dense_v=jnp.pad(cache.dense_v, pad),
        dense_order=jnp.pad(cache.dense_order, ((0, 0), (0, room)), constant_values=EMPTY),
    )
