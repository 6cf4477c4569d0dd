"""gaze_prefill on TPU: a block's queries are gathered if few select it, else all attend under a mask.

Keys of both streams become one row of *blocks* of W tokens, visual ones first, so that one kernel and one
softmax serve both. With a selection a visual block holds as many whole regions (*cells*) as fit into 128
tokens; without one it holds plain tokens. This file lays out the arrays, lists for every block the queries
that visit it, and loops over tiles of queries; ``tpu_forward.py`` and ``tpu_backward.py`` attend.

Everything per (query, head) is in rows, with the heads of a kv head side by side. Sizes of the arrays made
here, per batch entry, besides copies of q, K and V:

    facts      512 B per row and 2,900 regions    T=1,024, H=32: 17 MB; at most one tile exists at a time
    table      1 bit per (kv head, block, unit)   T=1,024, R=1,024, K=8: 0.2 MB
    d K, d V   float32, summed in place           147,456 tokens, K=8, D=128: 1.4 GB, in the backward pass

D is padded to 128 lanes: D=64 costs twice the bytes of its keys and queries, and as much time of the matrix
unit as D=128.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import needs
from pallas_kernels.gaze_prefill import tpu_backward, tpu_common, tpu_forward
from pallas_kernels.gaze_prefill.tpu_common import LANES, Plan
from pallas_kernels.softmax import WithLse
from pallas_kernels.spec import GazeSpec, KeyPlaces, Windows

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes that change only speed and rounding. Reasoned, not tuned: see docs/kernels.md.

    Attributes:
      queries, rows: maximum number of queries of a tile, and of rows (queries times heads of a group).
      chunk: rows that the direct path multiplies together.
      visits: units (of 8 rows) that the gathered path multiplies together.
      keys: tokens of a block with a selection; a block is whole regions, at least one.
      open_keys: tokens of a block without a selection.
      gather_below: a block is gathered if less than this share of the tile's units visit it: copying a
        unit there and back is estimated at three times the cost of attending with it.
    """

    queries: int = 1024
    rows: int = 8192
    chunk: int = 512
    visits: int = 32
    keys: int = 128
    open_keys: int = 512
    gather_below: float = 0.25


TILES = Tiles()


def supports(spec: GazeSpec) -> str | None:
    """None on a TPU or in the interpreter, for every spec; otherwise the reason why not."""
    return needs("tpu", spec)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _pad(a: Array, axis: int, size: int, value: int = 0) -> Array:
    """``a`` with ``axis`` grown to ``size``."""
    width = [(0, 0)] * a.ndim
    width[axis] = (0, size - a.shape[axis])
    return jnp.pad(a, width, constant_values=value)


def _plan(
    spec: GazeSpec, tiles: Tiles, length: int, group: int, sizes: tuple[int, int, int], routed: bool
) -> tuple[Plan, int]:
    """Static sizes, and how many tiles ``length`` queries make; ``sizes`` are R, P and S."""
    regions, slots, text = sizes
    if routed:
        cells = max(1, min(tiles.keys // slots, regions, 32))
        # Round regions up to whole registers if as many still fit: 36 tokens take 40, and XLA moves no row.
        whole = _up(slots, tpu_common.SUBLANES)
        cell = whole if cells * whole <= max(tiles.keys, whole) else slots
        width = max(cells * cell, min(text, tiles.keys))
    else:
        width = max(1, min(max(regions * slots, text), tiles.open_keys))
    width = _up(width, 16 if width <= LANES else LANES)
    if not routed:
        cells, cell = 1, width
    visual_blocks = -(-regions // cells) if routed else -(-regions * slots // width)
    if routed and tpu_common.SUBLANES % group:
        group = _up(group, tpu_common.SUBLANES)
    # Sixteen queries are whole registers of every dtype, whatever the group.
    few = _up(max(1, min(tiles.chunk // group, spec.query_block, length)), 16)
    most = max(1, min(tiles.queries, tiles.rows // group) // few)
    tile_count = -(-length // (most * few))
    tile = _up(-(-length // tile_count), few)
    unit = max(group, tpu_common.SUBLANES)
    visits = max(1, min(tiles.visits, spec.query_block * group // unit, tile * group // unit))
    plan = Plan(
        scale=spec.scale,
        interpret=spec.interpret,
        routed=routed,
        blocks=max(1, visual_blocks + -(-text // width)),
        visual_blocks=visual_blocks,
        width=width,
        cell=cell,
        cells=cells,
        tile=tile,
        group=group,
        unit=unit,
        chunk=few * group,
        visits=visits,
    )
    return plan, tile_count


def _blocks(plan: Plan, visual: Array, text: Array, axis: int, empty: int) -> Array:
    """Tokens of both streams, R and P on ``axis`` and the next, S on ``axis``, as blocks N, W on them.

    Where there is no token the value is ``empty``.
    """
    lead, tail = visual.shape[:axis], visual.shape[axis + 2 :]
    text_blocks = plan.blocks - plan.visual_blocks
    if plan.routed:
        visual = _pad(visual, axis + 1, plan.cell, empty)
        visual = _pad(visual, axis, plan.visual_blocks * plan.cells, empty)
    else:
        visual = visual.reshape(*lead, visual.shape[axis] * visual.shape[axis + 1], *tail)
        visual = _pad(visual, axis, plan.visual_blocks * plan.width, empty)
    visual = visual.reshape(*lead, plan.visual_blocks, plan.cells * plan.cell, *tail)
    visual = _pad(visual, axis + 1, plan.width, empty)
    text = _pad(text, axis, text_blocks * plan.width, empty)
    return jnp.concatenate([visual, text.reshape(*lead, text_blocks, plan.width, *tail)], axis=axis)


def _key_blocks(plan: Plan, visual: Array, text: Array) -> tuple[Array, Array]:
    """K or V of both streams, [B, K, R, P, D] and [B, K, S, D], as blocks.

    Returns:
      [B, K, N * W, D to whole lanes], 0 for tokens that are not finite; and bool [B, K, N, W], which tokens
      are finite. 0 * NaN is NaN, so unseen tokens must not reach a matmul. A query that does see such a token
      gets its NaN through the logits.
    """
    batch, kv_heads, _, _, dim = visual.shape
    blocks = _blocks(plan, visual, text, 2, 0)
    finite = jnp.isfinite(blocks).all(-1)
    blocks = jnp.where(finite[..., None], blocks, jnp.zeros((), blocks.dtype))
    return _pad(blocks.reshape(batch, kv_heads, -1, dim), 3, _up(dim, LANES)), finite


def _key_places(plan: Plan, places: KeyPlaces, finite: Array) -> Array:
    """int32 [B, K, N, 8, W]: order, segment, cell and poison of every token; order -1 where there is none."""
    order = _blocks(plan, places.visual_order, places.text_order, 1, -1)
    segment = jnp.broadcast_to(places.region_segment[:, :, None], places.visual_order.shape)
    segment = _blocks(plan, segment, places.text_segment, 1, -1)
    cell = jnp.minimum(jnp.arange(plan.width, dtype=jnp.int32) // plan.cell, plan.cells - 1)
    poison = jnp.where(finite, jnp.float32(0), jnp.float32(jnp.nan))
    rows = [jnp.broadcast_to(a, finite.shape) for a in (order[:, None], segment[:, None], cell)]
    rows.append(jax.lax.bitcast_convert_type(poison, jnp.int32))
    return _pad(jnp.stack(rows, axis=3), 3, tpu_common.PLACES)


def _near(windows: dict[str, Array], stream: str, order: Array, segment: Array) -> Array:
    """bool [B, X, T]: whether query t may see a token of [B, X, tokens]; False only if it sees none."""
    big = jnp.int32(2**30)
    real = order >= 0
    lo, hi = jnp.where(real, order, big).min(-1), order.max(-1)
    first, last = jnp.where(real, segment, big).min(-1), jnp.where(real, segment, -1).max(-1)

    def query(name: str) -> Array:
        return windows[name][:, None, :]

    near = (query(f"{stream}_lo") <= hi[:, :, None]) & (query(f"{stream}_hi") >= lo[:, :, None])
    return near & (query("segment") >= first[:, :, None]) & (query("segment") <= last[:, :, None])


def _pack_bits(a: Array, axis: int) -> Array:
    """Pack 32 bools of ``a`` along ``axis`` into each int32, the first in the lowest bit."""
    lead, tail = a.shape[:axis], a.shape[axis + 1 :]
    one = jnp.left_shift(jnp.uint32(1), jnp.arange(32, dtype=jnp.uint32)).reshape(32, *[1] * len(tail))
    words = jnp.where(a.reshape(*lead, -1, 32, *tail), one, jnp.uint32(0))
    return jax.lax.bitcast_convert_type(words.sum(axis + 1, dtype=jnp.uint32), jnp.int32)


def _table(plan: Plan, tiles: Tiles, places: Array, windows: dict[str, Array], opened: Array | None) -> Array:
    """int32 [B, K, N, 1, 1 + words]: how the tile treats a block, and the units that visit it.

    Args:
      plan, tiles: static sizes.
      places: int32 [B, K, N, 8, W].
      windows: int32 [B, tile] each.
      opened: bool [B, K, Gs, NV, C, tile], or None without a selection.
    """
    batch, kv_heads = places.shape[:2]
    order, segment = places[:, 0, :, tpu_common.ORDER], places[:, 0, :, tpu_common.SEGMENT_OF]
    visual = plan.visual_blocks
    text_seen = _near(windows, "text", order[:, visual:], segment[:, visual:]).any(2)

    def action(seen: Array) -> Array:
        act = jnp.where(seen, tpu_common.DIRECT, tpu_common.SKIP).astype(jnp.int32)
        return jnp.broadcast_to(act[:, None], (batch, kv_heads, act.shape[1]))

    if opened is None:
        seen = _near(windows, "visual", order[:, :visual], segment[:, :visual]).any(2)
        return jnp.concatenate([action(seen), action(text_seen)], axis=2)[:, :, :, None, None]

    tokens = (batch, visual * plan.cells, plan.cell)
    by_cell = [a[:, :visual, : plan.cells * plan.cell].reshape(tokens) for a in (order, segment)]
    near = _near(windows, "visual", *by_cell).reshape(batch, 1, 1, visual, plan.cells, plan.tile)
    visits = (opened & near).any((2, 4))  # [B, K, NV, tile]
    per_unit = plan.unit // plan.group
    visits = functools.reduce(jnp.logical_or, [visits[..., i::per_unit] for i in range(per_unit)])
    count = visits.sum(-1, dtype=jnp.int32)
    few = count < max(1, round(tiles.gather_below * visits.shape[-1]))
    acts = jnp.where(count == 0, tpu_common.SKIP, jnp.where(few, tpu_common.GATHER, tpu_common.DIRECT))
    acts = jnp.concatenate([acts.astype(jnp.int32), action(text_seen)], axis=2)
    words = _pad(_pack_bits(_pad(visits, 3, plan.words * 32), 3), 2, plan.blocks)
    return jnp.concatenate([acts[..., None], words], axis=3)[:, :, :, None, :]


def _facts(
    plan: Plan, windows: dict[str, Array], opened: Array | None, numbers: tuple[Array, ...] = ()
) -> Array:
    """int32 [B, K or 1, rows, registers * 128]: what each row may see; see ``tpu_common.py``.

    Args:
      plan: static sizes.
      windows: int32 [B, tile] each.
      opened: bool [B, K, Gs, NV, C, tile], or None without a selection.
      numbers: float32 [B, K, rows] log-sum-exp and delta, for the backward pass.
    """
    lanes = [windows[name] for name in ("visual_lo", "visual_hi", "text_lo", "text_hi", "segment")]
    # Without a selection and without the backward pass's numbers, all kv heads share the facts.
    heads = next((a.shape[1] for a in (opened, *numbers) if a is not None), 1)
    by_row = (lanes[0].shape[0], heads, plan.tile, plan.group)
    columns = [jnp.broadcast_to(a[:, None, :, None], by_row) for a in lanes]
    columns += [jax.lax.bitcast_convert_type(a, jnp.int32).reshape(by_row) for a in numbers]
    front = _pad(jnp.stack(columns, axis=-1), 4, tpu_common.WORDS)[..., None, :]
    front = jnp.broadcast_to(front, (*by_row, plan.registers, tpu_common.WORDS))
    if opened is None:
        words = jnp.zeros((*by_row, plan.registers, tpu_common.WORD_LANES), jnp.int32)
    else:
        # Queries stay on the last axis until the bits are words: a region's few cells would waste lanes.
        bits = _pad(_pad(opened, 4, plan.bits), 3, _up(plan.visual_blocks, 32 // plan.bits))
        bits = _pack_bits(bits.reshape(*bits.shape[:3], -1, plan.tile), 3)
        bits = _pad(bits, 3, plan.registers * tpu_common.WORD_LANES)
        bits = jnp.moveaxis(bits, (2, 4), (3, 2))  # [B, K, tile, Gs, words]
        bits = jnp.broadcast_to(bits, (*by_row, bits.shape[4])) if bits.shape[3] == 1 else bits
        words = _pad(bits, 3, plan.group).reshape(*by_row, plan.registers, tpu_common.WORD_LANES)
    facts = jnp.concatenate([front, words], axis=-1)
    return facts.reshape(*by_row[:2], plan.rows, plan.registers * LANES)


def _tiled(a: Array, count: int, tile: int, value: int = 0) -> Array:
    """[B, T, ...] as [count, B, tile, ...]."""
    a = _pad(a, 1, count * tile, value)
    return jnp.moveaxis(a.reshape(a.shape[0], count, tile, *a.shape[2:]), 1, 0)


def _tile_arrays(
    plan: Plan, tiles: Tiles, places: Array, queries: "Queries", *numbers: Array
) -> tuple[Array, Array]:
    """Table and facts of one tile of queries."""
    windows, opened = queries
    if opened is not None:  # [B, tile, K, Gs, R] as [B, K, Gs, NV, C, tile]
        opened = _pad(jnp.moveaxis(opened, 1, 4), 3, plan.visual_blocks * plan.cells)
        opened = opened.reshape(*opened.shape[:3], plan.visual_blocks, plan.cells, plan.tile)
    return _table(plan, tiles, places, windows, opened), _facts(plan, windows, opened, numbers)


Queries = tuple[dict[str, Array], Array | None]
_Residuals = tuple[Array, Array, Array, Array, Queries, Array, Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    plan: Plan, tiles: Tiles, q: Array, k: Array, v: Array, places: Array, queries: Queries
) -> WithLse:
    """Attention of all tiles.

    Args:
      plan, tiles: static sizes.
      q: [tiles, B, K, rows, D].
      k, v: [B, K, N * W, D].
      places: int32 [B, K, N, 8, W].
      queries: windows int32 [tiles, B, tile] each, and the open regions: bool [tiles, B, tile, K, Gs, R] or
        None.

    Returns:
      [tiles, B, K, rows, D] in ``q.dtype``, and the log-sum-exp of the logits, float32 [tiles, B, K, rows]; a
      large negative number where a row sees nothing.
    """
    return _forward(plan, tiles, q, k, v, places, queries)[0]


def _movable(plan: Plan, a: Array) -> Array:
    """Convert rows that are gathered to float32: narrower rows share registers with the next unit's."""
    return a.astype(jnp.float32) if plan.routed else a


def _forward(
    plan: Plan, tiles: Tiles, q: Array, k: Array, v: Array, places: Array, queries: Queries
) -> tuple[WithLse, _Residuals]:
    def one(xs: tuple[Array, Queries]) -> tuple[Array, Array]:
        table, facts = _tile_arrays(plan, tiles, places, xs[1])
        inputs = tpu_forward.Inputs(table, places, _movable(plan, xs[0]), facts, k, v)
        out, lse = tpu_forward.forward(plan, inputs)
        return out.astype(q.dtype), lse

    out, lse = jax.lax.map(one, (q, queries))
    return (out, lse), (q, k, v, places, queries, out, lse)


def _backward(
    plan: Plan, tiles: Tiles, residuals: _Residuals, cotangents: WithLse
) -> tuple[Array, Array, Array, None, None]:
    q, k, v, places, queries, out, lse = residuals

    def one(
        sums: tuple[Array, Array], xs: tuple[Array, Queries, Array, Array, Array, Array]
    ) -> tuple[tuple[Array, Array], Array]:
        q, queries, out, lse, d_out, d_lse = xs
        # d logit = weight * (d weight - delta), and the log-sum-exp adds weight * d_lse.
        delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
        table, facts = _tile_arrays(plan, tiles, places, queries, lse, delta)
        q_rows, d_rows = _movable(plan, q), _movable(plan, d_out)
        inputs = tpu_backward.Inputs(table, places, q_rows, d_rows, facts, k, v, *sums)
        d_q, d_k, d_v = tpu_backward.backward(plan, inputs)
        return (d_k, d_v), d_q.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(one, (zeros, zeros), (q, queries, out, lse, *cotangents))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_attend.defvjp(_forward, _backward)


def gaze_prefill(
    q: Array,
    visual_k: Array,
    visual_v: Array,
    text_k: Array,
    text_v: Array,
    queries: Windows,
    places: KeyPlaces,
    selected: Array | None,
    *,
    spec: GazeSpec,
) -> WithLse:
    """See :func:`pallas_kernels.gaze_prefill.api.gaze_prefill`.

    A query that sees a key or value with a component that is not finite outputs NaN in all components.
    ``spec.query_block`` bounds the queries whose logits exist at once, rounded up to 16.
    """
    batch, length, heads, dim = q.shape
    kv_heads, regions, slots = visual_k.shape[1:4]
    group = heads // kv_heads
    if regions * slots == 0:
        selected = None
    routed = selected is not None
    tiles = TILES
    plan, count = _plan(spec, tiles, length, group, (regions, slots, text_k.shape[2]), routed)

    rows = _tiled(_pad(q, 3, _up(dim, LANES)), count, plan.tile)
    rows = _pad(rows.reshape(*rows.shape[:3], kv_heads, group, -1), 4, plan.group)
    rows = jnp.moveaxis(rows, 3, 2).reshape(count, batch, kv_heads, plan.rows, -1)

    sees = queries.segment >= 0
    windows = {"segment": _tiled(queries.segment, count, plan.tile, -1)}
    for name in ("visual", "text"):
        lo, hi = getattr(queries, f"{name}_lo"), getattr(queries, f"{name}_hi")
        # Order -1 is never a token, so windows start at 0; a query without a segment has an empty window.
        lo, hi = jnp.where(sees, jnp.maximum(lo, 0), 2**30), jnp.where(sees, hi, -1)
        windows[f"{name}_lo"] = _tiled(lo, count, plan.tile, 2**30)
        windows[f"{name}_hi"] = _tiled(hi, count, plan.tile, -1)
    opened = None
    if selected is not None:
        opened = selected | ~queries.routed[:, :, None, None]
        opened = _tiled(opened.reshape(batch, length, kv_heads, -1, regions), count, plan.tile)

    k, finite_k = _key_blocks(plan, visual_k, text_k)
    v, finite_v = _key_blocks(plan, visual_v, text_v)
    keys = _key_places(plan, places, finite_k & finite_v)
    out, lse = _attend(plan, tiles, rows, k, v, keys, (windows, opened))

    def by_query(a: Array) -> Array:
        """[tiles, B, K, rows, X] to [B, T, H, X]."""
        a = jnp.moveaxis(a.reshape(count, batch, kv_heads, plan.tile, plan.group, -1), 2, 3)[..., :group, :]
        return jnp.moveaxis(a, 0, 1).reshape(batch, count * plan.tile, heads, -1)[:, :length]

    lse = by_query(lse)[..., 0]
    return by_query(out)[..., :dim], jnp.where(lse <= 0.5 * tpu_common.NEVER, -jnp.inf, lse)
