"""The regions that each kv head reads, in the form that the TPU kernel of gaze_decode takes.

All of them, those that indices name, or those that a call scores and selects itself. What depends on the
decoding step alone (which slots count, which region is first among equals) is computed from arguments that
are the same in every layer, so XLA can move it out of a scan over the layers.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.gaze_decode import tpu_select
from pallas_kernels.gaze_decode.tpu_layout import LANES, SUBLANES
from pallas_kernels.gaze_decode.tpu_select import Listed
from pallas_kernels.spec import GazeSpec

MAX_UNION = 32_000  # region numbers of a row and of the next one, double-buffered, in 1 MB of scalar memory
MAX_GROUP = 15  # query heads of a kv head, one bit each in a number that a product makes exactly

Out = TypeVar("Out")


def interpreter(spec: GazeSpec) -> object:
    """The ``interpret`` argument of a Pallas call."""
    return dispatch.interpreter() if spec.interpret else False


def looped(call: Callable[..., Out]) -> Callable[..., Out]:
    """Under ``jax.vmap`` a loop: Pallas has no batching rule for arrays that a kernel copies itself.

    In this loop over the mapped axis, a mapped cache is copied once per call.
    """
    return jax.custom_batching.sequential_vmap(call)


def tile_of(selectors: int, regions: int) -> int:
    """T: a power of two, so that about eight registers hold a tile of all selectors."""
    tile = LANES
    while tile < regions and 2 * tile * max(8, selectors) <= 8 * 8 * LANES:
        tile *= 2
    return tile


def _by_tile(a: jax.Array, tile: int, fill: int) -> jax.Array:
    """[B, Y, R] to [B, N, Y, T]."""
    batch, rows, regions = a.shape
    a = jnp.pad(a, ((0, 0), (0, 0), (0, -regions % tile)), constant_values=fill)
    return jnp.swapaxes(a.reshape(batch, rows, -1, tile), 1, 2)


def _slot_bits(seen: jax.Array) -> jax.Array:
    """bool [B, R, P] to int32 [B, words, R] with bit i of word w for slot 32 * w + i."""
    pieces = [seen[..., first : first + 32] for first in range(0, max(1, seen.shape[-1]), 32)]
    bits = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32)).view(np.int32)
    words = [jnp.sum(jnp.where(a, bits[: a.shape[-1]], 0), axis=-1, dtype=jnp.int32) for a in pieces]
    return jnp.stack(words, axis=1)


def everything(seen: jax.Array, kv_heads: int, group: int) -> Listed:
    """All R regions for all heads; at least one place wide, as an empty array cannot be copied from."""
    batch, regions, _ = seen.shape
    _check_union(regions)
    slots = _slot_bits(seen)
    width = (regions // LANES + 1) * LANES
    place = jnp.arange(width, dtype=jnp.int32)
    ids = jnp.where(place < regions, place, -1).at[width - 1].set(regions)
    heads = jnp.full((batch, 1, regions), (1 << group) - 1, jnp.int32)
    side = jnp.concatenate([heads, slots], axis=1)
    side = jnp.pad(side, ((0, 0), (0, -side.shape[1] % SUBLANES), (0, width - regions)))
    return Listed(
        jnp.broadcast_to(ids, (batch, kv_heads, 1, width)),
        jnp.broadcast_to(side[:, None], (batch, kv_heads, *side.shape[1:])),
    )


def _names(indices: jax.Array, regions: int) -> jax.Array:
    """Whether a list names a region: int32 [B, Hs, J] to bool [B, Hs, R].

    A product of where its numbers stand in a table of 128 columns: as quick for long lists as for short ones.
    """
    batch, lists, _ = indices.shape
    rows = -(-regions // LANES)
    used = (indices >= 0) & (indices < regions)
    row = jax.nn.one_hot(jnp.where(used, indices // LANES, -1), rows, dtype=jnp.bfloat16)
    column = jax.nn.one_hot(indices % LANES, LANES, dtype=jnp.bfloat16)
    count = jnp.einsum("BHJN,BHJT->BHNT", row, column, preferred_element_type=jnp.float32)
    return (count > 0).reshape(batch, lists, -1)[..., :regions]


def named_by(indices: jax.Array, seen: jax.Array, kv_heads: int, group: int, *, spec: GazeSpec) -> Listed:
    """The regions that the query heads of each kv head name."""
    regions = seen.shape[1]
    named = _names(indices, regions)
    per_head = spec.select_per == "head"
    if per_head:
        bits = jnp.int32(1) << jnp.arange(group, dtype=jnp.int32)[:, None]
        heads = named.reshape(named.shape[0], kv_heads, group, regions)
        heads = jnp.sum(jnp.where(heads, bits, 0), axis=2, dtype=jnp.int32)
    else:
        heads = jnp.where(named, (1 << group) - 1, 0)
    static = selecting(kv_heads, group, regions, indices.shape[-1], None, spec)
    heads = jnp.pad(heads, ((0, 0), (0, static.kv_rows - kv_heads), (0, 0)))
    slots = _by_tile(_slot_bits(seen), static.tile, 0)
    given = tpu_select.Given(_by_tile(heads, static.tile, 0), slots)
    return looped(lambda given: tpu_select.lists(static, given, interpreter(spec)))(given)


def selecting(
    kv_heads: int, group: int, regions: int, capacity: int, descriptors: jax.Array | None, spec: GazeSpec
) -> tpu_select.Static:
    """Static arguments of the kernels that make lists.

    Raises:
      NotImplementedError: too many query heads per kv head, or lists too long for scalar memory.
    """
    if group > MAX_GROUP:
        raise NotImplementedError(
            f"gaze_decode implementation 'tpu' takes at most {MAX_GROUP} query heads per kv head, "
            f"not {group}."
        )
    per_head = spec.select_per == "head"
    _check_union(min(capacity * (group if per_head else 1), regions))
    narrow = descriptors is not None and descriptors.shape[-1] <= LANES // 2
    exact = descriptors is None or descriptors.dtype == jnp.float32
    return tpu_select.Static(
        kv_heads=kv_heads,
        group=group,
        per_head=per_head,
        regions=regions,
        tile=tile_of(kv_heads * (group if per_head else 1), regions),
        capacity=capacity,
        compute=jnp.float32 if exact else jnp.bfloat16,
        lanes_are_regions=narrow,
    )


def _check_union(union: int) -> None:
    """Raise a NotImplementedError if a kv head may list more regions than :data:`MAX_UNION`."""
    if union > MAX_UNION:
        raise NotImplementedError(
            f"gaze_decode implementation 'tpu' lists at most {MAX_UNION} regions per kv head in scalar "
            f"memory, not {union}; choose a smaller capacity or larger regions."
        )


def selected(
    features: jax.Array,
    descriptors: jax.Array,
    layer: jax.Array,
    budget: jax.Array,
    visible: jax.Array,
    order: jax.Array,
    seen: jax.Array,
    *,
    capacity: int,
    spec: GazeSpec,
) -> tuple[Listed, jax.Array, jax.Array]:
    """Score all regions and select; arguments as of ``api.route_and_decode``, ``seen`` its ``visual_seen``.

    Returns:
      The lists, indices int32 [B, Hs, J], best first, and scores float32 [B, Hs, R]. The indices come from
      the scores by operations of their own, which XLA drops where nobody reads them.

    Raises:
      NotImplementedError: see :func:`selecting`.
    """
    (batch, heads, _), (_, _, kv_heads, regions, _) = features.shape, descriptors.shape
    static = selecting(kv_heads, heads // kv_heads, regions, capacity, descriptors, spec)
    if features.dtype == jnp.float32:
        static = dataclasses.replace(static, compute=jnp.float32)
    numbers = jnp.arange(regions, dtype=jnp.int32)
    rows = jnp.arange(batch)[:, None]
    place = jnp.zeros_like(order).at[rows, order].set(numbers, unique_indices=True)
    inputs = tpu_select.Inputs(
        features=features,
        descriptors=jnp.swapaxes(descriptors, 3, 4) if static.lanes_are_regions else descriptors,
        places=_by_tile(jnp.where(visible, place, -1)[:, None], static.tile, -1),
        slots=_by_tile(_slot_bits(seen), static.tile, 0),
    )
    scalars = tpu_select.Scalars(jnp.asarray(layer, jnp.int32).reshape(1), budget)

    def run(scalars: tpu_select.Scalars, inputs: tpu_select.Inputs) -> tuple[jax.Array, Listed]:
        if not spec.interpret:
            stack = pltpu.with_memory_space_constraint(inputs.descriptors, pltpu.HBM)
            inputs = inputs._replace(descriptors=stack)
        return tpu_select.route(static, scalars, inputs, interpreter(spec))

    scores, listed = looped(run)(scalars, inputs)
    scores = jnp.swapaxes(scores, 1, 2).reshape(batch, static.selectors, -1)[..., :regions]
    return listed, _best_first(scores, visible, order, budget, capacity), scores


def _best_first(
    scores: jax.Array, visible: jax.Array, order: jax.Array, budget: jax.Array, capacity: int
) -> jax.Array:
    """int32 [B, Hs, J]: what :mod:`tpu_select` selects by the same scores float32 [B, Hs, R], best first."""
    regions = scores.shape[-1]
    by_place = jnp.broadcast_to(order[:, None], scores.shape)
    keys = jnp.take_along_axis(tpu_select.sortable(scores, visible[:, None]), by_place, axis=-1)
    # Of equals top_k names the lower index first: the region whose first token comes first.
    keys, places = jax.lax.top_k(keys, min(capacity, regions))
    listed = (keys > tpu_select.UNSEEN) & (jnp.arange(keys.shape[-1]) < budget[:, None, None])
    indices = jnp.where(listed, jnp.take_along_axis(by_place, places, axis=-1), -1)
    return jnp.pad(indices, ((0, 0), (0, 0), (0, capacity - keys.shape[-1])), constant_values=-1)
