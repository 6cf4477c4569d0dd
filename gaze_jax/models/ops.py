"""The attention ops on a mesh.

XLA splits its own operations over the devices of a mesh, but not a Pallas kernel, which is a program of
one device, nor a loop over heads, which is how a CPU decodes. So these run under ``jax.shard_map``, each
device on its share of the batch and of the heads, which is all that the ops need: no value crosses from
one row or kv head to another.
"""

from typing import Any

import flax.linen as nn
import jax

from pallas_kernels import KeyPlaces, Windows, dispatch
from pallas_kernels.gaze_decode import api as decode_api
from pallas_kernels.gaze_prefill import api as prefill_api

Array = jax.Array


def _split(function: Any, arguments: tuple[Any, ...], names: tuple[Any, ...], out: tuple[Any, ...]) -> Array:
    """Call ``function`` on every device's part.

    Args:
      function: of ``arguments``, each an array or a tree of arrays.
      arguments: what it is called with; None stays None.
      names: logical axes of each argument's leading dimensions.
      out: logical axes of the result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*arguments)
    here = [(a, n) for a, n in zip(arguments, names, strict=True) if a is not None]

    def call(*given: Any) -> Array:
        rest = iter(given)
        return function(*(None if a is None else next(rest) for a in arguments))

    return jax.shard_map(
        call,
        mesh=mesh,
        in_specs=tuple(nn.logical_to_mesh_axes(n) for _, n in here),
        out_specs=nn.logical_to_mesh_axes(out),
        check_vma=False,
    )(*(a for a, _ in here))


def gaze_decode(
    q: Array,
    visual: Any,
    text_k: Array,
    text_v: Array,
    layer: Array,
    indices: Array | None,
    visual_seen: Array,
    text_seen: Array,
    **options: Any,
) -> Array:
    """:func:`pallas_kernels.gaze_decode`, split as the logical axes "batch" and "kv_heads" say."""

    def call(*arguments: Any) -> Array:
        return decode_api.gaze_decode(*arguments, **options)

    arguments = (q, visual, text_k, text_v, layer, indices, visual_seen, text_seen)
    if decode_api.compiler_splits(options["implementation"]):
        return call(*arguments)
    text = ("layers", "batch", "kv_heads")
    heads = ("batch", "heads")
    names = (heads, decode_api.cache_axes(visual), text, text, (), heads, ("batch",), ("batch",))
    return _split(call, arguments, names, heads)


def gaze_prefill(
    q: Array,
    visual_k: Array,
    visual_v: Array,
    text_k: Array,
    text_v: Array,
    queries: Windows,
    places: KeyPlaces,
    selected: Array | None,
    **options: Any,
) -> Array:
    """:func:`pallas_kernels.gaze_prefill`, split as the logical axes "batch" and "kv_heads" say."""

    def call(*arguments: Any) -> Array:
        return prefill_api.gaze_prefill(*arguments, **options)

    arguments = (q, visual_k, visual_v, text_k, text_v, queries, places, selected)
    if options["implementation"] not in dispatch.KERNELS:
        return call(*arguments)
    keys = ("batch", "kv_heads")
    rows = ("batch", None, "heads")
    names = (rows, keys, keys, keys, keys, ("batch",), ("batch",), rows)
    return _split(call, arguments, names, ("batch", None, "heads"))
