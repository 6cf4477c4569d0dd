"""The Mosaic GPU kernels that choose a kv head's regions: the cut of each selection, and the list.

Both read the scores of ``gpu_scores.py`` by place, and ``ranks``, which say which places count: the rank of
the region by its first token, or -1.

Cut. As ``gaze_jax.core.routing.select_mask``: int32 keys in the order of the scores, and a search for the
least key that no more than the budget exceed, by counting; then one for the last of the equal keys, by rank.
It ends as soon as the count is the budget, and after 32 steps at the latest.

List. The bits of a kv head's query heads for 64 x W places at a time; how many selected places are before
each is a product with a triangular matrix, exact in float32. Regions are listed in the order of places.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gaze_decode.gpu_math import ROWS, Math, Operands, Ref, Refs, launch, swizzled
from pallas_kernels.gaze_decode.gpu_scores import TILE, moved, places, width

_HIDDEN = jnp.iinfo(jnp.int32).min
_NAN = _HIDDEN + 1
_NO_TIE = -2  # below the rank of what may not be selected
_MOST = 192 * 1024  # bytes of keys that stay in shared memory

Load = Callable[[jax.Array | int], tuple[jax.Array, jax.Array]]
"""Number of a tile -> its keys and ranks."""


def _keys(scores: jax.Array, ranks: jax.Array) -> jax.Array:
    """int32 keys in the order of the scores: hidden < NaN < -inf < ... < inf; -0.0 is 0.0."""
    # Of integers, the first choice of a `where` is an array: from it Mosaic GPU takes the sign of the result,
    # and from the condition, which has none, if it is a constant.
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    keys = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
    keys = jnp.where(scores == scores, keys, jnp.int32(_NAN))
    return jnp.where(ranks >= 0, keys, jnp.int32(_HIDDEN))


def _search(
    low: jax.Array, high: jax.Array, count: jax.Array, wanted: jax.Array, number: Callable, *, rising: bool
) -> tuple[jax.Array, jax.Array]:
    """The least value in (low, high] that fits, and its count; any earlier one whose count is ``wanted``.

    ``number(value)`` counts, and a value fits if its count is at most ``wanted``, or with ``rising`` at
    least. ``high`` fits and ``low`` does not.
    """

    def more(state: tuple[jax.Array, ...]) -> jax.Array:
        low, high, count = state
        return (low + 1 != high) & (count != wanted)

    def halve(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        low, high, count = state
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        found = number(middle)
        fits = found >= wanted if rising else found <= wanted
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high), jnp.where(fits, found, count)

    _, high, count = lax.while_loop(more, halve, (low, high, count))
    return high, count


def _cut(math: Math, load: Load, tile: int, tiles: int, budget: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The key above which regions are selected, and the last rank of those selected that have this key."""
    layout = math.flat(tile)
    ones = math.cast(jnp.ones((tile,), jnp.int32), layout)

    def total(value: Callable[[jax.Array, jax.Array], jax.Array], start: int, join: Callable) -> jax.Array:
        """Joins ``value`` of all keys and ranks, in registers over tiles."""
        if tiles == 1:
            return value(*load(0))
        first = math.cast(jnp.full((tile,), start, jnp.int32), layout)
        return lax.fori_loop(0, tiles, lambda t, kept: join(kept, value(*load(t))), first)

    def number(test: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        def one(keys: jax.Array, ranks: jax.Array) -> jax.Array:
            return jnp.where(test(keys, ranks), ones, jnp.int32(0))

        return jnp.sum(total(one, 0, jnp.add))

    visible = number(lambda keys, _: keys > _HIDDEN)
    wanted = jnp.maximum(jnp.minimum(budget, visible), 0)
    most = jnp.max(total(lambda keys, _: keys, _HIDDEN, jnp.maximum))
    # The least visible key, by the greatest of its complements; ~x is -x - 1, so it is one below.
    least = ~jnp.max(total(lambda keys, _: jnp.where(keys > _HIDDEN, ~keys, _HIDDEN), _HIDDEN, jnp.maximum))
    everything = wanted == visible
    cut, above = _search(
        jnp.where(everything, _HIDDEN, least - 1),
        jnp.where(everything, _HIDDEN, most),
        jnp.where(everything, wanted, 0),
        wanted,
        lambda middle: number(lambda keys, _: keys > middle),
        rising=False,
    )
    free = wanted - above
    last, _ = _search(
        jnp.int32(-1),
        jnp.where(free > 0, jnp.int32(tile * tiles), jnp.int32(_NO_TIE)),
        jnp.where(free > 0, jnp.int32(-1), free),
        free,
        lambda rank: number(lambda keys, ranks: (keys == cut) & (ranks <= rank)),
        rising=True,
    )
    return cut, last


def _loader(math: Math, scores: Ref, ranks: Ref, tile: int, kept: Ref | None) -> Load:
    """Reads tiles of keys; ``kept`` is int32 [places] of shared memory, in which they then are."""
    layout = math.flat(tile)

    def fresh(t: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        at = pl.ds(t * tile, tile)
        rank = math.load(ranks.at[at], layout)
        return _keys(math.load(scores.at[at], layout), rank), rank

    if kept is None:
        return fresh

    def keep(t: jax.Array, _: None = None) -> None:
        kept.at[pl.ds(t * tile, tile)][...] = fresh(t)[0]

    for t in range(scores.shape[-1] // tile):
        keep(jnp.int32(t))

    def load(t: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        at = pl.ds(t * tile, tile)
        return math.load(kept.at[at], layout), math.load(ranks.at[at], layout)

    return load


def _cut_of(
    math: Math, refs: Refs, scratch: Refs, regions: int, capacity: int, g: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """:func:`_cut` of one selection of this block's row and kv head."""
    b, h = lax.axis_index("batch"), lax.axis_index("kv")
    tile = 64 * width(regions)
    load = _loader(math, refs["scores"].at[b, h, g], refs["ranks"].at[b], tile, scratch.get("keys"))
    budget = jnp.minimum(refs["budget"][b], capacity)
    return _cut(math, load, tile, places(regions) // tile, budget)


def _cut_block(
    regions: int, capacity: int, math: Math, refs: Refs, outs: Sequence[Ref], scratch: Refs
) -> None:
    """One thread block: the cut of one query head."""
    b, h, g = (lax.axis_index(name) for name in ("batch", "kv", "head"))
    cut, last = _cut_of(math, refs, scratch, regions, capacity, g)
    outs[0][b, h, g, 0] = cut
    outs[0][b, h, g, 1] = last


def _list_block(
    regions: int,
    shift: int,
    capacity: int | None,
    math: Math,
    refs: Refs,
    outs: Sequence[Ref],
    scratch: Refs,
) -> None:
    """One thread block: the list of a row's kv head; with a capacity it also makes the one cut."""
    b, h = lax.axis_index("batch"), lax.axis_index("kv")
    marked = "rank_rows" not in refs
    if marked:
        cuts = [(jnp.int32(0), jnp.int32(_NO_TIE))] * refs["score_rows"].shape[2]
    elif capacity is not None:
        cuts = [_cut_of(math, refs, scratch, regions, capacity, 0)]
    else:
        cuts = [(refs["cuts"][b, h, g, 0], refs["cuts"][b, h, g, 1]) for g in range(refs["cuts"].shape[2])]
    columns = width(regions)
    shape, across = (ROWS, columns), (ROWS, ROWS)
    row, column = (math.iota(shape, axis, math.matrix) for axis in (0, 1))
    scratch["triangle"][...] = jnp.where(row <= column, 1.0, 0.0).astype(jnp.bfloat16)
    plgpu.commit_smem()
    triangle = scratch["triangle"].at[pl.ds(0, columns)]

    def tile(t: jax.Array, base: jax.Array) -> jax.Array:
        rows = pl.ds(t * ROWS, ROWS)
        rank = row if marked else math.load(refs["rank_rows"].at[b, rows], math.matrix)
        bits = jnp.zeros_like(rank)
        for g, (cut, last) in enumerate(cuts):
            keys = _keys(math.load(refs["score_rows"].at[b, h, g, rows], math.matrix), rank)
            chosen = (keys > cut) | ((keys == cut) & (rank <= last))
            bits = jnp.where(chosen, bits | jnp.int32(1 << g), bits)
        one = jnp.where(bits != 0, 1.0, 0.0)
        along = math.dot([(one.astype(jnp.bfloat16), triangle)], None, shape, transposed=False)
        sums = jnp.sum(one, axis=1)
        # The sums of all rows in every row: those above are added.
        scratch["sums"][...] = sums
        plgpu.commit_smem()
        everywhere = math.spread(math.load(scratch["sums"], math.by_column), across, 1, math.matrix)
        above = math.iota(across, 1, math.matrix) < math.iota(across, 0, math.matrix)
        above = jnp.sum(jnp.where(above, everywhere, 0.0), axis=1)
        place = (along + math.spread(above, shape, 0, math.matrix)).astype(jnp.int32) + (base - 1)
        place = jnp.where(bits != 0, place, -1)
        number = t * (ROWS * columns) + row * columns + column
        region = jnp.where(number >= regions + shift - TILE, number - shift, number) if shift else number
        math.scatter(outs[0].at[b, h], place, region)
        if len(outs) == 3:
            math.scatter(outs[1].at[b, h], place, bits)
        return base + jnp.sum(sums).astype(jnp.int32)

    outs[-1][b, h] = lax.fori_loop(0, places(regions) // (ROWS * columns), tile, jnp.int32(0))


class Listed(NamedTuple):
    """The regions that a kv head's query heads read, each listed once.

    Attributes:
      regions: int32 [B, K, U]; anything behind the first ``length``; -1 is no region.
      heads: int32 [B, K, U], bit g is set if query head g reads the region; None: all of them read all.
      length: int32 [B, K]; None: U.
    """

    regions: jax.Array
    heads: jax.Array | None
    length: jax.Array | None


def _kept(regions: int) -> dict[str, Any]:
    """Shared memory for the keys of all places, if it is large enough."""
    number = places(regions)
    return {"keys": plgpu.SMEM((number,), jnp.int32)} if number * 4 <= _MOST else {}


def _rows(a: jax.Array, regions: int) -> jax.Array:
    return a.reshape(*a.shape[:-1], -1, width(regions))


def _list(
    operands: Operands,
    sizes: tuple[int, int, int],
    shift: int,
    capacity: int | None,
    scratch: dict[str, Any],
    *,
    interpret: bool,
) -> Listed:
    """Run the kernel of the list; ``sizes`` are R, the number of lists, and U."""
    regions, lists, union = sizes
    batch, kv_heads = operands["score_rows"].shape[:2]
    columns = width(regions)
    made = jax.ShapeDtypeStruct((batch, kv_heads, union), jnp.int32)
    found = launch(
        "gaze_list",
        functools.partial(_list_block, regions, shift, capacity, Math(interpret)),
        operands,
        [*[made] * min(lists, 2), jax.ShapeDtypeStruct((batch, kv_heads), jnp.int32)],
        {"batch": batch, "kv": kv_heads},
        {
            "triangle": plgpu.SMEM((ROWS, columns), jnp.bfloat16, transforms=swizzled(columns)),
            "sums": plgpu.SMEM((ROWS,), jnp.float32),
            **scratch,
        },
        interpret=interpret,
        reduction=4 * ROWS * 4,
    )
    return Listed(found[0], found[1] if lists > 1 else None, found[-1])


def listed(
    scores: jax.Array,
    ranks: jax.Array,
    cuts: jax.Array | None,
    budget: jax.Array,
    regions: int,
    capacity: int,
    *,
    interpret: bool,
) -> Listed:
    """The list of each kv head, at most min(lists * J, R) long.

    Args:
      scores: float32 [B, K, lists, places], from :func:`scores`.
      ranks: int32 [B, places].
      cuts: int32 [B, K, G, 2] from :func:`cuts_of`; None: there is one list, whose cut is found here.
      budget: int32 [B].
      regions, capacity: R and J.
      interpret: see :class:`pallas_kernels.spec.GazeSpec`.
    """
    operands: Operands = {"score_rows": _rows(scores, regions), "rank_rows": _rows(ranks, regions)}
    if cuts is None:
        operands |= {"scores": scores, "ranks": ranks, "budget": budget}
    else:
        operands["cuts"] = cuts
    lists = 1 if cuts is None else cuts.shape[2]
    return _list(
        operands,
        (regions, lists, min(lists * capacity, regions)),
        moved(regions),
        capacity if cuts is None else None,
        _kept(regions) if cuts is None else {},
        interpret=interpret,
    )


def listed_marks(marks: jax.Array, regions: int, union: int, *, interpret: bool) -> Listed:
    """The list of the regions that are marked.

    Args:
      marks: float32 [B, K, lists, places], 1 for a region that a list has, else 0; by region.
      regions, union: R and U, at least the number of marked regions.
      interpret: see :class:`pallas_kernels.spec.GazeSpec`.
    """
    operands: Operands = {"score_rows": _rows(marks, regions)}
    return _list(operands, (regions, marks.shape[2], union), 0, None, {}, interpret=interpret)


def cuts_of(
    scores: jax.Array,
    ranks: jax.Array,
    budget: jax.Array,
    regions: int,
    group: int,
    capacity: int,
    *,
    interpret: bool,
) -> jax.Array:
    """int32 [B, K, G, 2]: the cut of each query head, a key and a rank; see the top of this file."""
    batch, kv_heads = scores.shape[:2]
    (found,) = launch(
        "gaze_cut",
        functools.partial(_cut_block, regions, capacity, Math(interpret)),
        {"scores": scores, "ranks": ranks, "budget": budget},
        [jax.ShapeDtypeStruct((batch, kv_heads, group, 2), jnp.int32)],
        {"batch": batch, "kv": kv_heads, "head": group},
        _kept(regions),
        interpret=interpret,
        reduction=128,
    )
    return found


def best_first(
    scores: jax.Array, visible: jax.Array, budget: jax.Array, order: jax.Array, capacity: int
) -> jax.Array:
    """int32 [B, Hs, J]: what the kernels select, best first, ties by rank, -1 in unused slots."""
    by_order = jnp.take_along_axis(scores, order[:, None], axis=-1)
    keys = _keys(by_order, jnp.where(jnp.take_along_axis(visible, order, axis=-1), 0, -1)[:, None])
    width = min(capacity, scores.shape[-1])
    keys, at = lax.top_k(keys, width)
    indices = jnp.take_along_axis(jnp.broadcast_to(order[:, None], scores.shape), at, axis=-1)
    kept = (keys > _HIDDEN) & (jnp.arange(width, dtype=jnp.int32) < budget[:, None, None])
    return jnp.pad(jnp.where(kept, indices, -1), ((0, 0), (0, 0), (0, capacity - width)), constant_values=-1)
