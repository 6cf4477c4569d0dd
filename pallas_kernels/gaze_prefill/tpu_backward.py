"""The backward TPU kernel of gaze_prefill: gradients of one tile of queries. See ``tpu_common.py``."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gaze_prefill import tpu_common as common
from pallas_kernels.gaze_prefill.tpu_common import LANES, Array, Keys, Plan, Ref, Slice


class Inputs(NamedTuple):
    """Inputs: the blocks of one grid step."""

    table: Ref  # SMEM int32 [1, 1 + words]
    places: Ref  # VMEM int32 [8, W]
    q: Ref  # VMEM [rows, D]: float32 if Plan.routed
    d_out: Ref  # VMEM [rows, D]: float32 if Plan.routed
    facts: Ref  # VMEM int32 [rows, 128]: LSE and DELTA among them
    k: Ref  # VMEM [W, D]
    v: Ref  # VMEM [W, D]
    d_k: Ref  # VMEM float32 [W, D]: the sum over earlier tiles
    d_v: Ref  # VMEM float32 [W, D]: the sum over earlier tiles


class Outputs(NamedTuple):
    """Outputs: ``d_q`` is accumulated over the blocks of keys. ``d_k`` and ``d_v`` alias the inputs."""

    d_q: Ref  # VMEM float32 [rows, D]
    d_k: Ref  # VMEM float32 [W, D]
    d_v: Ref  # VMEM float32 [W, D]


class _Batch(NamedTuple):
    """Scratch: the rows that are gathered, if Plan.routed."""

    units: Ref  # SMEM int32 [visits]: where they came from
    q: Ref  # VMEM [visits * unit, D] in the dtype of Inputs.q
    d_out: Ref  # VMEM [visits * unit, D] in the dtype of Inputs.d_out
    facts: Ref  # VMEM int32 [visits * unit, 128]
    d_q: Ref  # VMEM float32 [visits * unit, D]: to add to theirs


class _Refs(NamedTuple):
    """All references of the kernel except those of the batch."""

    inputs: Inputs
    outputs: Outputs

    def keys(self) -> Keys:
        """The current block of keys."""
        return Keys(self.inputs.k[...], self.inputs.v[...], self.inputs.places[...])


class _Rows(NamedTuple):
    """Rows of queries, as arrays."""

    q: Array  # [X, D]
    d_out: Array  # [X, D]
    facts: Array  # int32 [X, 128]


def _kernel(plan: Plan, inputs: Inputs, outputs: Outputs, batch: _Batch | None = None) -> None:
    """One grid step: a tile of queries against block n of keys."""
    refs = _Refs(inputs, outputs)
    n = pl.program_id(2)
    action = inputs.table[0, 0]
    outputs.d_k[...] = inputs.d_k[...]
    outputs.d_v[...] = inputs.d_v[...]

    @pl.when(n == 0)
    def _() -> None:
        outputs.d_q[...] = jnp.zeros_like(outputs.d_q)

    @pl.when(action == common.DIRECT)
    def _() -> None:
        _add_all(plan, n, refs)

    if batch is not None:
        pl.when(action == common.GATHER)(functools.partial(_add_visitors, plan, n, refs, batch))


def _add_all(plan: Plan, n: Array, refs: _Refs) -> None:
    """Add the gradients between a block and all rows, a chunk of rows at a time."""
    inputs, (d_q, d_k, d_v) = refs.inputs, refs.outputs

    def chunk(rows: Slice) -> None:
        queries = _Rows(inputs.q[rows, :], inputs.d_out[rows, :], inputs.facts[rows, :])
        part, part_k, part_v = _step(plan, n, queries, refs.keys())
        d_q[rows, :] += part
        d_k[...] += part_k
        d_v[...] += part_v

    common.in_chunks(plan, chunk)


def _add_visitors(plan: Plan, n: Array, refs: _Refs, batch: _Batch) -> None:
    """Add the gradients between a block and the units that visit it, a batch of units at a time."""
    inputs, (d_q, d_k, d_v) = refs.inputs, refs.outputs

    def flush(count: Array) -> None:
        row = jax.lax.broadcasted_iota(jnp.int32, (plan.visits * plan.unit, 1), 0)
        queries = _Rows(batch.q[...], batch.d_out[...], batch.facts[...])
        part, part_k, part_v = _step(plan, n, queries, refs.keys(), row < count * plan.unit)
        batch.d_q[...] = part
        d_k[...] += part_k
        d_v[...] += part_v

        def put(i: Array, carry: None) -> None:
            d_q[common.unit_rows(plan, batch.units[i]), :] += batch.d_q[common.unit_rows(plan, i), :]

        jax.lax.fori_loop(0, count, put, None)

    pairs = ((inputs.q, batch.q), (inputs.d_out, batch.d_out), (inputs.facts, batch.facts))
    common.visit(plan, inputs.table, batch.units, pairs, flush)


def _float_fact(facts: Array, lane: int) -> Array:
    """float32 [X, 1] from a lane that carries its bits."""
    return jax.lax.bitcast_convert_type(facts[:, lane : lane + 1], jnp.float32)


def _step(
    plan: Plan, n: Array, rows: _Rows, keys: Keys, alive: Array | None = None
) -> tuple[Array, Array, Array]:
    """Gradients between one block and some rows.

    Args:
      plan: static sizes.
      n: int32, the block.
      rows: queries, X of them.
      keys: the block's keys and values.
      alive: bool [X, 1], the rows that count; None if all do.

    Returns:
      Their part of d q, float32 [X, D], and of d K and d V, float32 [W, D].
    """
    q, d_out, facts = rows
    seen = common.visible(plan, n, facts, keys.places)
    if alive is not None:
        # Unused rows of a batch hold an older unit, or uninitialised memory.
        seen = seen & alive
        q, d_out = jnp.where(alive, q, jnp.zeros_like(q)), jnp.where(alive, d_out, jnp.zeros_like(d_out))
    logits = common.logits(plan, q, keys)
    weights = jnp.where(seen, jnp.exp(logits - _float_fact(facts, common.LSE)), 0.0)
    d_weights = common.dot(d_out, keys.v, (1, 1))
    d_logits = jnp.where(seen, weights * (d_weights - _float_fact(facts, common.DELTA)) * plan.scale, 0.0)
    weights, d_logits = weights.astype(keys.k.dtype), d_logits.astype(keys.k.dtype)
    return (
        common.dot(d_logits, keys.k, (1, 0)),
        common.dot(d_logits, q.astype(keys.k.dtype), (0, 0)),
        common.dot(weights, d_out.astype(keys.k.dtype), (0, 0)),
    )


def backward(plan: Plan, inputs: Inputs) -> Outputs:
    """Gradients of one tile of queries.

    Args:
      plan: static sizes.
      inputs: whole arrays: ``table`` int32 [B, K, N, 1, 1 + words], ``places`` int32 [B, K, N, 8, W],
        ``q`` and ``d_out`` [B, K, rows, D], ``facts`` int32 [B, K, rows, registers * 128], ``k`` and ``v``
        [B, K, N * W, D], and the sums over earlier tiles, ``d_k`` and ``d_v`` float32 [B, K, N * W, D].
        ``q`` and ``d_out`` are float32 if ``plan.routed``. Keys and values that no query sees must be
        finite.

    Returns:
      ``d_q`` float32 [B, K, rows, D]; ``d_k`` and ``d_v`` with this tile's part added. Every block of them is
      read once and written once, in place.
    """
    batch, kv_heads, _, dim = inputs.q.shape
    spec = common.block_specs(plan, dim, inputs.facts.shape[1] > 1)
    scratch = []
    if plan.routed:
        gathered = plan.visits * plan.unit
        scratch.append(
            _Batch(
                units=pltpu.SMEM((plan.visits,), jnp.int32),
                q=pltpu.VMEM((gathered, dim), inputs.q.dtype),
                d_out=pltpu.VMEM((gathered, dim), inputs.d_out.dtype),
                facts=pltpu.VMEM((gathered, LANES), jnp.int32),
                d_q=pltpu.VMEM((gathered, dim), jnp.float32),
            )
        )
    names = ("table", "places", "rows", "rows", "facts", "keys", "keys", "keys", "keys")
    outputs = Outputs(inputs.q, inputs.d_k, inputs.d_v)
    (out,) = common.call(
        _kernel,
        plan,
        "gaze_prefill_backward",
        (batch, kv_heads, plan.blocks),
        in_specs=[Inputs(*(spec[name] for name in names))],
        out_specs=[Outputs(spec["rows"], spec["keys"], spec["keys"])],
        out_shape=[Outputs(*(jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in outputs))],
        scratch_shapes=scratch,
        # Counted over the leaves of inputs and outputs.
        input_output_aliases={
            Inputs._fields.index(name): Outputs._fields.index(name) for name in ("d_k", "d_v")
        },
    )(inputs)
    return out
