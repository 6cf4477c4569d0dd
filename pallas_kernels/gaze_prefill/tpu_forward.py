"""The forward TPU kernel of gaze_prefill: attention of one tile of queries. See ``tpu_common.py``."""

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
    facts: Ref  # VMEM int32 [rows, 128]
    k: Ref  # VMEM [W, D]
    v: Ref  # VMEM [W, D]


class Outputs(NamedTuple):
    """Outputs: accumulated over the blocks of keys."""

    out: Ref  # VMEM float32 [rows, D]
    lse: Ref  # VMEM float32 [rows, 128]: log-sum-exp of the logits, the same in all lanes


class _Batch(NamedTuple):
    """Scratch: the rows that are gathered, if Plan.routed."""

    units: Ref  # SMEM int32 [visits]: where they came from
    q: Ref  # VMEM [visits * unit, D] in the dtype of Inputs.q
    facts: Ref  # VMEM int32 [visits * unit, 128]
    state: Ref  # VMEM float32 [visits * unit, 128]
    part: Ref  # VMEM float32 [visits * unit, D]: to add to their output
    factor: Ref  # VMEM float32 [visits * unit, D]: what their output is multiplied with before that


class _Refs(NamedTuple):
    """All references of the kernel except those of the batch."""

    inputs: Inputs
    outputs: Outputs
    state: Ref  # scratch, VMEM float32 [rows, 128]: running maximum in lanes 0-63, running sum in 64-127

    def keys(self) -> Keys:
        """The current block of keys."""
        return Keys(self.inputs.k[...], self.inputs.v[...], self.inputs.places[...])


class _Rows(NamedTuple):
    """Rows of queries, as arrays."""

    q: Array  # [X, D]
    facts: Array  # int32 [X, 128]
    state: Array  # float32 [X, 128]


def _kernel(plan: Plan, inputs: Inputs, outputs: Outputs, state: Ref, batch: _Batch | None = None) -> None:
    """One grid step: a tile of queries against block n of keys."""
    refs = _Refs(inputs, outputs, state)
    n = pl.program_id(2)
    action = inputs.table[0, 0]

    @pl.when(n == 0)
    def _() -> None:
        outputs.out[...] = jnp.zeros_like(outputs.out)
        lane = jax.lax.broadcasted_iota(jnp.int32, state.shape, 1)
        state[...] = jnp.where(lane < LANES // 2, common.NEVER, 0.0)

    @pl.when(action == common.DIRECT)
    def _() -> None:
        _attend_all(plan, n, refs)

    if batch is not None:
        pl.when(action == common.GATHER)(functools.partial(_attend_visitors, plan, n, refs, batch))

    @pl.when(n == plan.blocks - 1)
    def _() -> None:
        _finish(plan, refs)


def _attend_all(plan: Plan, n: Array, refs: _Refs) -> None:
    """Add a block's part to all rows, a chunk of rows at a time."""
    out, state = refs.outputs.out, refs.state

    def chunk(rows: Slice) -> None:
        queries = _Rows(refs.inputs.q[rows, :], refs.inputs.facts[rows, :], state[rows, :])
        part, factor, state[rows, :] = _softmax_step(plan, n, queries, refs.keys())
        out[rows, :] = out[rows, :] * factor + part

    common.in_chunks(plan, chunk)


def _attend_visitors(plan: Plan, n: Array, refs: _Refs, batch: _Batch) -> None:
    """Add a block's part to the units that visit it, a batch of units at a time."""
    out, state = refs.outputs.out, refs.state

    def flush(count: Array) -> None:
        queries = _Rows(batch.q[...], batch.facts[...], batch.state[...])
        part, factor, new = _softmax_step(plan, n, queries, refs.keys())
        batch.part[...] = part
        batch.factor[...] = jnp.broadcast_to(factor, batch.factor.shape)
        batch.state[...] = new

        def put(i: Array, carry: None) -> None:
            here, there = common.unit_rows(plan, i), common.unit_rows(plan, batch.units[i])
            out[there, :] = out[there, :] * batch.factor[here, :] + batch.part[here, :]
            state[there, :] = batch.state[here, :]

        jax.lax.fori_loop(0, count, put, None)

    pairs = ((refs.inputs.q, batch.q), (refs.inputs.facts, batch.facts), (state, batch.state))
    common.visit(plan, refs.inputs.table, batch.units, pairs, flush)


def _softmax_step(plan: Plan, n: Array, rows: _Rows, keys: Keys) -> tuple[Array, Array, Array]:
    """One block's part of an online softmax.

    Args:
      plan: static sizes.
      n: int32, the block.
      rows: queries, X of them.
      keys: the block's keys and values.

    Returns:
      What to add to the output, float32 [X, D]; the factor for what the output held before, float32 [X, 1];
      and the new state, float32 [X, 128].
    """
    seen = common.visible(plan, n, rows.facts, keys.places)
    logits = jnp.where(seen, common.logits(plan, rows.q, keys), common.NEVER)
    top, total = rows.state[:, :1], rows.state[:, LANES // 2 : LANES // 2 + 1]
    new_top = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(logits - new_top), 0.0)
    factor = jnp.exp(top - new_top)
    new_total = factor * total + jnp.sum(weights, axis=1, keepdims=True)
    lane = jax.lax.broadcasted_iota(jnp.int32, rows.state.shape, 1)
    part = common.dot(weights, keys.v, (1, 0))
    return part, factor, jnp.where(lane < LANES // 2, new_top, new_total)


def _finish(plan: Plan, refs: _Refs) -> None:
    """Divide by the softmax's sum; a row that saw nothing gets 0."""
    out, lse = refs.outputs

    def chunk(rows: Slice) -> None:
        top, total = refs.state[rows, :1], refs.state[rows, LANES // 2 : LANES // 2 + 1]
        total = jnp.where(total > 0, total, 1.0)
        out[rows, :] = out[rows, :] / total
        lse[rows, :] = jnp.broadcast_to(top + jnp.log(total), (plan.chunk, LANES))

    common.in_chunks(plan, chunk)


def forward(plan: Plan, inputs: Inputs) -> tuple[Array, Array]:
    """Attention of one tile of queries.

    Args:
      plan: static sizes.
      inputs: whole arrays: ``table`` int32 [B, K, N, 1, 1 + words], ``places`` int32 [B, K, N, 8, W],
        ``q`` [B, K, rows, D], ``facts`` int32 [B, K or 1, rows, registers * 128], ``k`` and ``v``
        [B, K, N * W, D]. ``q`` is float32 if ``plan.routed``, because narrower rows do not move one unit at
        a time. Keys and values that no query sees must be finite.

    Returns:
      float32 [B, K, rows, D], 0 where a row sees nothing, and the log-sum-exp of the logits,
      float32 [B, K, rows].
    """
    batch, kv_heads, rows, dim = inputs.q.shape
    spec = common.block_specs(plan, dim, inputs.facts.shape[1] > 1)
    scratch: list[object] = [pltpu.VMEM((rows, LANES), jnp.float32)]
    if plan.routed:
        gathered = plan.visits * plan.unit
        scratch.append(
            _Batch(
                units=pltpu.SMEM((plan.visits,), jnp.int32),
                q=pltpu.VMEM((gathered, dim), inputs.q.dtype),
                facts=pltpu.VMEM((gathered, LANES), jnp.int32),
                state=pltpu.VMEM((gathered, LANES), jnp.float32),
                part=pltpu.VMEM((gathered, dim), jnp.float32),
                factor=pltpu.VMEM((gathered, dim), jnp.float32),
            )
        )
    ((out, lse),) = common.call(
        _kernel,
        plan,
        "gaze_prefill_forward",
        (batch, kv_heads, plan.blocks),
        in_specs=[Inputs(*(spec[name] for name in ("table", "places", "rows", "facts", "keys", "keys")))],
        out_specs=[Outputs(spec["rows"], spec["numbers"])],
        out_shape=[
            Outputs(
                out=jax.ShapeDtypeStruct(inputs.q.shape, jnp.float32),
                lse=jax.ShapeDtypeStruct((batch, kv_heads, rows, LANES), jnp.float32),
            )
        ],
        scratch_shapes=scratch,
    )(inputs)
    return out, lse[..., 0]
