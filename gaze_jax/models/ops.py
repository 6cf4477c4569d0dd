"""The attention ops, embedding and normalising, on a mesh.

XLA partitions its own operations over the devices of a mesh, but not a Pallas kernel, which is a program for
one device, nor a loop over heads, which is how a CPU decodes. So the ops run under ``jax.shard_map``, each
device on its part of the batch and of the kv heads. They need no communication: rows and kv heads are
independent.
"""

from collections.abc import Callable
from typing import TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int, UInt8

from gaze_jax.core.pixels import LEVELS
from gaze_jax.core.types import AnyArray, Array, ArrayTree
from gaze_jax.parallel import rules
from pallas_kernels import GazeSpec, KeyPlaces, Windows, dispatch
from pallas_kernels.gaze_decode import api as decode_api
from pallas_kernels.gaze_decode.routed import Routed
from pallas_kernels.gaze_prefill import api as prefill_api

Names = tuple[str | None, ...]
Out = TypeVar("Out")


def _split(
    function: Callable[..., Out],
    arguments: tuple[ArrayTree | None, ...],
    names: tuple[Names, ...],
    out: Names,
) -> Out:
    """Call ``function`` on each device's part of the arguments.

    Args:
      function: takes ``arguments``, each an array or a tree of arrays.
      arguments: arguments of ``function``; None stays None.
      names: logical axes of each argument's leading dimensions.
      out: logical axes of the result, or of every array of it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*arguments)
    here = [(a, n) for a, n in zip(arguments, names, strict=True) if a is not None]

    def call(*given: ArrayTree) -> Out:
        rest = iter(given)
        return function(*(None if a is None else next(rest) for a in arguments))

    return jax.shard_map(
        call,
        mesh=mesh,
        in_specs=tuple(nn.logical_to_mesh_axes(n) for _, n in here),
        out_specs=nn.logical_to_mesh_axes(out),
        check_vma=False,
    )(*(a for a, _ in here))


def normalised(images: UInt8[AnyArray, "*shape"]) -> Float32[Array, "*shape"]:
    """:func:`gaze_jax.data.pixels.normalise` on the device, bit-identical.

    On a mesh each device looks up its own rows: XLA may gather the images of all.
    """

    def call(images: UInt8[AnyArray, "*shape"]) -> Float32[Array, "*shape"]:
        return jnp.take(jnp.asarray(LEVELS), images.astype(jnp.int32), axis=0)

    mesh = jax.sharding.get_abstract_mesh()
    _, devices = rules.split_sizes(mesh, "batch")
    if devices == 1 or images.shape[0] % devices:
        return call(images)
    spec = PartitionSpec(rules.RULES["batch"])
    return jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(images)


def embed(
    table: Float[Array, "V M"], tokens: Int[AnyArray, "*lead"], dtype: DTypeLike
) -> Float[Array, "*lead M"]:
    """Rows of a table that is split over V and M, for tokens that are split over B.

    int32 [B, ...] to [B, ..., M]. Each device looks up its part of the rows and columns for the tokens of all
    devices that share the table, and sends them to where they belong. Left to XLA, every device would hold
    the whole table's float32 gradient.
    """
    mesh = jax.sharding.get_abstract_mesh()
    (width_axes, columns), (vocab_axes, rows) = (rules.split_sizes(mesh, name) for name in ("embed", "vocab"))
    _, batches = rules.split_sizes(mesh, "batch")
    vocab, width = table.shape
    if rows * columns == 1 or vocab % rows or width % columns or tokens.shape[0] % batches:
        return jnp.take(table, tokens, axis=0).astype(dtype)

    def call(table: Float[Array, "rows columns"], tokens: Int[Array, "*lead"]) -> Float[Array, "*lead M"]:
        every = jax.lax.all_gather(tokens, width_axes, tiled=True)
        local = every - jax.lax.axis_index(vocab_axes) * table.shape[0]
        here = (local >= 0) & (local < table.shape[0])
        found = jnp.take(table, jnp.where(here, local, 0), axis=0)
        found = jax.lax.psum(jnp.where(here[..., None], found, 0).astype(dtype), vocab_axes)
        return jax.lax.all_to_all(found, width_axes, split_axis=0, concat_axis=found.ndim - 1, tiled=True)

    # Tokens of a decoding step, one per row, are the same on all devices of "context".
    batch = rules.partition_spec(("batch", "tokens")[: tokens.ndim])
    return jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(rules.partition_spec(("vocab", "embed")), batch),
        out_specs=batch,
        check_vma=False,
    )(table, tokens)


def gaze_decode(
    q: Float[Array, "B H D"],
    visual: ArrayTree,
    text_k: Float[Array, "L B K S D"],
    text_v: Float[Array, "L B K S D"],
    layer: Int[Array, ""],
    indices: Int[Array, "B Hs J"] | None,
    visual_seen: Bool[Array, "B R P"],
    text_seen: Bool[Array, "B S"],
    *,
    spec: GazeSpec,
    implementation: str,
) -> Float[Array, "B H D"]:
    """:func:`pallas_kernels.gaze_decode`, sharded by the logical axes "batch" and "kv_heads"."""

    def call(*arguments: ArrayTree) -> Array:
        return decode_api.gaze_decode(*arguments, spec=spec, implementation=implementation)

    arguments = (q, visual, text_k, text_v, layer, indices, visual_seen, text_seen)
    if decode_api.compiler_splits(implementation):
        return call(*arguments)
    text = ("layers", "batch", "kv_heads")
    heads = ("batch", "heads")
    names = (heads, decode_api.cache_axes(visual), text, text, (), heads, ("batch",), ("batch",))
    return _split(call, arguments, names, heads)


def route_and_decode(
    q: Float[Array, "B H D"],
    visual: ArrayTree,
    text_k: Float[Array, "L B K S D"],
    text_v: Float[Array, "L B K S D"],
    layer: Int[Array, ""],
    visual_seen: Bool[Array, "B R P"],
    text_seen: Bool[Array, "B S"],
    features: Float[Array, "B H E"],
    descriptors: Float[Array, "L B K R E"],
    budget: Int[Array, " B"],
    visible: Bool[Array, "B R"],
    order: Int[Array, "B R"],
    *,
    capacity: int,
    spec: GazeSpec,
    implementation: str,
) -> Routed:
    """:func:`pallas_kernels.gaze_decode.api.route_and_decode`, sharded as :func:`gaze_decode`."""

    def call(*arguments: ArrayTree) -> Routed:
        return decode_api.route_and_decode(
            *arguments, capacity=capacity, spec=spec, implementation=implementation
        )

    stored = (visual, text_k, text_v, layer)
    arguments = (q, *stored, visual_seen, text_seen, features, descriptors, budget, visible, order)
    text, heads, rows = ("layers", "batch", "kv_heads"), ("batch", "heads"), ("batch",)
    names = (heads, decode_api.cache_axes(visual), text, text, (), rows, rows, heads, text, rows, rows, rows)
    return _split(call, arguments, names, heads)


def gaze_prefill(
    q: Float[Array, "B T H D"],
    visual_k: Float[Array, "B K R P D"],
    visual_v: Float[Array, "B K R P D"],
    text_k: Float[Array, "B K S D"],
    text_v: Float[Array, "B K S D"],
    queries: Windows,
    places: KeyPlaces,
    selected: Bool[Array, "B T Hs R"] | None,
    *,
    spec: GazeSpec,
    implementation: str,
) -> Float[Array, "B T H D"]:
    """:func:`pallas_kernels.gaze_prefill`, sharded by the logical axes "batch" and "kv_heads"."""

    def call(*arguments: ArrayTree) -> Array:
        return prefill_api.gaze_prefill(*arguments, spec=spec, implementation=implementation)

    arguments = (q, visual_k, visual_v, text_k, text_v, queries, places, selected)
    _, parts = rules.split_sizes(jax.sharding.get_abstract_mesh(), "kv_heads")
    if implementation not in dispatch.KERNELS and parts == 1:
        return call(*arguments)
    keys = ("batch", "kv_heads")
    rows = ("batch", None, "heads")
    names = (rows, keys, keys, keys, keys, ("batch",), ("batch",), rows)
    return _split(call, arguments, names, ("batch", None, "heads"))
