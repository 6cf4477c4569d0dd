"""gaze_decode: attention of one query per sequence over a cache of regions.

The visual cache is stacked over layers and passed whole with a layer index: a scan over the layers of
the cache would copy a layer's whole KV in every step. Each implementation chooses the cache's layout and
packs it once, at prefill.

A slot of ``indices`` that is -1 is not read; a region listed twice counts once. K and V of regions that
are not listed, and of invalid token slots, may hold anything, including NaN. The query heads of a kv head
share what they read: where each has its own selection and the output of one is not finite, that of all of
them is NaN, in every implementation. Other kv heads and other sequences are not affected. R, S, J and B may
be empty.
"""

from types import MappingProxyType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import KERNELS, check_shape, find, pick, target, without_gradient
from pallas_kernels.gaze_decode import cpu, gpu, grow, native, offload, reference, tpu, xla
from pallas_kernels.gaze_decode.routed import Routed
from pallas_kernels.softmax import WithLse
from pallas_kernels.spec import GazeSpec

IMPLEMENTATIONS = MappingProxyType(
    {"reference": reference, "xla": xla, "native": native, "tpu": tpu, "gpu": gpu, "offload": offload}
)

AUTO = "auto"
"""Stands for "native" on a CPU where its library is built, and for "xla" anywhere else."""

Packed = reference.Packed | xla.Packed | tpu.Packed | gpu.Packed | offload.Packed
"""A packed cache: a pytree of arrays, each implementation its own."""


def named(implementation: str) -> str:
    """The key of :data:`IMPLEMENTATIONS` that a name means here: its own, except for :data:`AUTO`."""
    if implementation != AUTO:
        return implementation
    return "native" if target() == "cpu" and native.library.missing() is None else "xla"


def supports(implementation: str, spec: GazeSpec) -> str | None:
    """None if ``implementation`` can run ``spec`` here, else the reason why not."""
    return find("gaze_decode", IMPLEMENTATIONS, named(implementation)).supports(spec)


def text_multiple(implementation: str) -> int:
    """The number that S should be a multiple of; other sizes work, but may be copied at every call."""
    return find("gaze_decode", IMPLEMENTATIONS, named(implementation)).TEXT_MULTIPLE


def compiler_splits(implementation: str) -> bool:
    """Whether XLA can partition the op over the devices of a mesh; if not, it needs ``jax.shard_map``."""
    # XLA does not partition host computations either, nor a library's.
    unsplit = (*KERNELS, "offload", "native")
    implementation = named(implementation)
    return implementation not in unsplit and not (implementation == "xla" and target() == "cpu")


def routes(implementation: str) -> bool:
    """Whether the implementation has :func:`route_and_decode`."""
    return hasattr(find("gaze_decode", IMPLEMENTATIONS, named(implementation)), "route_and_decode")


def cache_axes(visual: Packed) -> tuple[str, ...]:
    """Names of the leading axes of every array in a packed cache."""
    axes = ("batch", "kv_heads", "regions")
    return axes if isinstance(visual, cpu.Layered) else ("layers", *axes)


def one_layer(visual: Packed, layer: jax.Array) -> Packed:
    """A packed cache of one layer, for :func:`unpack`; ``layer`` is an int32 scalar."""
    if isinstance(visual, cpu.Layered):
        # A traced layer cannot index a tuple.
        branches = [lambda side=side: side for side in visual.layers]
        return cpu.Layered((jax.lax.switch(layer, branches),))
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=True), visual)


def pack(k: jax.Array, v: jax.Array, *, spec: GazeSpec, implementation: str) -> Packed:
    """Lay out the visual cache for ``implementation``.

    Args:
      k, v: [L, B, K, R, P, D].
      spec: static choices.
      implementation: a key of ``IMPLEMENTATIONS``, or :data:`AUTO`, everywhere in this module.

    Returns:
      A pytree to pass to :func:`gaze_decode`.
    """
    return pick("gaze_decode", IMPLEMENTATIONS, named(implementation), spec).pack(k, v, spec=spec)


def unpack(packed: Packed, *, spec: GazeSpec, implementation: str) -> tuple[jax.Array, jax.Array]:
    """Invert :func:`pack`: k and v, [L, B, K, R, P, D] each; float32 if they were quantised."""
    return pick("gaze_decode", IMPLEMENTATIONS, named(implementation), spec).unpack(packed)


def _sizes(module: ModuleType, packed: Packed) -> tuple[int, ...]:
    """(L, B, K, R, P, D) of a packed cache."""
    return jax.eval_shape(module.unpack, packed)[0].shape


def reserve(
    packed: Packed, regions: int, *, spec: GazeSpec, implementation: str, slots: int | None = None
) -> Packed:
    """Return a larger cache with space for more regions, which :func:`append` fills.

    The existing regions keep their contents. The new cache has new shapes, so programs that take it are
    compiled again: reserve rarely, and plenty at a time.

    Args:
      packed: from :func:`pack`.
      regions: number of regions to add after the last one. They hold zeros until they are written.
      spec: static choices.
      implementation: the one that packed the cache.
      slots: P of the new cache, if the new regions have more tokens than the present ones; at least the
        present P, which is the default. The slots added to existing regions hold zeros.

    Raises:
      ValueError: fewer regions or slots than the cache has.
    """
    module = pick("gaze_decode", IMPLEMENTATIONS, named(implementation), spec)
    *_, now, least, _ = _sizes(module, packed)
    slots = least if slots is None else slots
    if regions < 0 or slots < least:
        raise ValueError(
            f"gaze_decode: a cache of {now} regions of {least} slots cannot shrink by reserving {regions} "
            f"regions of {slots}."
        )
    return module.reserve(packed, now + regions, slots)


def append(
    packed: Packed, k: jax.Array, v: jax.Array, start: jax.Array | int, *, spec: GazeSpec, implementation: str
) -> Packed:
    """Write regions into a packed cache, in place if the caller donated it.

    Args:
      packed: from :func:`pack` or :func:`reserve`.
      k, v: [L, B, K, N, P', D] with P' <= P; the slots from P' on are overwritten with zeros.
      start: int32 scalar, index of the first region to write. If it is concrete, the N regions must fit.
        If it is traced, this cannot be checked: XLA clamps a start that is out of bounds, and other
        regions would be overwritten. The caller must count the regions.
      spec: static choices.
      implementation: the one that packed the cache.

    Returns:
      The cache, bit-identical to one whose regions were all packed together.

    Raises:
      ValueError: a shape, a dtype or a known ``start`` does not fit.
    """
    op = "gaze_decode"
    module = pick(op, IMPLEMENTATIONS, named(implementation), spec)
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


def masks(
    visual: Packed,
    visual_seen: jax.Array,
    text_seen: jax.Array,
    visible: jax.Array | None = None,
    order: jax.Array | None = None,
    *,
    spec: GazeSpec,
    implementation: str,
) -> Any:
    """What an implementation makes of a step's masks, once for all layers.

    A decoding step that calls the op in a loop over layers calls this before it: XLA may not move work out
    of the loop. Without it, an implementation makes the same in every layer.

    Args:
      visual: packed cache, of which only the sizes matter.
      visual_seen, text_seen: as for :func:`gaze_decode_with_lse`.
      visible, order: as for :func:`route_and_decode`, if it is to be called.
      spec, implementation: those of the calls.

    Returns:
      The ``step`` of calls with the same masks: a pytree of arrays with leading axis B, or None if there is
      nothing to make.
    """
    module = pick("gaze_decode", IMPLEMENTATIONS, named(implementation), spec)
    if not hasattr(module, "masks"):
        return None
    return module.masks(visual, visual_seen, text_seen, visible, order)


def gaze_decode(
    q: jax.Array,
    visual: Packed,
    text_k: jax.Array,
    text_v: jax.Array,
    layer: jax.Array,
    indices: jax.Array | None,
    visual_seen: jax.Array,
    text_seen: jax.Array,
    *,
    spec: GazeSpec,
    implementation: str,
    step: Any = None,
) -> jax.Array:
    """The output of :func:`gaze_decode_with_lse`, [B, H, D]."""
    arguments = (q, visual, text_k, text_v, layer, indices, visual_seen, text_seen)
    return gaze_decode_with_lse(*arguments, spec=spec, implementation=implementation, step=step)[0]


def gaze_decode_with_lse(
    q: jax.Array,
    visual: Packed,
    text_k: jax.Array,
    text_v: jax.Array,
    layer: jax.Array,
    indices: jax.Array | None,
    visual_seen: jax.Array,
    text_seen: jax.Array,
    *,
    spec: GazeSpec,
    implementation: str,
    step: Any = None,
) -> WithLse:
    """Attend to the listed regions and to the text stream.

    Args:
      q: [B, H, D], one query per sequence.
      visual: packed cache of all layers, from :func:`pack`.
      text_k, text_v: [L, B, K, S, D].
      layer: int32 scalar in [0, L).
      indices: int32 [B, Hs, J] regions to read, -1 in unused slots; None reads every region.
      visual_seen: bool [B, R, P], the slots that count.
      text_seen: bool [B, S], the text-stream keys that count.
      spec: static choices.
      implementation: the key of ``IMPLEMENTATIONS`` that packed ``visual``.
      step: from :func:`masks` of the same masks; None: made here.

    Returns:
      [B, H, D] in ``q.dtype``; 0 for a query that sees nothing. And the log-sum-exp of each head's logits,
      float32 [B, H], by which the outputs of several calls over different keys are joined; -inf for a query
      that sees nothing.

    Raises:
      ValueError: a shape does not fit, or the implementation's name is unknown.
      NotImplementedError: the named implementation cannot run this spec here, or it is differentiated and has
        no gradient: "tpu", "gpu" and "native" have none, "offload" has none for the visual cache.
    """
    op = "gaze_decode"
    module = pick(op, IMPLEMENTATIONS, named(implementation), spec)
    _check(module, q, visual, text_k, text_v, visual_seen, text_seen)
    batch, heads, _ = q.shape
    kv_heads = text_k.shape[2]
    if indices is not None:
        shared = heads if spec.select_per == "head" else kv_heads
        expected = (batch, shared, indices.shape[-1])
        check_shape(op, f"indices (select_per {spec.select_per!r})", indices, expected)
    if q.size == 0:
        return jnp.zeros_like(q), jnp.full((batch, heads), -jnp.inf, jnp.float32)
    implementation = named(implementation)
    instead = "differentiate implementation 'xla', or gaze_prefill, which trains."
    if implementation in (*KERNELS, "native"):
        reason = f"{op} implementation {implementation!r} has no gradient; {instead}"
        q, visual, text_k, text_v = without_gradient((q, visual, text_k, text_v), reason)
    elif implementation == "offload":
        reason = f"{op} implementation 'offload' has no gradient for a visual cache on the host; {instead}"
        visual = without_gradient(visual, reason)
    arguments = (q, visual, text_k, text_v, layer, indices, visual_seen, text_seen)
    out, lse = module.gaze_decode(*arguments, spec=spec, **_step(step))
    if indices is None or spec.select_per == "kv_head" or module is gpu:
        return out, lse  # all heads of a group read the same, or the kernel has seen to it
    return _not_finite_together(out, kv_heads), lse


def route_and_decode(
    q: jax.Array,
    visual: Packed,
    text_k: jax.Array,
    text_v: jax.Array,
    layer: jax.Array,
    visual_seen: jax.Array,
    text_seen: jax.Array,
    features: jax.Array,
    descriptors: jax.Array,
    budget: jax.Array,
    visible: jax.Array,
    order: jax.Array,
    *,
    capacity: int,
    spec: GazeSpec,
    implementation: str,
    step: Any = None,
) -> Routed:
    """Score every region, select the best, and attend to them and to the text stream, in one call.

    Args:
      q, visual, text_k, text_v, layer, visual_seen, text_seen: as for :func:`gaze_decode_with_lse`.
      features: [B, H, E], what a descriptor is multiplied with; ``q`` itself where descriptors are mean keys.
      descriptors: [L, B, K, R, E].
      budget: int32 [B], regions that a query selects; more than the visible ones means all of those.
      visible: bool [B, R], regions that may be selected.
      order: int32 [B, R], the regions by their first token: of equal scores the one named first is selected.
      capacity: J.
      spec: static choices; with select_per "kv_head" a kv head's score is the sum of its query heads'.
      implementation: one of those that :func:`routes` names.
      step: from :func:`masks` of the same masks, ``visible`` and ``order``; None: made here.

    Returns:
      A :class:`pallas_kernels.gaze_decode.routed.Routed`. Scores are float32 products; a NaN is below every
      number, -0.0 equals 0.0.

    Raises:
      ValueError: a shape does not fit, or the implementation's name is unknown.
      NotImplementedError: the implementation does not route, cannot run this spec here, or is differentiated.
    """
    op = "route_and_decode"
    module = pick("gaze_decode", IMPLEMENTATIONS, named(implementation), spec)
    if not routes(implementation):
        raise NotImplementedError(
            f"gaze_decode implementation {implementation!r} does not route; "
            f"{', '.join(filter(routes, IMPLEMENTATIONS))} do."
        )
    _check(module, q, visual, text_k, text_v, visual_seen, text_seen)
    (layers, batch, kv_heads), regions = text_k.shape[:3], visual_seen.shape[1]
    heads, width = q.shape[1], descriptors.shape[-1]
    if capacity < 1:
        raise ValueError(f"{op}: capacity J={capacity} must be at least 1.")
    check_shape(op, "features", features, (batch, heads, width))
    check_shape(op, "descriptors", descriptors, (layers, batch, kv_heads, regions, width))
    check_shape(op, "budget", budget, (batch,))
    check_shape(op, "visible", visible, (batch, regions))
    check_shape(op, "order", order, (batch, regions))
    reason = f"gaze_decode implementation {implementation!r} has no gradient; use 'xla' with indices."
    q, visual, text_k, text_v = without_gradient((q, visual, text_k, text_v), reason)
    selecting = (features, descriptors, budget, visible, order)
    arguments = (q, visual, text_k, text_v, layer, visual_seen, text_seen, *selecting)
    found = module.route_and_decode(*arguments, capacity=capacity, spec=spec, **_step(step))
    if spec.select_per == "kv_head" or module is gpu:
        return found
    return found._replace(out=_not_finite_together(found.out, kv_heads))


def _step(step: Any) -> dict[str, Any]:
    """The argument of an implementation that has ``masks``; the others take none."""
    return {} if step is None else {"step": step}


def _check(
    module: ModuleType,
    q: jax.Array,
    visual: Packed,
    text_k: jax.Array,
    text_v: jax.Array,
    visual_seen: jax.Array,
    text_seen: jax.Array,
) -> None:
    """Raise a ValueError if a shape that all calls have does not fit."""
    op = "gaze_decode"
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


def _not_finite_together(out: jax.Array, kv_heads: int) -> jax.Array:
    """[B, H, D], NaN for all query heads of a kv head if it is not finite for one."""
    if out.shape[1] == kv_heads:
        return out
    grouped = out.reshape(out.shape[0], kv_heads, -1)
    finite = jnp.isfinite(grouped).all(-1, keepdims=True)
    return jnp.where(finite, grouped, jnp.nan).reshape(out.shape)
