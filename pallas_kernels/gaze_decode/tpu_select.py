"""Mosaic TPU kernels that make the lists of regions for ``tpu_kernel.py``; ``tpu.py`` calls them.

:func:`route_kernel` scores all regions of a sequence, finds each query's Top-K, joins the selections of a kv
head's query heads, and writes them as a list in storage order. :func:`list_kernel` makes such a list of
selections that are given. Neither sorts.

Regions lie along the lanes, in tiles, and selectors or kv heads along the sublanes, so that all of them are
selected at once. The K-th key is found two bits at a time: a pass counts, for three candidates, the keys that
reach them. A list is made by moving every listed region to the left by the number of regions before it that
are not listed: by 1, then 2, then 4 ... places, as the bits of that number say. No two ever meet.

Axis letters besides B, K, G, H, L and R: E width of a descriptor, Hs selectors (H, or K), T regions per tile,
N tiles, K8 kv heads rounded up to 8 sublanes, Y = 1 + words that tell which slots of a region count.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.gaze_decode.tpu_layout import LANES, SUBLANES

Ref = Any

UNSEEN = -(2**31)
"""Key of a region that may not be selected."""


@dataclasses.dataclass(frozen=True)
class Static:
    """Static arguments.

    Attributes:
      kv_heads: K.
      group: G.
      per_head: every query head selects for itself.
      regions: R.
      tile: T, a power of two, at least 128.
      capacity: J.
      compute: dtype of the operands of products. They accumulate in float32.
      lanes_are_regions: a layer's descriptors are [K, E, R]. XLA stores [R, 64] that way to avoid padding.
    """

    kv_heads: int
    group: int
    per_head: bool
    regions: int
    tile: int
    capacity: int
    compute: DTypeLike
    lanes_are_regions: bool

    @property
    def tiles(self) -> int:
        """N."""
        return -(-self.regions // self.tile)

    @property
    def selectors(self) -> int:
        """Hs."""
        return self.kv_heads * (self.group if self.per_head else 1)

    @property
    def kv_rows(self) -> int:
        """K8."""
        return -(-self.kv_heads // SUBLANES) * SUBLANES

    @property
    def union(self) -> int:
        """U, the most regions that a kv head lists."""
        return min(self.capacity * (self.group if self.per_head else 1), self.regions)

    @property
    def listed_tiles(self) -> int:
        """Tiles of a list and, in its last lane, the number of its regions."""
        return self.union // self.tile + 1

    @property
    def listed_tile(self) -> int:
        """Lanes of such a tile: T, or as many as the only one needs."""
        return self.tile if self.listed_tiles > 1 else (self.union // LANES + 1) * LANES


class Scalars(NamedTuple):
    """Scalar prefetch: whole arrays in SMEM."""

    layer: Ref  # int32 [1]
    budget: Ref  # int32 [B]


class Inputs(NamedTuple):
    """Inputs of :func:`route_kernel`: blocks of the current sequence."""

    features: Ref  # VMEM [1, H, E]
    descriptors: Ref  # VMEM [1, 1, K, T, E], or [1, 1, K, E, T] if Static.lanes_are_regions: of one tile
    places: Ref  # VMEM int32 [1, N, 1, T]: the region's place by first token; -1 if it may not be selected
    slots: Ref  # VMEM int32 [1, N, Y - 1, T]: bits of the slots that count


class Given(NamedTuple):
    """Inputs of :func:`list_kernel`: blocks of the current sequence."""

    heads: Ref  # VMEM int32 [1, N, K8, T]: bits of the query heads that read a region
    slots: Ref  # as in Inputs


class Listed(NamedTuple):
    """The lists of all kv heads, a tile of them; in this form the attention kernel takes them.

    ``ids`` are region numbers, ascending, then -1; the last lane of all holds how many they are. ``side``
    holds of each listed region the bits of the query heads that read it, then the words of ``Inputs.slots``,
    then zeros.
    """

    ids: Ref  # int32 [1, K, 1, Static.listed_tile]
    side: Ref  # int32 [1, K, Y rounded up to 8, Static.listed_tile]


class Scratch(NamedTuple):
    """Scratch. ``keys`` is None where nothing is scored."""

    keys: Ref  # VMEM int32 [N, Hs, T]: scores in integer order
    moved: Ref  # VMEM int32 [1 + Y, N, K8, T]: of each region how far it moves, its head bits, its slots
    count: Ref  # VMEM int32 [K8, 128]: regions that a kv head lists, the same in all lanes


def _lane(shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def route_kernel(
    static: Static,
    scalars: Scalars,
    inputs: Inputs,
    scores: Ref,
    listed: Listed,
    scratch: Scratch,
) -> None:
    """A grid step (sequence, step): score a tile; after the last one select; then write a tile of the lists.

    ``scores`` is a block of the output, VMEM float32 [1, 1, Hs, T].
    """
    step, last = pl.program_id(1), static.tiles - 1

    @pl.when(step <= last)
    def _() -> None:
        found = _scores(static, inputs)
        scores[0, 0] = found
        scratch.keys[step] = sortable(found, inputs.places[0, step] >= 0)

    @pl.when(step == last)
    def _() -> None:
        budget = jnp.minimum(scalars.budget[pl.program_id(0)], static.capacity)
        _list(static, _selected(static, inputs, scratch.keys, budget), inputs.slots, scratch)

    @pl.when(step >= last)
    def _() -> None:
        _write(static, step - last, scratch, listed)


def list_kernel(static: Static, given: Given, listed: Listed, scratch: Scratch) -> None:
    """A grid step (sequence, tile of the lists)."""
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _() -> None:
        _list(static, lambda tile: given.heads[0, tile], given.slots, scratch)

    _write(static, step, scratch, listed)


# Scores and selection.


def _scores(static: Static, inputs: Inputs) -> jax.Array:
    """float32 [Hs, T] of the current tile."""
    features = inputs.features[0].astype(jnp.float32)
    dot = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((1,), (0 if static.lanes_are_regions else 1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if static.compute == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    rows = []
    for head in range(static.kv_heads):
        group = features[head * static.group : (head + 1) * static.group].astype(static.compute)
        found = dot(group, inputs.descriptors[0, 0, head].astype(static.compute))
        rows.append(found if static.per_head else jnp.sum(found, axis=0, keepdims=True))
    return jnp.concatenate(rows, axis=0)


def sortable(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """Map float32 scores to int32 keys of the same order: unseen < NaN < -inf < ... < inf; -0.0 is 0.0."""
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    keys = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
    keys = jnp.where(scores != scores, UNSEEN + 1, keys)
    return jnp.where(visible, keys, UNSEEN)


def _selected(
    static: Static, inputs: Inputs, keys: Ref, budget: jax.Array
) -> Callable[[jax.Array], jax.Array]:
    """A function from a tile to the head bits int32 [K8, T] of the regions that were selected."""
    rows = (static.selectors, 1)
    wanted = budget.astype(jnp.float32)

    def numbers(tests: Callable[..., tuple[jax.Array, ...]], count: int) -> tuple[jax.Array, ...]:
        """Of each test the number of regions that pass it, float32 [Hs, 1]: exact, and quick to add up."""

        def add(tile: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            passed = tests(keys[tile], inputs.places[0, tile])
            return tuple(a + jnp.where(b, 1.0, 0.0) for a, b in zip(sums, passed, strict=True))

        none = (jnp.zeros((static.selectors, static.tile), jnp.float32),) * count
        sums = jax.lax.fori_loop(0, static.tiles, add, none)
        return tuple(jnp.sum(a, axis=1, keepdims=True) for a in sums)

    # The largest key that at least `budget` keys reach. From the least int32 the highest bits wrap upwards.
    def raised(step: jax.Array, cut: jax.Array) -> jax.Array:
        higher = [cut + (jnp.int32(digit) << (30 - 2 * step)) for digit in (1, 2, 3)]
        found = numbers(lambda key, _: tuple(key >= a for a in higher), 3)
        for candidate, number in zip(higher, found, strict=True):
            cut = jnp.where(number >= wanted, candidate, cut)
        return cut

    cut = jax.lax.fori_loop(0, 16, raised, jnp.full(rows, UNSEEN, jnp.int32))
    above, ties = numbers(lambda key, _: (key > cut, key == cut), 2)
    free = wanted - above
    # Rarely more regions tie than are free. Then the largest number of places that hold no more than these.
    crowded = jnp.max(jnp.where((ties > free) & (cut > UNSEEN), 1.0, 0.0)) > 0
    bits = static.regions.bit_length()

    def extended(step: jax.Array, places: jax.Array) -> jax.Array:
        more = places + (jnp.int32(1) << (bits - 1 - step))
        (found,) = numbers(lambda key, place: ((key == cut) & (place < more),), 1)
        return jnp.where(found <= free, more, places)

    start = jnp.full(rows, jnp.where(crowded, 0, 2**30), jnp.int32)
    places = jax.lax.fori_loop(0, jnp.where(crowded, bits, 0), extended, start)

    def heads(tile: jax.Array) -> jax.Array:
        key = keys[tile]
        chosen = (key > cut) | ((key == cut) & (inputs.places[0, tile] < places))
        chosen &= (key > UNSEEN) & (budget >= 1)
        # A product joins the query heads: powers of two are exact.
        row = jax.lax.broadcasted_iota(jnp.int32, (static.kv_rows, static.selectors), 0)
        group = static.group if static.per_head else 1
        head = _lane((static.kv_rows, static.selectors)) - row * group
        bit = jnp.left_shift(1, jnp.clip(head, 0, group - 1)).astype(jnp.float32)
        bit = jnp.where((head >= 0) & (head < group), bit, 0.0).astype(jnp.bfloat16)
        one = jnp.where(chosen, 1.0, 0.0).astype(jnp.bfloat16)
        found = jnp.dot(bit, one, preferred_element_type=jnp.float32).astype(jnp.int32)
        return found if static.per_head else found * ((1 << static.group) - 1)

    return heads


# Lists.


def _list(static: Static, heads: Callable[[Any], jax.Array], slots: Ref, scratch: Scratch) -> None:
    """Move the regions of which some head bit is set to the front, in their order."""
    tile_shape = (static.kv_rows, static.tile)
    lane = _lane(tile_shape)
    moved = scratch.moved

    def fill(tile: jax.Array, before: jax.Array) -> jax.Array:
        bits = heads(tile)
        listed = bits != 0
        upto = jnp.where(listed, 1, 0)
        for power in range(static.tile.bit_length() - 1):
            rolled = pltpu.roll(upto, 1 << power, 1)
            upto += jnp.where(lane >= 1 << power, rolled, 0)
        # The number of regions before this one that are not listed.
        moved[0, tile] = jnp.where(listed, tile * static.tile + lane - (before + upto - 1), 0)
        moved[1, tile] = bits
        for word in range(slots.shape[2]):
            row = slots[0, tile, word : word + 1]
            moved[2 + word, tile] = jnp.where(listed, jnp.broadcast_to(row, tile_shape), 0)
        return before + jnp.sum(jnp.where(listed, 1.0, 0.0), axis=1, keepdims=True).astype(jnp.int32)

    count = jax.lax.fori_loop(0, static.tiles, fill, jnp.zeros((static.kv_rows, 1), jnp.int32))
    scratch.count[...] = jnp.broadcast_to(count, scratch.count.shape)
    for power in range((static.regions - 1).bit_length()):
        _move(static, moved, power)


def _move(static: Static, moved: Ref, power: int) -> None:
    """Move to the left by 2**power what has that bit in ``moved[0]``."""
    step, last = 1 << power, static.tiles - 1
    lane = _lane((static.kv_rows, static.tile))

    def one(tile: jax.Array, carry: int) -> int:
        if step < static.tile:
            after = jnp.minimum(tile + 1, last)
            inside = lane < static.tile - step

            def come(array: int) -> jax.Array:
                here = pltpu.roll(moved[array, tile], static.tile - step, 1)
                if last == 0:
                    return here
                return jnp.where(inside, here, pltpu.roll(moved[array, after], static.tile - step, 1))

            exists = inside | (tile < last)
        else:
            after = jnp.minimum(tile + step // static.tile, last)

            def come(array: int) -> jax.Array:
                return moved[array, after]

            exists = jnp.broadcast_to(tile + step // static.tile <= last, lane.shape)
        come_by = come(0)
        comes = (((come_by >> power) & 1) == 1) & exists
        stays = ((moved[0, tile] >> power) & 1) == 0
        for array in range(moved.shape[0]):
            incoming = come_by if array == 0 else come(array)
            moved[array, tile] = jnp.where(comes, incoming, jnp.where(stays, moved[array, tile], 0))
        return carry

    jax.lax.fori_loop(0, static.tiles, one, 0)


def _write(static: Static, step: jax.Array, scratch: Scratch, listed: Listed) -> None:
    """Write tile ``step`` of the lists."""
    width = static.listed_tile
    lane = _lane((static.kv_rows, width))
    tile = jnp.minimum(step, static.tiles - 1)
    arrays = range(scratch.moved.shape[0])
    kept = [jnp.where(step < static.tiles, scratch.moved[array, tile][:, :width], 0) for array in arrays]
    ids = jnp.where(kept[1] != 0, step * static.tile + lane + kept[0], -1)
    holds_count = (lane == width - 1) & (step == static.listed_tiles - 1)
    ids = jnp.where(holds_count, jnp.broadcast_to(scratch.count[:, :1], ids.shape), ids)
    empty = jnp.zeros((listed.side.shape[2] - len(kept) + 1, width), jnp.int32)
    for head in range(static.kv_heads):
        listed.ids[0, head] = ids[head : head + 1]
        for row, values in enumerate(kept[1:]):
            listed.side[0, head, row : row + 1] = values[head : head + 1]
        if empty.shape[0]:
            listed.side[0, head, len(kept) - 1 :] = empty


# Calls.


def _out(static: Static, batch: int, words: int, first: int) -> tuple[Listed, Listed]:
    """Block specs and shapes of the lists, whose first tile is written at step ``first``."""
    width = static.listed_tile * static.listed_tiles
    sides = -(-(1 + words) // SUBLANES) * SUBLANES
    heads = static.kv_heads

    def at(b: jax.Array, step: jax.Array, *_: Any) -> tuple[Any, ...]:
        return b, 0, 0, jnp.maximum(step - first, 0)

    specs = Listed(*(pl.BlockSpec((1, heads, rows, static.listed_tile), at) for rows in (1, sides)))
    shapes = (jax.ShapeDtypeStruct((batch, heads, rows, width), jnp.int32) for rows in (1, sides))
    return specs, Listed(*shapes)


def _scratch(static: Static, words: int, scored: bool) -> Scratch:
    rows = static.kv_rows
    return Scratch(
        pltpu.VMEM((static.tiles, static.selectors, static.tile), jnp.int32) if scored else None,
        pltpu.VMEM((2 + words, static.tiles, rows, static.tile), jnp.int32),
        pltpu.VMEM((rows, LANES), jnp.int32),
    )


def _whole(array: jax.Array) -> pl.BlockSpec:
    """All of the current sequence's part of an array."""
    return pl.BlockSpec((1, *array.shape[1:]), lambda b, step, *_: (b, *[0] * (array.ndim - 1)))


def route(static: Static, scalars: Scalars, inputs: Inputs, interpret: Any) -> tuple[jax.Array, Listed]:
    """Scores and lists; ``inputs`` are whole arrays, descriptors [L, B, K, R, E] or [L, B, K, E, R].

    Returns:
      float32 [B, N, Hs, T], and a :class:`Listed` of whole arrays: [B, K, 1, ...] and [B, K, 8, ...].
    """
    batch, words = inputs.features.shape[0], inputs.slots.shape[2]
    last, width = static.tiles - 1, inputs.features.shape[-1]

    def tile_of(b: jax.Array, step: jax.Array, scalars: Scalars) -> tuple[Any, ...]:
        tile = jnp.minimum(step, last)
        return scalars.layer[0], b, 0, *((0, tile) if static.lanes_are_regions else (tile, 0))

    block = (width, static.tile) if static.lanes_are_regions else (static.tile, width)
    in_specs = Inputs(
        _whole(inputs.features),
        pl.BlockSpec((1, 1, static.kv_heads, *block), tile_of),
        _whole(inputs.places),
        _whole(inputs.slots),
    )
    listed_specs, listed_shapes = _out(static, batch, words, last)
    scores = (1, 1, static.selectors, static.tile)
    call = pl.pallas_call(
        functools.partial(route_kernel, static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, last + static.listed_tiles),
            in_specs=[in_specs],
            out_specs=[
                pl.BlockSpec(scores, lambda b, step, *_: (b, jnp.minimum(step, last), 0, 0)),
                listed_specs,
            ],
            scratch_shapes=[_scratch(static, words, True)],
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, static.tiles, *scores[2:]), jnp.float32), listed_shapes],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="gaze_route",
    )
    return tuple(call(scalars, inputs))


def lists(static: Static, given: Given, interpret: Any) -> Listed:
    """Lists of selections; ``given`` are whole arrays, with a leading axis B instead of 1."""
    batch, words = given.heads.shape[0], given.slots.shape[2]
    specs, shapes = _out(static, batch, words, 0)
    call = pl.pallas_call(
        functools.partial(list_kernel, static),
        grid=(batch, static.listed_tiles),
        in_specs=[Given(_whole(given.heads), _whole(given.slots))],
        out_specs=[specs],
        out_shape=[shapes],
        scratch_shapes=[_scratch(static, words, False)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="gaze_list",
    )
    (listed,) = call(given)
    return listed
