"""gaze_decode for TPUs: a Pallas Mosaic kernel that copies selected regions and nothing else.

This file lists the regions that each kv head reads, builds the other arguments of the kernel, and calls it.
``tpu_kernel.py`` is the kernel; ``tpu_layout.py`` says how the visual cache is stored.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.gaze_decode import plan, tpu_kernel, tpu_layout
from pallas_kernels.gaze_decode.tpu_kernel import Inputs, Outputs, Scalar, Scalars, Static
from pallas_kernels.gaze_decode.tpu_layout import LANES, Packed
from pallas_kernels.softmax import WithLse
from pallas_kernels.spec import GazeSpec

# XLA stores a text stream of another size in a layout of its own, and copies it for the kernel.
TEXT_MULTIPLE = 128
TEXT_TILE = 512  # keys of the text stream per grid step
CHUNK_BYTES = 512 * 1024  # of regions in flight: two such buffers cover a copy's latency

MAX_UNION = 32_000  # region numbers of a row and of the next one, double-buffered, in 1 MB of scalar memory

pack = tpu_layout.pack
unpack = tpu_layout.unpack
reserve = tpu_layout.reserve
write = tpu_layout.write


def supports(spec: GazeSpec) -> str | None:
    """None on a TPU or in the interpreter, for every spec; otherwise the reason why not."""
    return dispatch.needs("tpu", spec)


def regions_per_chunk(region_bytes: int, union: int) -> int:
    """C: a multiple of 8, so that the word rows of a chunk fill whole registers, and no larger than useful.

    Args:
      region_bytes: bytes of one region's keys and values.
      union: U, the most regions that a kv head lists.
    """
    wanted = min(max(CHUNK_BYTES // region_bytes, 8), 64, union + 7)
    return max(8, wanted // 8 * 8)


def _side(visual: Packed, listed: plan.Union, seen: jax.Array, layer: jax.Array, chunk: int) -> jax.Array:
    """Head bits and scales of the keys of every chunk; the ``side`` input of the kernel.

    Args:
      visual: packed cache of all layers.
      listed: the regions of every kv head.
      seen: bool [B, R, P] slots that count.
      layer: int32 scalar.
      chunk: C.

    Returns:
      float32 [B * K, chunks, 1 or 3, N]: per key the bits of the heads that read it and, for an int8 cache,
      the scales of K and V.
    """
    batch, kv_heads, _ = listed.regions.shape
    # An empty array cannot be indexed, so a cache without regions gets one that no query sees.
    seen = jnp.pad(seen, ((0, 0), (0, max(0, 1 - seen.shape[1])), (0, 0)))
    b = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    at = jnp.maximum(listed.regions, 0)
    counts = seen[b, at] & (listed.regions >= 0)[..., None]
    rows = [jnp.where(counts, listed.heads[..., None], 0).astype(jnp.float32)]
    if visual.scaled:
        h = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
        scales = tpu_layout.scales_of(visual.words[layer, b, h, at, visual.rows :], visual.slots)
        rows += [jnp.where(counts, scale, 0.0) for scale in scales]
    side = jnp.stack(rows, axis=2)  # [B, K, 1 or 3, U, P]
    chunks = -(-listed.regions.shape[-1] // chunk)
    pad = [(0, 0)] * 3 + [(0, chunks * chunk - listed.regions.shape[-1]), (0, 0)]
    side = jnp.pad(side, pad).reshape(batch * kv_heads, len(rows), chunks, chunk, -1)
    return jnp.swapaxes(tpu_layout.by_row(visual, side), 1, 2)


def _listed(indices: jax.Array | None, batch: int, kv_heads: int, group: int, regions: int) -> plan.Union:
    """The regions of every kv head, at least one entry wide.

    Raises:
      NotImplementedError: there are more than :data:`MAX_UNION`.
    """
    if indices is None or regions == 0:
        listed = plan.everything(batch, kv_heads, group, regions)
    else:
        listed = plan.union(indices, kv_heads, group, regions)
    if listed.regions.shape[-1] == 0:
        # An empty array cannot be copied from. Nothing is copied from this one: its count is 0.
        none = jnp.full((batch, kv_heads, 1), -1, jnp.int32)
        listed = plan.Union(none, jnp.zeros_like(none), listed.count)
    if listed.regions.shape[-1] > MAX_UNION:
        raise NotImplementedError(
            f"gaze_decode implementation 'tpu' lists at most {MAX_UNION} regions per kv head in scalar "
            f"memory, not {listed.regions.shape[-1]}; choose a smaller capacity or larger regions."
        )
    return listed


def _used_tiles(text_seen: jax.Array, tile: int) -> jax.Array:
    """int32 [B]: tiles of the text stream up to the last key that counts."""
    place = jnp.arange(1, text_seen.shape[-1] + 1, dtype=jnp.int32)
    last = jnp.max(jnp.where(text_seen, place, 0), axis=-1)
    return (last + tile - 1) // tile


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

    def next_row(
        self, core: jax.Array, inner: jax.Array, tile: jax.Array, scalars: Scalars
    ) -> tuple[Scalar, ...]:
        """Block of the core's next row, for [B * K, ...]. For the last row it is the last row itself."""
        return core * self.per_core + jnp.minimum(inner + 1, self.per_core - 1), 0, 0

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


def _call(static: Static, scalars: Scalars, inputs: Inputs, tile: int) -> Outputs:
    """Run the kernel.

    Args:
      static: static arguments of the kernel.
      scalars: as in the kernel.
      inputs: whole arrays, where the kernel sees blocks of them: ``ids`` and ``next_ids``
        [B * K, 1, chunks * C], ``visual_q`` [B * K, G, 128], ``text_q`` [B * K, G, D], ``text_k`` and
        ``text_v`` [L, B, K, S, D], or [L, B, K, D, S] if lanes are tokens, and ``text_seen`` [B, 1, S].
      tile: E, keys of the text stream per grid step; at most S.

    Returns:
      ``visual`` and ``lse`` float32 [B * K, G, 128] and ``text`` float32 [B * K, G, D].
    """
    rows, group, dim = inputs.text_q.shape
    places = inputs.words.shape[-2]
    cores = 2 if rows % 2 == 0 else 1  # chips with two TensorCores per device split the first axis
    grid = _Grid(static.kv_heads, rows // cores, static.lanes_are_tokens)
    ids = functools.partial(pl.BlockSpec, (1, 1, inputs.ids.shape[-1]), memory_space=pltpu.SMEM)
    text = pl.BlockSpec((1, 1, 1, *((dim, tile) if static.lanes_are_tokens else (tile, dim))), grid.text_keys)
    in_specs = Inputs(
        ids=ids(grid.row),
        next_ids=ids(grid.next_row),
        visual_q=pl.BlockSpec((1, group, LANES), grid.row),
        text_q=pl.BlockSpec((1, group, dim), grid.row),
        words=pl.BlockSpec(memory_space=pl.ANY),
        side=pl.BlockSpec(memory_space=pl.ANY),
        text_k=text,
        text_v=text,
        text_seen=pl.BlockSpec((1, 1, tile), grid.text_seen),
    )
    widths = (LANES, dim, LANES)
    out_specs = Outputs(*(pl.BlockSpec((1, group, width), grid.row) for width in widths))
    buffers = tpu_kernel.Buffers(
        words=pltpu.VMEM((2, static.chunk * static.word_rows, places, LANES), inputs.words.dtype),
        side=pltpu.VMEM((2, *inputs.side.shape[2:]), jnp.float32),
        first=pltpu.SMEM((1,), jnp.int32),
        words_copied=pltpu.SemaphoreType.DMA((2,)),
        side_copied=pltpu.SemaphoreType.DMA((2,)),
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
            out_specs=[out_specs],
            scratch_shapes=[buffers, softmax],
        ),
        out_shape=[Outputs(*(jax.ShapeDtypeStruct((rows, group, width), jnp.float32) for width in widths))],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=dispatch.interpreter() if static.interpret else False,
        name="gaze_decode",
    )

    # Pallas has no batching rule for arrays that the kernel copies itself. In this loop over the mapped axis,
    # a mapped cache is copied once per call.
    @jax.custom_batching.sequential_vmap
    def run(scalars: Scalars, inputs: Inputs) -> Outputs:
        if not static.interpret:
            # Never let the compiler fetch whole stacks into fast memory because they happen to fit.
            stacks = {name: getattr(inputs, name) for name in ("words", "text_k", "text_v")}
            hbm = {name: pltpu.with_memory_space_constraint(a, pltpu.HBM) for name, a in stacks.items()}
            inputs = inputs._replace(**hbm)
        (out,) = kernel(scalars, inputs)
        return out

    return run(scalars, inputs)


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
    if text_k.shape[3] == 0:  # an empty array has no tiles
        text_k, text_v = (jnp.pad(a, ((0, 0),) * 3 + ((0, 1), (0, 0))) for a in (text_k, text_v))
        text_seen = jnp.zeros((q.shape[0], 1), bool)
    batch, heads, dim = q.shape
    kv_heads, text = text_k.shape[2:4]
    rows, group = batch * kv_heads, heads // kv_heads
    listed = _listed(indices, batch, kv_heads, group, visual_seen.shape[1])
    region_bytes = visual.rows * math.prod(visual.words.shape[-2:]) * visual.words.dtype.itemsize
    static = Static(
        kv_heads=kv_heads,
        chunk=regions_per_chunk(region_bytes, listed.regions.shape[-1]),
        word_rows=visual.rows,
        joint=visual.joint,
        compute=jnp.float32 if jnp.float32 in (q.dtype, text_k.dtype) else jnp.bfloat16,
        scale=spec.scale,
        interpret=spec.interpret,
    )
    side = _side(visual, listed, visual_seen, layer, static.chunk)
    ids = listed.regions.reshape(rows, 1, -1)
    ids = jnp.pad(
        ids, ((0, 0), (0, 0), (0, side.shape[1] * static.chunk - ids.shape[-1])), constant_values=-1
    )
    text_q = q.reshape(rows, group, dim).astype(static.compute)
    if static.lanes_are_tokens:
        text_k, text_v = (jnp.swapaxes(a, 3, 4) for a in (text_k, text_v))
    tile = min(TEXT_TILE, text)
    # The last tile may reach behind the end of the stream, where memory holds anything.
    text_seen = jnp.pad(text_seen, ((0, 0), (0, -text % tile)))
    tiles = _used_tiles(text_seen, tile)
    scalars = Scalars(jnp.asarray(layer, jnp.int32).reshape(1), listed.count.reshape(rows), tiles)
    inputs = Inputs(
        ids=ids,
        next_ids=ids,
        visual_q=jnp.pad(text_q, ((0, 0), (0, 0), (0, LANES - dim))),
        text_q=text_q,
        words=visual.words,
        side=side,
        text_k=text_k,
        text_v=text_v,
        text_seen=text_seen.astype(jnp.float32)[:, None],
    )
    out = _call(static, scalars, inputs, tile)
    first = LANES // 2 if visual.joint else 0
    heads_out = (out.visual[..., first : first + dim] + out.text).reshape(q.shape).astype(q.dtype)
    return heads_out, out.lse[..., 0].reshape(batch, heads)
