"""gaze_prefill: attention of many queries, forward and backward.

Query t and head h see a key if it is valid, in the query's segment, inside the query's window and, for a
*routed* query and a visual key, in a region that ``selected`` marks for that head. The output is one softmax
over all seen keys; a query that sees nothing outputs 0. K and V of tokens that a query does not see may hold
anything, including NaN: they do not change its output, and what no query sees gets a gradient of exactly 0.
Any axis but K, H and D may be empty.
"""

import dataclasses
from types import MappingProxyType

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import KERNELS, check_shape, find, pick
from pallas_kernels.gaze_prefill import reference, tpu, xla
from pallas_kernels.softmax import WithLse
from pallas_kernels.spec import GazeSpec, KeyPlaces, Windows

IMPLEMENTATIONS = MappingProxyType({"reference": reference, "xla": xla, "tpu": tpu})


def supports(implementation: str, spec: GazeSpec) -> str | None:
    """None if ``implementation`` can run ``spec`` here, else the reason why not."""
    return find("gaze_prefill", IMPLEMENTATIONS, implementation).supports(spec)


def compiler_splits(implementation: str, visual_k: jax.Array, text_k: jax.Array, spec: GazeSpec) -> bool:
    """Whether XLA may split a call over the rows of a mesh; where not, it needs ``jax.shard_map``.

    A kernel is a program for one device, and attention in chunks takes one row after the other.
    """
    if implementation in KERNELS:
        return False
    return implementation != "xla" or not xla.in_chunks(visual_k, text_k, spec)


def gaze_prefill(
    q: jax.Array,
    visual_k: jax.Array,
    visual_v: jax.Array,
    text_k: jax.Array,
    text_v: jax.Array,
    queries: Windows,
    places: KeyPlaces,
    selected: jax.Array | None,
    *,
    spec: GazeSpec,
    implementation: str,
) -> jax.Array:
    """The output of :func:`gaze_prefill_with_lse`, [B, T, H, D]."""
    arguments = (q, visual_k, visual_v, text_k, text_v, queries, places, selected)
    return gaze_prefill_with_lse(*arguments, spec=spec, implementation=implementation)[0]


def gaze_prefill_with_lse(
    q: jax.Array,
    visual_k: jax.Array,
    visual_v: jax.Array,
    text_k: jax.Array,
    text_v: jax.Array,
    queries: Windows,
    places: KeyPlaces,
    selected: jax.Array | None,
    *,
    spec: GazeSpec,
    implementation: str,
) -> WithLse:
    """Attend to windows of both streams; of the visual keys, routed queries see only selected regions.

    Args:
      q: [B, T, H, D].
      visual_k, visual_v: [B, K, R, P, D].
      text_k, text_v: [B, K, S, D].
      queries: [B, T] windows.
      places: order and segment of the keys.
      selected: bool [B, T, Hs, R]; None: no query is routed, each attends to its whole window.
      spec: static choices.
      implementation: a key of ``IMPLEMENTATIONS``.

    Returns:
      [B, T, H, D] in ``q.dtype``; the softmax is computed in float32. And the log-sum-exp of each query's
      logits, float32 [B, T, H], by which the outputs of several calls over different keys are joined; -inf
      for a query that sees nothing.

    Raises:
      ValueError: a shape does not fit, or the implementation's name is unknown.
      NotImplementedError: the named implementation cannot run this spec here.
    """
    op = "gaze_prefill"
    module = pick(op, IMPLEMENTATIONS, implementation, spec)
    batch, length, heads, dim = q.shape
    kv_heads, regions, slots = visual_k.shape[1:4]
    text = text_k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{op}: {heads} query heads are not a multiple of {kv_heads} kv heads.")
    for name, array in (("visual_k", visual_k), ("visual_v", visual_v)):
        check_shape(op, name, array, (batch, kv_heads, regions, slots, dim))
    for name, array in (("text_k", text_k), ("text_v", text_v)):
        check_shape(op, name, array, (batch, kv_heads, text, dim))
    for field in dataclasses.fields(queries):
        check_shape(op, f"queries.{field.name}", getattr(queries, field.name), (batch, length))
    check_shape(op, "places.visual_order", places.visual_order, (batch, regions, slots))
    check_shape(op, "places.region_segment", places.region_segment, (batch, regions))
    check_shape(op, "places.text_order", places.text_order, (batch, text))
    check_shape(op, "places.text_segment", places.text_segment, (batch, text))
    if selected is not None:
        shared = heads if spec.select_per == "head" else kv_heads
        expected = (batch, length, shared, regions)
        check_shape(op, f"selected (select_per {spec.select_per!r})", selected, expected)
    if q.size == 0:
        return jnp.zeros_like(q), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
    return module.gaze_prefill(q, visual_k, visual_v, text_k, text_v, queries, places, selected, spec=spec)
