"""gaze_decode for NVIDIA Hopper (sm_90): Pallas Mosaic GPU kernels that split the regions over the chip.

Kernels of a routed layer: scores; the cut of each query head's selection; the list of a kv head (with one
selection per kv head this kernel makes the cut too); attention; the join of the splits. With indices: the
list, attention and the join. What depends on the step alone is made before the layers (``gpu_step.py``).

Split. A thread block (one warpgroup) handles a row, a kv head and a *split*: split s takes chunks s,
s + splits, ... of the region list, then of the text stream, counted from the end. It keeps an online softmax
in float32 and writes (maximum, sum, weighted values), which another kernel joins in a fixed order. So a
single sequence fills the chip.

If each query head has its own selection, their union is fetched once; every region of the list carries a bit
mask of the heads that see it.

``gpu_layout.py`` describes the cache, ``gpu_kernel.py`` what happens to a chunk, ``gpu_select.py`` the
selection.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.dispatch import needs
from pallas_kernels.gaze_decode import gpu_scores, gpu_select, gpu_step, grow, tuning
from pallas_kernels.gaze_decode.gpu_kernel import Shape, Tiles, attend_in_splits
from pallas_kernels.gaze_decode.gpu_layout import (
    SCALES,
    Packed,
    pack,
    padded,
    pieces_of,
    reserve,
    unpack,
    write,
)
from pallas_kernels.gaze_decode.gpu_math import DIMS, ROWS, Operands
from pallas_kernels.gaze_decode.gpu_merge import merge
from pallas_kernels.gaze_decode.gpu_select import Listed
from pallas_kernels.gaze_decode.gpu_step import StepMasks
from pallas_kernels.gaze_decode.routed import Routed
from pallas_kernels.softmax import WithLse
from pallas_kernels.spec import GazeSpec

__all__ = ["gaze_decode", "masks", "pack", "reserve", "route_and_decode", "supports", "unpack", "write"]

# A text stream shorter than a chunk's tile is padded at every call; a longer one is not.
TEXT_MULTIPLE = 128
_MOST_COPIES = 16  # maximum number of copies per chunk and side, which are unrolled
_MOST_ROWS = 256  # maximum number of keys per tensor core instruction
_SHARED_MEMORY = 227 * 1024 - 1024  # limit per block on sm_90, less space for barriers
_PAIRS = 512  # longest list whose entries are compared pairwise
_MOST_HEADS = 15  # query heads per kv head
_LOG2E = math.log2(math.e)


def supports(spec: GazeSpec) -> str | None:
    """Every spec on an NVIDIA GPU, and every spec interpreted."""
    return needs("gpu", spec)


def _parts(dtype: DTypeLike) -> int:
    """Number of bfloat16 arrays that represent the dtype exactly."""
    if dtype in (jnp.bfloat16, jnp.int8):
        return 1
    if dtype == jnp.float32:
        return 3
    raise NotImplementedError(
        f"gaze_decode 'gpu' keeps bfloat16, float32 and int8, not {jnp.dtype(dtype).name}."
    )


def _splits(tiles: Tiles, rows: int, chunks: int) -> int:
    """Thread blocks per row and kv head (``rows`` of these in total); each has at least one chunk."""
    return min(max(tiles.blocks // rows, 1), chunks)


def _tiles(spec: GazeSpec, piece: int, dtype: DTypeLike) -> Tiles:
    """Tiles tuned for this device; small when interpreted, so that tests have several chunks and splits."""
    if spec.interpret:
        return Tiles(pieces=1 if dtype == jnp.int8 else 2, stages=2, blocks=12)
    entry = tuning.sizes("gpu", dtype)
    # Scales of int8 are copied to where a tile's rows begin.
    pieces = 1 if dtype == jnp.int8 else min(max(entry["keys"] // piece, 1), _MOST_COPIES)
    return Tiles(pieces, entry["stages"], entry["blocks"])


def fitted(
    spec: GazeSpec, slots: int, dim: int, dtypes: tuple[DTypeLike, DTypeLike, DTypeLike]
) -> tuple[Tiles, int, int]:
    """The tiles of a call, shrunk until they fit a block's shared memory.

    Args:
      spec: as of the call.
      slots: P.
      dim: D, padded.
      dtypes: dtypes of the queries, the visual cache and the text stream.

    Returns:
      The tiles, the rows of a chunk's tile, and the bytes of shared memory that a block takes.

    Raises:
      NotImplementedError: nothing fits.
    """
    _, piece = pieces_of(slots, dim, jnp.dtype(dtypes[1]).itemsize)
    tiles = _tiles(spec, piece, dtypes[1])
    while True:
        rows = -(-tiles.pieces * piece // 64) * 64
        query = _parts(dtypes[0]) * ROWS * dim * 2
        streams = [
            tiles.stages * rows * (2 * dim * jnp.dtype(dtype).itemsize + 8) + _parts(dtype) * rows * dim * 2
            for dtype in dtypes[1:]
        ]
        taken = query + max(streams)
        if taken <= _SHARED_MEMORY and rows <= _MOST_ROWS:
            return tiles, rows, taken
        if tiles.pieces > 1:
            tiles = tiles._replace(pieces=tiles.pieces // 2)
        elif tiles.stages > 1:
            tiles = tiles._replace(stages=tiles.stages - 1)
        else:
            raise NotImplementedError(f"gaze_decode 'gpu' has no room for D = {dim} of {dtypes}.")


def _listed(indices: jax.Array | None, batch: int, kv_heads: int, regions: int, *, interpret: bool) -> Listed:
    """The regions that a call with indices reads; -1 may be anywhere in a list."""
    if indices is None:
        shape = (batch, kv_heads)
        numbers = jnp.broadcast_to(jnp.arange(regions, dtype=jnp.int32), (*shape, regions))
        return Listed(numbers, None, None)
    shared, capacity = indices.shape[1:]
    lists = shared // kv_heads
    if not min(regions, capacity):
        return Listed(jnp.zeros((batch, kv_heads, 0), jnp.int32), None, None)
    if lists == 1 and capacity <= min(regions, _PAIRS):
        # Nothing to join: comparing all pairs of a short list is one small program.
        earlier = jnp.tri(capacity, k=-1, dtype=bool)
        again = jnp.any((indices[..., :, None] == indices[..., None, :]) & earlier, axis=-1)
        return Listed(jnp.where(again, -1, indices), None, None)
    # A mark for every region that a list mentions, then the list of the marks.
    places = gpu_scores.places(regions)
    at = jnp.where((indices >= 0) & (indices < regions), indices, places)
    b, k, g = (
        jnp.arange(n).reshape(-1, *[1] * after) for n, after in ((batch, 3), (kv_heads, 2), (lists, 1))
    )
    marks = jnp.zeros((batch, kv_heads, lists, places), jnp.float32)
    marks = marks.at[b, k, g, at.reshape(batch, kv_heads, lists, capacity)].set(1.0, mode="drop")
    return gpu_select.listed_marks(marks, regions, min(lists * capacity, regions), interpret=interpret)


def _visual_operands(
    visual: Packed, listed: Listed, layer: jax.Array, step: StepMasks, piece: int
) -> dict[str, jax.Array]:
    """The list of regions, and the cache as one array of pieces."""
    dim = visual.k.shape[-1]
    operands = {
        "layer": layer,
        "list": listed.regions,
        "words": step.words,
        "k": visual.k.reshape(-1, piece, dim),
        "v": visual.v.reshape(-1, piece, dim),
    }
    if listed.length is not None:
        operands["length"] = listed.length
    if listed.heads is not None:
        operands["heads"] = listed.heads
    if visual.k_scale is not None and visual.v_scale is not None:
        gaps = -(-piece // SCALES) * SCALES
        operands |= {"k_scale": visual.k_scale.reshape(-1, gaps), "v_scale": visual.v_scale.reshape(-1, gaps)}
    return operands


def _text_operands(
    text_k: jax.Array, text_v: jax.Array, layer: jax.Array, step: StepMasks, dim: int, rows: int
) -> dict[str, jax.Array]:
    """The text stream of all layers (of one layer if it has to be padded), and which keys are seen."""
    keys = text_k.shape[3]
    if keys < rows or text_k.shape[-1] != dim:
        text_k, text_v = (
            grow.fill(lax.dynamic_slice_in_dim(a, layer[0], 1), {3: max(keys, rows), 4: dim})
            for a in (text_k, text_v)
        )
        layer = jnp.zeros_like(layer)
    length = text_k.shape[3]
    return {
        "layer": layer,
        "words": step.text_words,
        "length": step.text_length,
        "k": text_k.reshape(-1, length, dim),
        "v": text_v.reshape(-1, length, dim),
    }


def _attend(
    q: jax.Array,
    visual: Packed,
    text_k: jax.Array,
    text_v: jax.Array,
    layer: jax.Array,
    listed: Listed,
    step: StepMasks,
    *,
    spec: GazeSpec,
) -> WithLse:
    """Attention to the listed regions and the text stream: [B, H, D] and float32 [B, H]."""
    batch, heads, dim = q.shape
    kv_heads, keys = text_k.shape[2:4]
    group, wide = heads // kv_heads, visual.k.shape[-1]
    dtypes = (q.dtype, visual.k.dtype, text_k.dtype)
    query_parts, visual_parts, text_parts = map(_parts, dtypes)
    tiles, rows, _ = fitted(spec, visual.slots, wide, dtypes)
    cut, piece = visual.pieces
    grouped = q.reshape(batch, kv_heads, group, dim)
    operands: Operands = {"q": grow.fill(grouped, {3: wide})}
    chunks = 0
    if listed.regions.shape[-1]:
        operands["visual"] = _visual_operands(visual, listed, layer, step, piece)
        chunks += -(-listed.regions.shape[-1] * cut // tiles.pieces)
    if keys:
        operands["text"] = _text_operands(text_k, text_v, layer, step, wide, rows)
        chunks += -(-operands["text"]["k"].shape[1] // rows)
    shape = Shape(
        rows=rows,
        dim=wide,
        piece=piece,
        cut=cut,
        tiles=tiles,
        splits=_splits(tiles, batch * kv_heads, chunks),
        group=group,
        query_parts=query_parts,
        visual_parts=visual_parts,
        text_parts=text_parts,
        scale=spec.scale * _LOG2E,
    )
    partials = attend_in_splits(shape, batch, kv_heads, operands, interpret=spec.interpret)
    together = listed.heads is not None
    out, lse = merge(shape, partials, q.dtype, together=together, interpret=spec.interpret)
    return out[..., :dim].reshape(q.shape), lse.reshape(batch, heads)


def masks(
    visual: Packed,
    visual_seen: jax.Array,
    text_seen: jax.Array,
    visible: jax.Array | None = None,
    order: jax.Array | None = None,
) -> StepMasks:
    """See :func:`pallas_kernels.gaze_decode.api.masks`."""
    return gpu_step.masks(visual_seen, text_seen, visible, order, visual.pieces)


def _checked(group: int) -> None:
    if group > _MOST_HEADS:
        raise NotImplementedError(
            f"gaze_decode 'gpu' takes at most {_MOST_HEADS} query heads per kv head, not {group}."
        )


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
    step: StepMasks | None = None,
) -> WithLse:
    """See :func:`pallas_kernels.gaze_decode.api.gaze_decode_with_lse`.

    Raises:
      NotImplementedError: a dtype other than bfloat16, float32 and int8, more than 15 query heads per kv
        head, or a D too large for shared memory (above 256).
    """
    batch, heads, _ = q.shape
    kv_heads, keys = text_k.shape[2:4]
    _checked(heads // kv_heads)
    read = visual_seen.shape[1] if indices is None else indices.shape[-1]
    if not min(read, visual_seen.shape[1]) and not keys:
        return jnp.zeros_like(q), jnp.full((batch, heads), -jnp.inf, jnp.float32)
    step = masks(visual, visual_seen, text_seen) if step is None else step
    listed = _listed(indices, batch, kv_heads, visual_seen.shape[1], interpret=spec.interpret)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    return _attend(q, visual, text_k, text_v, layer, listed, step, spec=spec)


def _scores(features: jax.Array, descriptors: jax.Array, layer: jax.Array, *, spec: GazeSpec) -> jax.Array:
    """float32 [B, K, lists, places]; see :func:`pallas_kernels.gaze_decode.gpu_scores.scores`."""
    batch, heads, width = features.shape
    kv_heads, regions = descriptors.shape[2:4]
    if regions < gpu_scores.TILE or width % DIMS:
        descriptors = grow.fill(
            lax.dynamic_slice_in_dim(descriptors, layer[0], 1),
            {3: max(regions, gpu_scores.TILE), 4: padded(width)},
        )
        layer = jnp.zeros_like(layer)
    features = features.reshape(batch, kv_heads, heads // kv_heads, width)
    return gpu_scores.scores(
        grow.fill(features, {3: padded(width)}),
        descriptors.reshape(-1, *descriptors.shape[3:]),
        layer,
        (_parts(features.dtype), _parts(descriptors.dtype)),
        shared=spec.select_per == "kv_head",
        interpret=spec.interpret,
    )


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
    step: StepMasks | None = None,
) -> Routed:
    """See :func:`pallas_kernels.gaze_decode.api.route_and_decode`; raises what :func:`gaze_decode` does."""
    batch, heads, _ = q.shape
    kv_heads, regions = descriptors.shape[2:4]
    group = heads // kv_heads
    _checked(group)
    shared = kv_heads if spec.select_per == "kv_head" else heads
    if not regions:
        none = jnp.full((batch, shared, capacity), -1, jnp.int32)
        arguments = (q, visual, text_k, text_v, layer, none, visual_seen, text_seen)
        return Routed(*gaze_decode(*arguments, spec=spec), none, jnp.zeros((batch, shared, 0), jnp.float32))
    if step is None or step.ranks is None:
        step = masks(visual, visual_seen, text_seen, visible, order)
    assert step.ranks is not None, "they were just made"
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    found = _scores(features, descriptors, layer, spec=spec)
    lists = shared // kv_heads
    cuts, interpret = None, spec.interpret
    if lists > 1:
        cuts = gpu_select.cuts_of(found, step.ranks, budget, regions, group, capacity, interpret=interpret)
    listed = gpu_select.listed(found, step.ranks, cuts, budget, regions, capacity, interpret=interpret)
    out, lse = _attend(q, visual, text_k, text_v, layer, listed, step, spec=spec)
    # XLA leaves out what follows where nobody looks at it.
    scores = gpu_scores.by_region(found[:, :, :lists], regions).reshape(batch, shared, regions)
    return Routed(out, lse, gpu_select.best_first(scores, visible, budget, order, capacity), scores)
