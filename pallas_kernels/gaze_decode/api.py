"""gaze_decode: attention of one query per sequence over a cache of regions.

The visual cache is stacked over layers and passed whole with a layer index: a scan that received one
layer at a time would copy that layer's whole KV in every step. Its layout belongs to the
implementation, which packs it once, at prefill.

A slot of ``indices`` that is -1 is not read; a region listed twice counts once. K and V of regions
that are not listed, and of invalid token slots, may hold anything, NaN included.
"""

from types import MappingProxyType
from typing import Any

import jax

from pallas_kernels.dispatch import KERNELS, check_shape, find, pick, target
from pallas_kernels.gaze_decode import cpu, gpu, reference, tpu, xla
from pallas_kernels.spec import GazeSpec

IMPLEMENTATIONS = MappingProxyType({"reference": reference, "xla": xla, "tpu": tpu, "gpu": gpu})


def supports(implementation: str, spec: GazeSpec) -> str | None:
    """None if ``implementation`` can run ``spec`` here, else the reason why not."""
    return find("gaze_decode", IMPLEMENTATIONS, implementation).supports(spec)


def dense_multiple(implementation: str) -> int:
    """What S should be a multiple of: other sizes work, but may be copied at every call."""
    return find("gaze_decode", IMPLEMENTATIONS, implementation).DENSE_MULTIPLE


def compiler_splits(implementation: str) -> bool:
    """Whether XLA can split the op over the devices of a mesh; if not, it takes ``jax.shard_map``."""
    return implementation not in KERNELS and not (implementation == "xla" and target() == "cpu")


def cache_axes(visual: Any) -> tuple[str, ...]:
    """Names of the leading axes of every array in a packed cache."""
    return ("batch", "kv_heads") if isinstance(visual, cpu.Layered) else ("layers", "batch", "kv_heads")


def one_layer(visual: Any, layer: jax.Array) -> Any:
    """A packed cache of one layer, for :func:`unpack`; ``layer`` is an int32 scalar."""
    if isinstance(visual, cpu.Layered):
        # No index reaches into a tuple.
        branches = [lambda side=side: side for side in visual.layers]
        return cpu.Layered((jax.lax.switch(layer, branches),))
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=True), visual)


def pack(k: jax.Array, v: jax.Array, *, spec: GazeSpec, implementation: str) -> Any:
    """Lay the visual cache out as ``implementation`` wants it.

    Args:
      k, v: [L, B, K, R, P, D].
      spec: static choices.
      implementation: a key of ``IMPLEMENTATIONS``.

    Returns:
      A pytree to pass to :func:`gaze_decode`.
    """
    return pick("gaze_decode", IMPLEMENTATIONS, implementation, spec).pack(k, v, spec=spec)


def unpack(packed: Any, *, spec: GazeSpec, implementation: str) -> tuple[jax.Array, jax.Array]:
    """The inverse of :func:`pack`: two arrays [L, B, K, R, P, D]; float32 if they were quantised."""
    return pick("gaze_decode", IMPLEMENTATIONS, implementation, spec).unpack(packed)


def gaze_decode(
    q: jax.Array,
    visual: Any,
    dense_k: jax.Array,
    dense_v: jax.Array,
    layer: jax.Array,
    indices: jax.Array | None,
    visual_seen: jax.Array,
    dense_seen: jax.Array,
    *,
    spec: GazeSpec,
    implementation: str,
) -> jax.Array:
    """Attend to the listed regions and to the dense stream.

    Args:
      q: [B, H, D], one query per sequence.
      visual: packed cache of all layers, from :func:`pack`.
      dense_k, dense_v: [L, B, K, S, D].
      layer: int32 scalar in [0, L).
      indices: int32 [B, Hs, J] regions to read, -1 in unused slots; None reads every region.
      visual_seen: bool [B, R, P] slots that count.
      dense_seen: bool [B, S] dense keys that count.
      spec: static choices.
      implementation: a key of ``IMPLEMENTATIONS``; the one that packed ``visual``.

    Returns:
      [B, H, D] in ``q.dtype``; 0 for a query that sees nothing.

    Raises:
      ValueError: a shape does not fit, or the implementation's name is unknown.
      NotImplementedError: the named implementation cannot run this spec here.
    """
    op = "gaze_decode"
    module = pick(op, IMPLEMENTATIONS, implementation, spec)
    batch, heads, dim = q.shape
    layers, _, kv_heads, dense = dense_k.shape[:4]
    if heads % kv_heads:
        raise ValueError(f"{op}: {heads} query heads are not a multiple of {kv_heads} kv heads.")
    for name, array in (("dense_k", dense_k), ("dense_v", dense_v)):
        check_shape(op, name, array, (layers, batch, kv_heads, dense, dim))
    check_shape(op, "dense_seen", dense_seen, (batch, dense))
    cached = (layers, batch, kv_heads, *visual_seen.shape[1:], dim)
    for name, array in zip("kv", jax.eval_shape(module.unpack, visual), strict=True):
        check_shape(op, f"visual cache {name} (next to visual_seen {visual_seen.shape})", array, cached)
    check_shape(op, "visual_seen", visual_seen, (batch, *cached[3:5]))
    if indices is not None:
        shared = heads if spec.share == "head" else kv_heads
        check_shape(op, f"indices (share {spec.share!r})", indices, (batch, shared, indices.shape[-1]))
    return module.gaze_decode(q, visual, dense_k, dense_v, layer, indices, visual_seen, dense_seen, spec=spec)
