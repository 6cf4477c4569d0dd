"""Shared by the forward and the backward TPU kernel of gaze_prefill.

Each kernel takes one tile of queries against all blocks of keys. Both run over the grid (batch, kv head,
key block), key blocks innermost. A tile's queries stay in VMEM with their accumulators, while the blocks
of keys and values pass by once:

    VMEM, per (b, k):   q, out [rows, D]   running max and sum [rows, 128]   facts int32 [rows, 128]
    VMEM, per block n:  K, V [W, D]        places int32 [8, W]: order, segment, cell, poison
    SMEM, per block n:  table int32 [1, 1 + words]: what to do, then one bit per unit that visits

A *unit* is the rows that one vector register holds: 8 = E queries x G heads where G divides 8, else one
query with its heads padded to 8. For each block the table says one of three things:

    SKIP    no query of the tile sees a key of the block
    GATHER  few units do: their rows are copied side by side into a batch, the batch goes through the
            matrix unit, and its rows are added back to their original rows
    DIRECT  many do, or there is no selection (text stream, unrouted queries): all rows, under the mask

GATHER and DIRECT do the same arithmetic on the same facts; only d K and d V sum their queries in different
orders. The choice is made per block and tile, so each block takes the cheaper path. The fetch of K and V is
never skipped: every block is fetched once per tile.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import interpreter

Array = jax.Array
Ref = Any  # Pallas refs have no public type; the callers fill the same bundles with arrays and BlockSpecs

Slice = slice | pl.Slice

LANES = 128
SKIP, GATHER, DIRECT = 0, 1, 2
# Lanes of a row's facts: what a query may see, then two numbers for the backward pass (float32 bits). From
# lane WORDS on there is one bit for each cell of each visual block: may the row read it?
VISUAL_LO, VISUAL_HI, TEXT_LO, TEXT_HI, SEGMENT, LSE, DELTA, WORDS = range(8)
WORD_LANES = LANES - WORDS
ORDER, SEGMENT_OF, CELL, POISON = range(4)  # rows of a block's places
PLACES = 8  # number of such rows, padded to a register
SUBLANES = 8
NEVER = -1e30  # below any logit; finite, so that differences of two are numbers

# What XLA's own use leaves of 128 MiB on v5e and v6e, and of 64 MiB on v5p.
_VMEM = 56 * 2**20


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of one call; the module's docstring explains them.

    Attributes:
      scale: factor of the logits.
      interpret: run in the interpreter, which looks for races and for reads of uninitialised memory.
      routed: the facts carry cell bits, and blocks may be gathered.
      blocks, visual_blocks: N, and how many of the N are visual; those come first.
      width: W, tokens per block, padding included.
      cell, cells: tokens per cell (a region's P) and cells per visual block.
      tile: queries per tile.
      group: rows per query, padding included.
      unit: rows that are gathered together.
      chunk: rows that go through the matrix unit together on the direct path.
      visits: units that do on the gathered path.
    """

    scale: float
    interpret: bool
    routed: bool
    blocks: int
    visual_blocks: int
    width: int
    cell: int
    cells: int
    tile: int
    group: int
    unit: int
    chunk: int
    visits: int

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return self.tile * self.group

    @property
    def words(self) -> int:
        """Words of visit bits per block."""
        return -(-self.rows // self.unit // 32) if self.routed else 0

    @property
    def bits(self) -> int:
        """Bits that a block takes in a row's facts: its cells, rounded up to divide a word."""
        return 1 << (self.cells - 1).bit_length()

    @property
    def blocks_per_facts(self) -> int:
        """Blocks whose bits fit into the word lanes of one register."""
        return WORD_LANES * (32 // self.bits)

    @property
    def registers(self) -> int:
        """Registers of facts per 8 rows: more than one only beyond some 2,900 regions."""
        return max(1, -(-self.visual_blocks // self.blocks_per_facts)) if self.routed else 1


class Keys(NamedTuple):
    """One block of keys and values."""

    k: Array  # [W, D]
    v: Array  # [W, D]
    places: Array  # int32 [8, W]


def dot(a: Array, b: Array, over: tuple[int, int]) -> Array:
    """Contract axis over[0] of ``a`` with over[1] of ``b``, in b's dtype, accumulated in float32."""
    exact = jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a.astype(b.dtype),
        b,
        (((over[0],), (over[1],)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )


def visible(plan: Plan, n: Array, facts: Array, places: Array) -> Array:
    """Which keys of a block each row sees.

    Args:
      plan: static sizes.
      n: int32, the block.
      facts: int32 [rows, 128].
      places: int32 [8, W].

    Returns:
      bool [rows, W].
    """
    visual = n < plan.visual_blocks

    def fact(lane: int) -> Array:
        return facts[:, lane : lane + 1]

    lo = jnp.where(visual, fact(VISUAL_LO), fact(TEXT_LO))
    hi = jnp.where(visual, fact(VISUAL_HI), fact(TEXT_HI))
    order, segment = places[ORDER : ORDER + 1], places[SEGMENT_OF : SEGMENT_OF + 1]
    seen = (order >= lo) & (order <= hi) & (segment == fact(SEGMENT))
    if not plan.routed:
        return seen
    per_word = 32 // plan.bits
    lane = WORDS + jax.lax.div(jax.lax.rem(n, plan.blocks_per_facts), per_word)
    # Mosaic cannot slice at a traced lane. Rotating that lane to the front costs one pass.
    word = pltpu.roll(facts, LANES - lane, 1)[:, :1]
    word = jnp.where(visual, word, -1)
    shift = jax.lax.rem(n, per_word) * plan.bits + places[CELL : CELL + 1]
    return seen & ((jax.lax.shift_right_logical(*jnp.broadcast_arrays(word, shift)) & 1) == 1)


def logits(plan: Plan, q: Array, keys: Keys) -> Array:
    """float32 [rows, W]; NaN for a key that was not finite before it was set to 0."""
    poison = jax.lax.bitcast_convert_type(keys.places[POISON : POISON + 1], jnp.float32)
    return dot(q, keys.k, (1, 1)) * plan.scale + poison


def unit_rows(plan: Plan, unit: Array) -> Slice:
    """The slice of a unit's rows."""
    return pl.ds(pl.multiple_of(unit * plan.unit, plan.unit), plan.unit)


def visit(
    plan: Plan,
    table: Ref,
    units: Ref,
    pairs: tuple[tuple[Ref, Ref], ...],
    flush: Callable[[Array], None],
) -> None:
    """Copy the rows of every visiting unit into a batch, and flush the batch when it is full and at the end.

    Args:
      plan: static sizes.
      table: SMEM int32 [1, 1 + words].
      units: SMEM int32 [visits], filled with the units in the batch.
      pairs: what to copy: the tile's rows [rows, ...] and the batch's [visits * unit, ...].
      flush: called with the number of units in the batch.
    """

    def word(i: Array, filled: Array) -> Array:
        def more(carry: tuple[Array, Array]) -> Array:
            return carry[0] != 0

        def one(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            bits, filled = carry
            lowest = bits & -bits
            unit = i * 32 + 31 - jax.lax.clz(lowest)
            units[filled] = unit
            for resident, batch in pairs:
                batch[unit_rows(plan, filled), :] = resident[unit_rows(plan, unit), :]
            filled = filled + 1
            full = filled == plan.visits
            pl.when(full)(lambda: flush(jnp.int32(plan.visits)))
            return bits ^ lowest, jnp.where(full, 0, filled)

        return jax.lax.while_loop(more, one, (table[0, 1 + i], filled))[1]

    left = jax.lax.fori_loop(0, plan.words, word, jnp.int32(0))
    pl.when(left > 0)(lambda: flush(left))


def in_chunks(plan: Plan, body: Callable[[Slice], None]) -> None:
    """Call ``body`` with the slice of rows of every chunk of the tile."""

    def step(i: Array, carry: None) -> None:
        body(pl.ds(pl.multiple_of(i * plan.chunk, plan.chunk), plan.chunk))

    jax.lax.fori_loop(0, plan.rows // plan.chunk, step, None)


def block_specs(plan: Plan, dim: int, facts_per_head: bool) -> dict[str, pl.BlockSpec]:
    """BlockSpecs over the grid (b, k, n), for each kind of array."""
    # Blocks after the last visual one read only the windows, which every register carries.
    last = plan.registers - 1

    def facts(b: Array, k: Array, n: Array) -> tuple[Array | int, ...]:
        return b, k if facts_per_head else 0, 0, jnp.minimum(jax.lax.div(n, plan.blocks_per_facts), last)

    return {
        "table": pl.BlockSpec(
            (None, None, None, 1, 1 + plan.words), lambda b, k, n: (b, k, n, 0, 0), memory_space=pltpu.SMEM
        ),
        "places": pl.BlockSpec((None, None, None, PLACES, plan.width), lambda b, k, n: (b, k, n, 0, 0)),
        "rows": pl.BlockSpec((None, None, plan.rows, dim), lambda b, k, n: (b, k, 0, 0)),
        "numbers": pl.BlockSpec((None, None, plan.rows, LANES), lambda b, k, n: (b, k, 0, 0)),
        "facts": pl.BlockSpec((None, None, plan.rows, LANES), facts),
        "keys": pl.BlockSpec((None, None, plan.width, dim), lambda b, k, n: (b, k, n, 0)),
    }


def call(
    kernel: Callable[..., None], plan: Plan, name: str, grid: tuple[int, int, int], **arguments: Any
) -> Callable[..., Any]:
    """A pallas_call with the arguments that both kernels share."""
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=grid,
        name=name,
        interpret=interpreter() if plan.interpret else False,
        compiler_params=pltpu.CompilerParams(
            # Batch and heads may be split over cores; the blocks of a head are sequential. The interpreter
            # has one core, and under vmap it fails on semantics that do not name the mapped axis.
            dimension_semantics=None if plan.interpret else ("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM,
        ),
        **arguments,
    )
