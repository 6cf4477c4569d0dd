"""gaze_decode for TPUs: a Pallas Mosaic kernel that copies selected regions and nothing else.

This file prepares the arguments of the kernel and calls it. ``tpu_lists.py``, with the kernels in
``tpu_select.py``, lists the regions that each kv head reads; ``tpu_kernel.py`` and ``tpu_keys.py`` attend to
them; ``tpu_layout.py`` says how the visual cache is stored.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.gaze_decode import tpu_kernel, tpu_layout, tpu_lists, tuning
from pallas_kernels.gaze_decode.routed import Routed
from pallas_kernels.gaze_decode.tpu_kernel import Inputs, Outputs, Scalar, Scalars
from pallas_kernels.gaze_decode.tpu_keys import Static
from pallas_kernels.gaze_decode.tpu_layout import LANES, Packed
from pallas_kernels.gaze_decode.tpu_select import Listed
from pallas_kernels.softmax import WithLse
from pallas_kernels.spec import GazeSpec

# XLA stores a text stream of another size in a layout of its own, and copies it for the kernel.
TEXT_MULTIPLE = 128

pack = tpu_layout.pack
unpack = tpu_layout.unpack
reserve = tpu_layout.reserve
write = tpu_layout.write


def supports(spec: GazeSpec) -> str | None:
    """None on a TPU or in the interpreter, for every spec; otherwise the reason why not."""
    return dispatch.needs("tpu", spec)


def regions_per_chunk(region_bytes: int, union: int, chunk_bytes: int) -> int:
    """C: a power of two from 8 to 64, about ``chunk_bytes``, and no larger than useful.

    Args:
      region_bytes: bytes of one region's keys and values.
      union: U, the most regions that a kv head lists.
      chunk_bytes: bytes of regions in flight; two such buffers shall cover a copy's latency.
    """
    wanted = min(chunk_bytes * 5 // 4 // region_bytes, 64)
    chunk = 8
    while chunk * 2 <= wanted and chunk < union:
        chunk *= 2
    return chunk


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

    return tpu_lists.looped(run)(scalars, inputs)


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
    kv_heads, group = text_k.shape[2], q.shape[1] // text_k.shape[2]
    if visual_seen.shape[1] == 0 or indices is None:
        listed = tpu_lists.everything(visual_seen, kv_heads, group)
    elif indices.shape[-1] == 0:
        listed = tpu_lists.everything(visual_seen[:, :0], kv_heads, group)
    else:
        listed = tpu_lists.named_by(indices, visual_seen, kv_heads, group, spec=spec)
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
    # In bytes of regions, and in keys of the text stream per grid step.
    sizes = tuning.sizes("tpu", visual.words.dtype)
    static = Static(
        kv_heads=kv_heads,
        chunk=regions_per_chunk(region_bytes, listed.ids.shape[-1] - 1, sizes["chunk_bytes"]),
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
    tile = min(sizes["text_tile"], text)
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

    Raises:
      NotImplementedError: more regions may be listed than scalar memory holds.
    """
    kv_heads = text_k.shape[2]
    if visual_seen.shape[1] == 0:
        listed = tpu_lists.everything(visual_seen, kv_heads, q.shape[1] // kv_heads)
        lead = (q.shape[0], q.shape[1] if spec.select_per == "head" else kv_heads)
        indices = jnp.full((*lead, capacity), -1, jnp.int32)
        scores = jnp.zeros((*lead, 0), jnp.float32)
    else:
        selecting = (features, descriptors, layer, budget, visible, order, visual_seen)
        listed, indices, scores = tpu_lists.selected(*selecting, capacity=capacity, spec=spec)
    out, lse = _attend(q, visual, text_k, text_v, layer, listed, text_seen, spec=spec)
    return Routed(out, lse, indices, scores)
