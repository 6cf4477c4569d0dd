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
import jax.numpy as jnp

from pallas_kernels.dispatch import KERNELS, check_shape, find, pick, target
from pallas_kernels.gaze_decode import cpu, gpu, grow, offload, reference, tpu, xla
from pallas_kernels.spec import GazeSpec

IMPLEMENTATIONS = MappingProxyType(
    {"reference": reference, "xla": xla, "tpu": tpu, "gpu": gpu, "offload": offload}
)


def supports(implementation: str, spec: GazeSpec) -> str | None:
    """None if ``implementation`` can run ``spec`` here, else the reason why not."""
    return find("gaze_decode", IMPLEMENTATIONS, implementation).supports(spec)


def text_multiple(implementation: str) -> int:
    """What S should be a multiple of: other sizes work, but may be copied at every call."""
    return find("gaze_decode", IMPLEMENTATIONS, implementation).TEXT_MULTIPLE


def compiler_splits(implementation: str) -> bool:
    """Whether XLA can split the op over the devices of a mesh; if not, it takes ``jax.shard_map``."""
    whole = (*KERNELS, "offload")  # nor is what the host computes split
    return implementation not in whole and not (implementation == "xla" and target() == "cpu")


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


def _sizes(module: Any, packed: Any) -> tuple[int, ...]:
    """(L, B, K, R, P, D) of a packed cache."""
    return jax.eval_shape(module.unpack, packed)[0].shape


def reserve(
    packed: Any, regions: int, *, spec: GazeSpec, implementation: str, slots: int | None = None
) -> Any:
    """A cache with room for more regions, which :func:`append` fills; what it holds stays as it is.

    This makes a new cache, whose shapes and programs are new as well: reserve seldom and for much.

    Args:
      packed: from :func:`pack`.
      regions: to add behind the last one. Their tokens are zeros until they are written.
      spec: static choices.
      implementation: the one that packed.
      slots: P of the new cache, where regions to come have more tokens than those there are; not less
        than now. The slots added to old regions are zeros as well.

    Raises:
      ValueError: fewer regions or slots than the cache has.
    """
    module = pick("gaze_decode", IMPLEMENTATIONS, implementation, spec)
    *_, now, least, _ = _sizes(module, packed)
    slots = least if slots is None else slots
    if regions < 0 or slots < least:
        raise ValueError(
            f"gaze_decode: a cache of {now} regions of {least} slots cannot shrink by reserving {regions} "
            f"regions of {slots}."
        )
    return module.reserve(packed, now + regions, slots)


def append(
    packed: Any, k: jax.Array, v: jax.Array, start: jax.Array | int, *, spec: GazeSpec, implementation: str
) -> Any:
    """Write regions into a packed cache, in place where the caller donated it.

    Args:
      packed: from :func:`pack` or :func:`reserve`.
      k, v: [L, B, K, N, P', D] with P' <= P; their missing slots become zeros, whatever was there.
      start: int32 scalar, the region of the cache that takes the first of the N. Where it is known while
        tracing, N regions must fit behind it. Where it is traced nobody can tell, and XLA moves a start
        that is out of bounds to the nearest one that fits: other regions would be written over. So the
        caller counts the regions.
      spec: static choices.
      implementation: the one that packed.

    Returns:
      The cache; as if those regions had been packed with the others, bit for bit.

    Raises:
      ValueError: a shape, a dtype or a known ``start`` does not fit.
    """
    op = "gaze_decode"
    module = pick(op, IMPLEMENTATIONS, implementation, spec)
    *lead, regions, slots, dim = _sizes(module, packed)
    new, given = k.shape[3:5] if k.ndim == 6 else (0, 0)
    for name, array in (("k", k), ("v", v)):
        check_shape(op, f"appended {name}", array, (*lead, new, min(given, slots), dim))
    known = not isinstance(start, jax.core.Tracer)
    if new > regions or (known and not 0 <= int(start) <= regions - new):
        at = f" at {int(start)}" if known else ""
        raise ValueError(f"{op}: {new} regions{at} do not fit a cache of {regions}; reserve more first.")
    if new == 0:
        return packed
    piece = module.pack(*(grow.fill(a, {4: slots}) for a in (k, v)), spec=spec)
    for array, part in zip(jax.tree.leaves(packed), jax.tree.leaves(piece), strict=True):
        if array.dtype != part.dtype:
            raise ValueError(f"{op}: a cache of {array.dtype} cannot take regions that pack as {part.dtype}.")
    return module.write(packed, piece, jnp.asarray(start, jnp.int32))


def gaze_decode(
    q: jax.Array,
    visual: Any,
    text_k: jax.Array,
    text_v: jax.Array,
    layer: jax.Array,
    indices: jax.Array | None,
    visual_seen: jax.Array,
    text_seen: jax.Array,
    *,
    spec: GazeSpec,
    implementation: str,
) -> jax.Array:
    """Attend to the listed regions and to the text stream.

    Args:
      q: [B, H, D], one query per sequence.
      visual: packed cache of all layers, from :func:`pack`.
      text_k, text_v: [L, B, K, S, D].
      layer: int32 scalar in [0, L).
      indices: int32 [B, Hs, J] regions to read, -1 in unused slots; None reads every region.
      visual_seen: bool [B, R, P] slots that count.
      text_seen: bool [B, S] text-stream keys that count.
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
    layers, _, kv_heads, text = text_k.shape[:4]
    if heads % kv_heads:
        raise ValueError(f"{op}: {heads} query heads are not a multiple of {kv_heads} kv heads.")
    for name, array in (("text_k", text_k), ("text_v", text_v)):
        check_shape(op, name, array, (layers, batch, kv_heads, text, dim))
    check_shape(op, "text_seen", text_seen, (batch, text))
    cached = (layers, batch, kv_heads, *visual_seen.shape[1:], dim)
    for name, array in zip("kv", jax.eval_shape(module.unpack, visual), strict=True):
        check_shape(op, f"visual cache {name} (next to visual_seen {visual_seen.shape})", array, cached)
    check_shape(op, "visual_seen", visual_seen, (batch, *cached[3:5]))
    if indices is not None:
        shared = heads if spec.select_per == "head" else kv_heads
        check_shape(op, f"indices (share {spec.select_per!r})", indices, (batch, shared, indices.shape[-1]))
    return module.gaze_decode(q, visual, text_k, text_v, layer, indices, visual_seen, text_seen, spec=spec)
