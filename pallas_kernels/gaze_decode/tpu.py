"""gaze_decode for TPUs: a Pallas Mosaic kernel that copies selected regions and nothing else.

This file prepares the arguments of the kernels and calls them. ``tpu_select.py`` lists the regions that each kv
head reads, ``tpu_kernel.py`` attends to them, and ``tpu_layout.py`` says how the visual cache is stored.

What depends on the decoding step alone (which slots and keys count, who is first among equals) is computed
from arguments that are the same in every layer, so XLA moves it out of a scan over the layers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.gaze_decode import tpu_kernel, tpu_layout, tpu_select
from pallas_kernels.gaze_decode.routed import Routed
from pallas_kernels.gaze_decode.tpu_kernel import Inputs, Outputs, Scalar, Scalars, Static
from pallas_kernels.gaze_decode.tpu_layout import LANES, Packed
from pallas_kernels.gaze_decode.tpu_select import Listed
from pallas_kernels.softmax import WithLse
from pallas_kernels.spec import GazeSpec

# XLA stores a text stream of another size in a layout of its own, and copies it for the kernel.
TEXT_MULTIPLE = 128
TEXT_TILE = 512  # keys of the text stream per grid step
CHUNK_BYTES = 512 * 1024  # of regions in flight: two such buffers cover a copy's latency

MAX_UNION = 32_000  # region numbers of a row and of the next one, double-buffered, in 1 MB of scalar memory
MAX_GROUP = 15  # query heads of a kv head, one bit each in a number that a product makes exactly

_Out = TypeVar("_Out")

pack = tpu_layout.pack
unpack = tpu_layout.unpack
reserve = tpu_layout.reserve
write = tpu_layout.write


def supports(spec: GazeSpec) -> str | None:
    """None on a TPU or in the interpreter, for every spec; otherwise the reason why not."""
    return dispatch.needs("tpu", spec)


def regions_per_chunk(region_bytes: int, union: int) -> int:
    """C: a power of two from 8 to 64, about :data:`CHUNK_BYTES`, and no larger than useful.

    Args:
      region_bytes: bytes of one region's keys and values.
      union: U, the most regions that a kv head lists.
    """
    wanted = min(CHUNK_BYTES * 5 // 4 // region_bytes, 64)
    chunk = 8
    while chunk * 2 <= wanted and chunk < union:
        chunk *= 2
    return chunk


def _tile(selectors: int, regions: int) -> int:
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


def _everything(seen: jax.Array, kv_heads: int, group: int) -> Listed:
    """All R regions for all heads; at least one place wide, as an empty array cannot be copied from."""
    batch, regions, _ = seen.shape
    slots = _slot_bits(seen)
    width = (regions // LANES + 1) * LANES
    place = jnp.arange(width, dtype=jnp.int32)
    ids = jnp.where(place < regions, place, -1).at[width - 1].set(regions)
    heads = jnp.full((batch, 1, regions), (1 << group) - 1, jnp.int32)
    side = jnp.concatenate([heads, slots], axis=1)
    side = jnp.pad(side, ((0, 0), (0, -side.shape[1] % tpu_layout.SUBLANES), (0, width - regions)))
    return Listed(
        jnp.broadcast_to(ids, (batch, kv_heads, 1, width)),
        jnp.broadcast_to(side[:, None], (batch, kv_heads, *side.shape[1:])),
    )


def _named(indices: jax.Array, regions: int) -> jax.Array:
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


def _listed(
    indices: jax.Array, seen: jax.Array, kv_heads: int, group: int, *, spec: GazeSpec
) -> Listed:
    """The regions that the query heads of each kv head name."""
    regions = seen.shape[1]
    named = _named(indices, regions)
    per_head = spec.select_per == "head"
    if per_head:
        bits = jnp.int32(1) << jnp.arange(group, dtype=jnp.int32)[:, None]
        heads = named.reshape(named.shape[0], kv_heads, group, regions)
        heads = jnp.sum(jnp.where(heads, bits, 0), axis=2, dtype=jnp.int32)
    else:
        heads = jnp.where(named, (1 << group) - 1, 0)
    static = _selecting(kv_heads, group, regions, indices.shape[-1], None, spec)
    heads = jnp.pad(heads, ((0, 0), (0, static.kv_rows - kv_heads), (0, 0)))
    slots = _by_tile(_slot_bits(seen), static.tile, 0)
    given = tpu_select.Given(_by_tile(heads, static.tile, 0), slots)
    return _looped(lambda given: tpu_select.lists(static, given, _interpreter(spec)))(given)


def _selecting(
    kv_heads: int, group: int, regions: int, capacity: int, descriptors: jax.Array | None, spec: GazeSpec
) -> tpu_select.Static:
    """Static arguments of the kernels that make lists.

    Raises:
      NotImplementedError: too many query heads per kv head, or lists too long for scalar memory.
    """
    if group > MAX_GROUP:
        raise NotImplementedError(
            f"gaze_decode implementation 'tpu' takes at most {MAX_GROUP} query heads per kv head, not {group}."
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
        tile=_tile(kv_heads * (group if per_head else 1), regions),
        capacity=capacity,
        compute=jnp.float32 if exact else jnp.bfloat16,
        lanes_are_regions=narrow,
    )


def _check_union(union: int) -> None:
    if union > MAX_UNION:
        raise NotImplementedError(
            f"gaze_decode implementation 'tpu' lists at most {MAX_UNION} regions per kv head in scalar "
            f"memory, not {union}; choose a smaller capacity or larger regions."
        )


def _interpreter(spec: GazeSpec) -> object:
    return dispatch.interpreter() if spec.interpret else False


def _looped(call: Callable[..., _Out]) -> Callable[..., _Out]:
    """Under ``jax.vmap`` a loop: Pallas has no batching rule for arrays that a kernel copies itself.

    In this loop over the mapped axis, a mapped cache is copied once per call.
    """
    return jax.custom_batching.sequential_vmap(call)


def _used_tiles(text_seen: jax.Array, tile: int) -> jax.Array:
    """int32 [B]: tiles of the text stream up to the last key that counts."""
    # A table of tile numbers, as XLA takes ten operations for a division that rounds down.
    number = np.arange(text_seen.shape[-1], dtype=np.int32) // tile + 1
    return jnp.max(jnp.where(text_seen, number, 0), axis=-1)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Index maps of the grid (core, row of that core, tile of the text stream).

    Attributes:
      kv_heads: K.
      per_core: rows of a core.
      lanes_are_tokens: as in :class:`tpu_kernel.Static`.
    """

    kv_heads: int
    per_core: int
    lanes_are_tokens: bool

    def row(self, core: jax.Array, inner: jax.Array, tile: jax.Array, scalars: Scalars) -> tuple[Scalar, ...]:
        """Block of the current row, for [B * K, ...]."""
        return core * self.per_core + inner, 0, 0

    def listed(
        self, core: jax.Array, inner: jax.Array, tile: jax.Array, scalars: Scalars
    ) -> tuple[Scalar, ...]:
        """Block of the current row, for [B, K, ...]."""
        row = core * self.per_core + inner
        return row // self.kv_heads, row % self.kv_heads, 0, 0

    def next_listed(
        self, core: jax.Array, inner: jax.Array, tile: jax.Array, scalars: Scalars
    ) -> tuple[Scalar, ...]:
        """Block of the core's next row, for [B, K, ...]. For the last row it is the last row itself."""
        return self.listed(core, jnp.minimum(inner + 1, self.per_core - 1), tile, scalars)

    def text_seen(
        self, core: jax.Array, inner: jax.Array, tile: jax.Array, scalars: Scalars
    ) -> tuple[Scalar, ...]:
        """Block of the current tile, for [B, 1, S]."""
        b = (core * self.per_core + inner) // self.kv_heads
        # After the last tile in use the index repeats, and the pipeline does not fetch the same block again.
        return b, 0, jnp.minimum(tile, jnp.maximum(scalars.tiles[b] - 1, 0))

    def text_keys(
        self, core: jax.Array, inner: jax.Array, tile: jax.Array, scalars: Scalars
    ) -> tuple[Scalar, ...]:
        """Block of the current tile, for [L, B, K, S, D], or [L, B, K, D, S] if lanes are tokens."""
        b, _, at = self.text_seen(core, inner, tile, scalars)
        place = (0, at) if self.lanes_are_tokens else (at, 0)
        return scalars.layer[0], b, (core * self.per_core + inner) % self.kv_heads, *place


def _call(static: Static, scalars: Scalars, inputs: Inputs, tile: int, dtype: jnp.dtype) -> Outputs:
    """Run the kernel.

    Args:
      static: static arguments of the kernel.
      scalars: as in the kernel.
      inputs: whole arrays, where the kernel sees blocks of them: ``ids`` and ``next_ids`` [B, K, 1, U],
        ``side`` [B, K, Y, U], ``visual_q`` [B * K, G, 128], ``text_q`` [B * K, G, D], ``text_k`` and
        ``text_v`` [L, B, K, S, D], or [L, B, K, D, S] if lanes are tokens, and ``text_seen`` [B, 1, S].
      tile: E, keys of the text stream per grid step; at most S.
      dtype: of the output.

    Returns:
      ``out`` [B * K, G, D] and ``lse`` float32 [B * K, G, 128].
    """
    rows, group, dim = inputs.text_q.shape
    places = inputs.words.shape[-2]
    cores = 2 if rows % 2 == 0 else 1  # chips with two TensorCores per device split the first axis
    grid = _Grid(static.kv_heads, rows // cores, static.lanes_are_tokens)
    ids = functools.partial(pl.BlockSpec, (1, 1, 1, inputs.ids.shape[-1]), memory_space=pltpu.SMEM)
    text = pl.BlockSpec((1, 1, 1, *((dim, tile) if static.lanes_are_tokens else (tile, dim))), grid.text_keys)
    in_specs = Inputs(
        ids=ids(grid.listed),
        next_ids=ids(grid.next_listed),
        side=pl.BlockSpec((1, 1, *inputs.side.shape[2:]), grid.listed),
        visual_q=pl.BlockSpec((1, group, LANES), grid.row),
        text_q=pl.BlockSpec((1, group, dim), grid.row),
        words=pl.BlockSpec(memory_space=pl.ANY),
        text_k=text,
        text_v=text,
        text_seen=pl.BlockSpec((1, 1, tile), grid.text_seen),
    )
    shapes = Outputs(
        jax.ShapeDtypeStruct((rows, group, dim), dtype),
        jax.ShapeDtypeStruct((rows, group, LANES), jnp.float32),
    )
    buffers = tpu_kernel.Buffers(
        words=pltpu.VMEM((2, static.chunk * static.word_rows, places, LANES), inputs.words.dtype),
        first=pltpu.SMEM((1,), jnp.int32),
        copied=pltpu.SemaphoreType.DMA((2,)),
    )
    softmax = tpu_kernel.Softmax(
        *(pltpu.VMEM((group, width), jnp.float32) for width in (LANES, LANES, LANES, dim))
    )
    # pallas_call takes pytrees, so each section of the kernel's signature is one argument.
    kernel = pl.pallas_call(
        functools.partial(tpu_kernel.kernel, static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(cores, rows // cores, -(-inputs.text_seen.shape[-1] // tile)),
            in_specs=[in_specs],
            out_specs=[Outputs(*(pl.BlockSpec((1, *a.shape[1:]), grid.row) for a in shapes))],
            scratch_shapes=[buffers, softmax],
        ),
        out_shape=[shapes],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=dispatch.interpreter() if static.interpret else False,
        name="gaze_decode",
    )

    def run(scalars: Scalars, inputs: Inputs) -> Outputs:
        if not static.interpret:
            # Never let the compiler fetch whole stacks into fast memory because they happen to fit.
            stacks = {name: getattr(inputs, name) for name in ("words", "text_k", "text_v")}
            hbm = {name: pltpu.with_memory_space_constraint(a, pltpu.HBM) for name, a in stacks.items()}
            inputs = inputs._replace(**hbm)
        (out,) = kernel(scalars, inputs)
        return out

    return _looped(run)(scalars, inputs)


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
) -> WithLse:
    """See :func:`pallas_kernels.gaze_decode.api.gaze_decode`.

    Raises:
      NotImplementedError: more regions are listed than scalar memory holds.
    """
    kv_heads, group, regions = text_k.shape[2], q.shape[1] // text_k.shape[2], visual_seen.shape[1]
    if regions == 0 or indices is None:
        _check_union(regions)
        listed = _everything(visual_seen, kv_heads, group)
    elif indices.shape[-1] == 0:
        listed = _everything(visual_seen[:, :0], kv_heads, group)
    else:
        listed = _listed(indices, visual_seen, kv_heads, group, spec=spec)
    return _attend(q, visual, text_k, text_v, layer, listed, text_seen, spec=spec)


def _attend(
    q: jax.Array,
    visual: Packed,
    text_k: jax.Array,
    text_v: jax.Array,
    layer: jax.Array,
    listed: Listed,
    text_seen: jax.Array,
    *,
    spec: GazeSpec,
) -> WithLse:
    """Attend to the regions of lists: ``ids`` int32 [B, K, 1, U] and ``side`` int32 [B, K, Y, U]."""
    if text_k.shape[3] == 0:  # an empty array has no tiles
        text_k, text_v = (jnp.pad(a, ((0, 0),) * 3 + ((0, 1), (0, 0))) for a in (text_k, text_v))
        text_seen = jnp.zeros((q.shape[0], 1), bool)
    batch, heads, dim = q.shape
    kv_heads, text = text_k.shape[2:4]
    rows, group = batch * kv_heads, heads // kv_heads
    word_rows = visual.words.shape[-3]
    region_bytes = word_rows * math.prod(visual.words.shape[-2:]) * visual.words.dtype.itemsize
    static = Static(
        kv_heads=kv_heads,
        chunk=regions_per_chunk(region_bytes, listed.ids.shape[-1] - 1),
        word_rows=word_rows,
        scale_rows=word_rows - visual.rows,
        slots=visual.slots,
        joint=visual.joint,
        compute=jnp.float32 if jnp.float32 in (q.dtype, text_k.dtype) else jnp.bfloat16,
        scale=spec.scale,
        interpret=spec.interpret,
    )
    text_q = q.reshape(rows, group, dim).astype(static.compute)
    if static.lanes_are_tokens:
        text_k, text_v = (jnp.swapaxes(a, 3, 4) for a in (text_k, text_v))
    tile = min(TEXT_TILE, text)
    # The last tile may reach behind the end of the stream, where memory holds anything.
    text_seen = jnp.pad(text_seen, ((0, 0), (0, -text % tile)))
    scalars = Scalars(jnp.asarray(layer, jnp.int32).reshape(1), _used_tiles(text_seen, tile))
    inputs = Inputs(
        ids=listed.ids,
        next_ids=listed.ids,
        side=listed.side,
        visual_q=jnp.pad(text_q, ((0, 0), (0, 0), (0, LANES - dim))),
        text_q=text_q,
        words=visual.words,
        text_k=text_k,
        text_v=text_v,
        text_seen=text_seen.astype(jnp.float32)[:, None],
    )
    out = _call(static, scalars, inputs, tile, q.dtype)
    return out.out.reshape(q.shape), out.lse[..., 0].reshape(batch, heads)


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
) -> Routed:
    """See :func:`pallas_kernels.gaze_decode.api.route_and_decode`.

    ``indices`` are made from the scores by operations of their own, which XLA drops where nobody reads them.

    Raises:
      NotImplementedError: more regions may be listed than scalar memory holds.
    """
    kept = (q, visual, text_k, text_v, layer)
    kv_heads, regions, selectors = text_k.shape[2], visual_seen.shape[1], q.shape[1]
    selectors = q.shape[1] if spec.select_per == "head" else kv_heads
    if regions == 0:
        listed = _everything(visual_seen, kv_heads, q.shape[1] // kv_heads)
        nothing = jnp.full((q.shape[0], selectors, capacity), -1, jnp.int32)
        scores = jnp.zeros((q.shape[0], selectors, 0), jnp.float32)
        return Routed(*_attend(*kept, listed, text_seen, spec=spec), nothing, scores)
    static = _selecting(kv_heads, q.shape[1] // kv_heads, regions, capacity, descriptors, spec)
    if features.dtype == jnp.float32:
        static = dataclasses.replace(static, compute=jnp.float32)
    place = jnp.zeros_like(order).at[jnp.arange(q.shape[0])[:, None], order].set(
        jnp.arange(regions, dtype=jnp.int32), unique_indices=True
    )
    inputs = tpu_select.Inputs(
        features=features,
        descriptors=jnp.swapaxes(descriptors, 3, 4) if static.lanes_are_regions else descriptors,
        places=_by_tile(jnp.where(visible, place, -1)[:, None], static.tile, -1),
        slots=_by_tile(_slot_bits(visual_seen), static.tile, 0),
    )
    scalars = tpu_select.Scalars(jnp.asarray(layer, jnp.int32).reshape(1), budget)

    def run(scalars: tpu_select.Scalars, inputs: tpu_select.Inputs) -> tuple[jax.Array, Listed]:
        if not spec.interpret:
            stack = pltpu.with_memory_space_constraint(inputs.descriptors, pltpu.HBM)
            inputs = inputs._replace(descriptors=stack)
        return tpu_select.route(static, scalars, inputs, _interpreter(spec))

    scores, listed = _looped(run)(scalars, inputs)
    scores = jnp.swapaxes(scores, 1, 2).reshape(q.shape[0], selectors, -1)[..., :regions]
    indices = _best_first(scores, visible, order, budget, capacity)
    return Routed(*_attend(*kept, listed, text_seen, spec=spec), indices, scores)


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
