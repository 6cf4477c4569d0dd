"""The two TPU kernels of gaze_prefill: one tile of queries against all key blocks, forward and backward.

Both run over the grid (batch, kv head, key block), key blocks innermost. A tile's queries stay in VMEM
with their accumulators while the blocks of keys and values pass by once:

    VMEM, per (b, k):   q, out [rows, D]   running max and sum [rows, 128]   facts int32 [rows, 128]
    VMEM, per block n:  K, V [W, D]        places int32 [8, W]: order, segment, cell, poison
    SMEM, per block n:  table int32 [1, 1 + words]: what to do, then one bit per unit that visits

A *unit* is the rows that one vector register holds, 8 = E queries x G heads where G divides 8, else one
query with its heads padded to 8. Per block the table says one of three things:

    SKIP    nobody of the tile sees a key of the block
    GATHER  few units do: their rows are copied side by side into a batch, the batch goes through the
            matrix unit, and its rows are added back to where they came from
    DIRECT  many do, or nobody chooses (text-stream keys, unrouted queries): all rows in order, under the mask

Both run the same arithmetic on the same facts; only d K and d V add their queries in another order. The
choice is made per block and tile, so a block costs the cheaper of the two. There is one way in which
nothing is skipped: K and V of every block are fetched, once per tile.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import interpreter

Array = jax.Array
Ref = Any

LANES = 128
SKIP, GATHER, DIRECT = 0, 1, 2
# Lanes of a row's facts. What a query may see, the two numbers that the backward pass needs (float32
# bits), and from WORDS on one bit for each cell of each visual block: is it open to this row?
VISUAL_LO, VISUAL_HI, TEXT_LO, TEXT_HI, SEGMENT, LSE, DELTA, WORDS = range(8)
WORD_LANES = LANES - WORDS
ORDER, SEGMENT_OF, CELL, POISON = range(4)  # rows of a block's places
PLACES = 8  # their number, padded to a register
SUBLANES = 8
_NEVER = -1e30  # below any logit; finite, so that differences of two are numbers


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of one call; see the module's drawing.

    Attributes:
      scale: of the logits.
      interpret: run in the interpreter, looking for races and reads of what nobody wrote.
      routed: the facts carry cell bits and blocks may be gathered.
      blocks, visual_blocks: N in all, and how many of them, the first ones, are visual.
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


def _dot(a: Array, b: Array, over: tuple[int, int]) -> Array:
    """Contract axis over[0] of ``a`` with over[1] of ``b``, in b's dtype, accumulated in float32."""
    exact = jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a.astype(b.dtype),
        b,
        (((over[0],), (over[1],)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )


def _seen(plan: Plan, n: Array, facts: Array, places: Array) -> Array:
    """bool [rows, W]: which keys of block n each row sees, from facts [rows, 128] and places [8, W]."""
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
    # Rotating the wanted lane to the front costs one pass; a slice at a traced lane is not to be had.
    word = pltpu.roll(facts, LANES - lane, 1)[:, :1]
    word = jnp.where(visual, word, -1)
    shift = jax.lax.rem(n, per_word) * plan.bits + places[CELL : CELL + 1]
    return seen & ((jax.lax.shift_right_logical(*jnp.broadcast_arrays(word, shift)) & 1) == 1)


def _logits(plan: Plan, q: Array, k: Array, places: Array) -> Array:
    """float32 [rows, W]; NaN for a key that was not finite before it was cleaned."""
    poison = jax.lax.bitcast_convert_type(places[POISON : POISON + 1], jnp.float32)
    return _dot(q, k, (1, 1)) * plan.scale + poison


def _float_fact(facts: Array, lane: int) -> Array:
    """float32 [rows, 1] from a lane that carries its bits."""
    return jax.lax.bitcast_convert_type(facts[:, lane : lane + 1], jnp.float32)


def _rows(plan: Plan, unit: Array) -> Any:
    return pl.ds(pl.multiple_of(unit * plan.unit, plan.unit), plan.unit)


def _visit(
    plan: Plan,
    table: Ref,
    units: Ref,
    pairs: tuple[tuple[Ref, Ref], ...],
    flush: Callable[[Array], None],
) -> None:
    """Copy the rows of every visiting unit into a batch; ``flush(count)`` when it is full and at the end.

    Args:
      plan: static sizes.
      table: SMEM [1, 1 + words].
      units: SMEM [visits], the units in the batch.
      pairs: (resident rows, their places in the batch).
      flush: consumes the first ``count`` units of the batch.
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
                batch[_rows(plan, filled), :] = resident[_rows(plan, unit), :]
            filled = filled + 1
            full = filled == plan.visits
            pl.when(full)(lambda: flush(jnp.int32(plan.visits)))
            return bits ^ lowest, jnp.where(full, 0, filled)

        return jax.lax.while_loop(more, one, (table[0, 1 + i], filled))[1]

    left = jax.lax.fori_loop(0, plan.words, word, jnp.int32(0))
    pl.when(left > 0)(lambda: flush(left))


def _in_chunks(plan: Plan, body: Callable[[Any], None]) -> None:
    """Call ``body`` with a slice of rows for every chunk of the tile."""

    def step(i: Array, carry: None) -> None:
        body(pl.ds(pl.multiple_of(i * plan.chunk, plan.chunk), plan.chunk))

    jax.lax.fori_loop(0, plan.rows // plan.chunk, step, None)


def _softmax_step(
    plan: Plan, n: Array, q: Array, facts: Array, state: Array, k: Array, v: Array, places: Array
) -> tuple[Array, Array, Array]:
    """One block's part of an online softmax.

    Args:
      plan: static sizes.
      n: the block.
      q: [rows, D].
      facts: int32 [rows, 128].
      state: float32 [rows, 128], the running maximum in the first half of the lanes, the sum in the second.
      k, v: [W, D].
      places: int32 [8, W].

    Returns:
      What to add to the output [rows, D], the factor [rows, 1] for what it held, and the new state.
    """
    seen = _seen(plan, n, facts, places)
    logits = jnp.where(seen, _logits(plan, q, k, places), _NEVER)
    top, total = state[:, :1], state[:, LANES // 2 : LANES // 2 + 1]
    new_top = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(logits - new_top), 0.0)
    factor = jnp.exp(top - new_top)
    new_total = factor * total + jnp.sum(weights, axis=1, keepdims=True)
    lane = jax.lax.broadcasted_iota(jnp.int32, state.shape, 1)
    return _dot(weights, v, (1, 0)), factor, jnp.where(lane < LANES // 2, new_top, new_total)


def _forward_kernel(plan: Plan, *refs: Ref) -> None:
    table, places, q, facts, k, v, out, lse, state, *batch = refs
    n = pl.program_id(2)
    action = table[0, 0]

    @pl.when(n == 0)
    def _() -> None:
        out[...] = jnp.zeros_like(out)
        lane = jax.lax.broadcasted_iota(jnp.int32, state.shape, 1)
        state[...] = jnp.where(lane < LANES // 2, _NEVER, 0.0)

    @pl.when(action == DIRECT)
    def _() -> None:
        def chunk(rows: Any) -> None:
            part, factor, state[rows, :] = _softmax_step(
                plan, n, q[rows, :], facts[rows, :], state[rows, :], k[...], v[...], places[...]
            )
            out[rows, :] = out[rows, :] * factor + part

        _in_chunks(plan, chunk)

    if plan.routed:
        units, some_q, some_facts, some_state, some_part, some_factor = batch

        def flush(count: Array) -> None:
            part, factor, new = _softmax_step(
                plan, n, some_q[...], some_facts[...], some_state[...], k[...], v[...], places[...]
            )
            some_part[...] = part
            some_factor[...] = jnp.broadcast_to(factor, some_factor.shape)
            some_state[...] = new

            def put(i: Array, carry: None) -> None:
                here, there = _rows(plan, i), _rows(plan, units[i])
                out[there, :] = out[there, :] * some_factor[here, :] + some_part[here, :]
                state[there, :] = some_state[here, :]

            jax.lax.fori_loop(0, count, put, None)

        @pl.when(action == GATHER)
        def _() -> None:
            pairs = ((q, some_q), (facts, some_facts), (state, some_state))
            _visit(plan, table, units, pairs, flush)

    @pl.when(n == plan.blocks - 1)
    def _() -> None:
        def chunk(rows: Any) -> None:
            top, total = state[rows, :1], state[rows, LANES // 2 : LANES // 2 + 1]
            total = jnp.where(total > 0, total, 1.0)
            out[rows, :] = out[rows, :] / total
            lse[rows, :] = jnp.broadcast_to(top + jnp.log(total), (plan.chunk, LANES))

        _in_chunks(plan, chunk)


def _backward_step(
    plan: Plan,
    n: Array,
    q: Array,
    d_out: Array,
    facts: Array,
    k: Array,
    v: Array,
    places: Array,
    alive: Array | None = None,
) -> tuple[Array, Array, Array]:
    """d q [rows, D], d K and d V [W, D] of one block; rows that are not ``alive`` [rows, 1] count nothing."""
    seen = _seen(plan, n, facts, places)
    if alive is not None:
        # A batch's last slots hold an older unit or, in the beginning, anything at all.
        seen = seen & alive
        q, d_out = jnp.where(alive, q, jnp.zeros_like(q)), jnp.where(alive, d_out, jnp.zeros_like(d_out))
    logits = _logits(plan, q, k, places)
    weights = jnp.where(seen, jnp.exp(logits - _float_fact(facts, LSE)), 0.0)
    d_weights = _dot(d_out, v, (1, 1))
    d_logits = jnp.where(seen, weights * (d_weights - _float_fact(facts, DELTA)) * plan.scale, 0.0)
    weights, d_logits = weights.astype(k.dtype), d_logits.astype(k.dtype)
    return (
        _dot(d_logits, k, (1, 0)),
        _dot(d_logits, q.astype(k.dtype), (0, 0)),
        _dot(weights, d_out.astype(k.dtype), (0, 0)),
    )


def _backward_kernel(plan: Plan, *refs: Ref) -> None:
    table, places, q, d_out, facts, k, v, d_k_before, d_v_before, d_q, d_k, d_v, *batch = refs
    n = pl.program_id(2)
    action = table[0, 0]
    d_k[...] = d_k_before[...]
    d_v[...] = d_v_before[...]

    @pl.when(n == 0)
    def _() -> None:
        d_q[...] = jnp.zeros_like(d_q)

    @pl.when(action == DIRECT)
    def _() -> None:
        def chunk(rows: Any) -> None:
            part, part_k, part_v = _backward_step(
                plan, n, q[rows, :], d_out[rows, :], facts[rows, :], k[...], v[...], places[...]
            )
            d_q[rows, :] += part
            d_k[...] += part_k
            d_v[...] += part_v

        _in_chunks(plan, chunk)

    if plan.routed:
        units, some_q, some_d_out, some_facts, some_d_q = batch

        def flush(count: Array) -> None:
            row = jax.lax.broadcasted_iota(jnp.int32, (plan.visits * plan.unit, 1), 0)
            part, part_k, part_v = _backward_step(
                plan,
                n,
                some_q[...],
                some_d_out[...],
                some_facts[...],
                k[...],
                v[...],
                places[...],
                row < count * plan.unit,
            )
            some_d_q[...] = part
            d_k[...] += part_k
            d_v[...] += part_v

            def put(i: Array, carry: None) -> None:
                d_q[_rows(plan, units[i]), :] += some_d_q[_rows(plan, i), :]

            jax.lax.fori_loop(0, count, put, None)

        @pl.when(action == GATHER)
        def _() -> None:
            pairs = ((q, some_q), (d_out, some_d_out), (facts, some_facts))
            _visit(plan, table, units, pairs, flush)


def _specs(plan: Plan, dim: int, facts_per_head: bool) -> dict[str, pl.BlockSpec]:
    """How each kind of array is cut along the grid (b, k, n)."""
    # Blocks behind the last visual one read only the windows, which every register carries.
    last = plan.registers - 1

    def facts(b: Array, k: Array, n: Array) -> tuple[Any, ...]:
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


def _call(
    kernel: Callable[..., None], plan: Plan, name: str, grid: tuple[int, int, int], **arguments: Any
) -> Callable[..., Any]:
    """A pallas_call with what both kernels share."""
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=grid,
        name=name,
        interpret=interpreter() if plan.interpret else False,
        compiler_params=pltpu.CompilerParams(
            # Cores may share batch and heads; a head's blocks come one after another. The interpreter has
            # one core, and under vmap it trips over semantics that do not name the mapped axis.
            dimension_semantics=None if plan.interpret else ("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM,
        ),
        **arguments,
    )


# Of 128 MiB on v5e and v6e and of 64 MiB on v5p, what is left beside XLA's own use.
_VMEM = 56 * 2**20


def forward(
    plan: Plan, table: Array, places: Array, q: Array, facts: Array, k: Array, v: Array
) -> tuple[Array, Array]:
    """Attention of one tile of queries.

    Args:
      plan: static sizes.
      table: int32 [B, K, N, 1, 1 + words].
      places: int32 [B, K, N, 8, W].
      q: [B, K, rows, D]; float32 if ``plan.routed``, since narrower rows do not move one unit at a time.
      facts: int32 [B, K or 1, rows, registers * 128].
      k, v: [B, K, N * W, D]; tokens that nobody sees must be finite.

    Returns:
      float32 [B, K, rows, D], 0 where a row sees nothing, and the logits' log-sum-exp [B, K, rows].
    """
    batch, kv_heads, rows, dim = q.shape
    spec = _specs(plan, dim, facts.shape[1] > 1)
    gathered = plan.visits * plan.unit
    scratch = [pltpu.VMEM((rows, LANES), jnp.float32)]
    if plan.routed:
        scratch += [
            pltpu.SMEM((plan.visits,), jnp.int32),
            pltpu.VMEM((gathered, dim), q.dtype),
            pltpu.VMEM((gathered, LANES), jnp.int32),
            pltpu.VMEM((gathered, LANES), jnp.float32),
            pltpu.VMEM((gathered, dim), jnp.float32),
            pltpu.VMEM((gathered, dim), jnp.float32),
        ]
    out, lse = _call(
        _forward_kernel,
        plan,
        "gaze_prefill_forward",
        (batch, kv_heads, plan.blocks),
        in_specs=[spec[name] for name in ("table", "places", "rows", "facts", "keys", "keys")],
        out_specs=[spec["rows"], spec["numbers"]],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, jnp.float32),
            jax.ShapeDtypeStruct((batch, kv_heads, rows, LANES), jnp.float32),
        ],
        scratch_shapes=scratch,
    )(table, places, q, facts, k, v)
    return out, lse[..., 0]


def backward(
    plan: Plan,
    table: Array,
    places: Array,
    q: Array,
    d_out: Array,
    facts: Array,
    k: Array,
    v: Array,
    d_k: Array,
    d_v: Array,
) -> tuple[Array, Array, Array]:
    """Gradients of one tile; arguments as of :func:`forward`, with LSE and DELTA among the facts.

    ``d_k``, ``d_v`` float32 [B, K, N * W, D] are the sums over earlier tiles: every block is read once
    and written once, in place.

    Returns:
      d q float32 [B, K, rows, D], and ``d_k``, ``d_v`` with this tile's part added.
    """
    batch, kv_heads, _, dim = q.shape
    spec = _specs(plan, dim, facts.shape[1] > 1)
    gathered = plan.visits * plan.unit
    scratch: list[Any] = []
    if plan.routed:
        scratch = [
            pltpu.SMEM((plan.visits,), jnp.int32),
            pltpu.VMEM((gathered, dim), q.dtype),
            pltpu.VMEM((gathered, dim), d_out.dtype),
            pltpu.VMEM((gathered, LANES), jnp.int32),
            pltpu.VMEM((gathered, dim), jnp.float32),
        ]
    names = ("table", "places", "rows", "rows", "facts", "keys", "keys", "keys", "keys")
    d_q, d_k, d_v = _call(
        _backward_kernel,
        plan,
        "gaze_prefill_backward",
        (batch, kv_heads, plan.blocks),
        in_specs=[spec[name] for name in names],
        out_specs=[spec["rows"], spec["keys"], spec["keys"]],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, jnp.float32),
            jax.ShapeDtypeStruct(d_k.shape, jnp.float32),
            jax.ShapeDtypeStruct(d_v.shape, jnp.float32),
        ],
        scratch_shapes=scratch,
        input_output_aliases={7: 1, 8: 2},
    )(table, places, q, d_out, facts, k, v, d_k, d_v)
    return d_q, d_k, d_v
