"""The engine's compiled programs: prefill, extend, grow and decode.

Their sizes are rounded up to buckets (:func:`bucket`), so prompts of similar sizes share programs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gaze_jax.core.accounting import entries, mask_from_indices
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.streams import EMPTY, IGNORE, Streams
from gaze_jax.infer.sampling import SamplingParams, next_token
from gaze_jax.models import MLLM, Cache, DecodePosition, MLLMConfig
from gaze_jax.models.cache import constrained, with_free_slots, with_regions

Array = jax.Array
Params = dict[str, object]

STEPS = 16
"""Maximum number of steps in one call of the compiled loop."""

Returns = Literal["tokens", "selection", "trace"]
"""What decoding returns per step: tokens; with "selection" also the selected regions and the number of keys
read; with "trace" also the attention to every region, which costs as much as dense attention."""


def bucket(size: int) -> int:
    """Round up to 0 to 8, 10, 12, 14, 16, 20, 24, ...: four sizes per octave."""
    step = 1 << max(size - 1, 0).bit_length() >> 3
    return size if step <= 1 else -(-size // step) * step


def free_slots_for(tokens: int) -> int:
    """Text-stream slots to keep free for ``tokens`` tokens: a bucket, at least 128."""
    return bucket(max(tokens, 128))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of the decode loop.

    Attributes:
      token: int32 [B], the token that the next step reads.
      order, positions: int32 [B], order and position of that token.
      done: bool [B], rows whose answer has ended.
      index: int32 [B], number of tokens in the answer so far.
      write_index: int32 scalar, the next free text-stream slot.
      sample: int32 [B], the sample's number, the key of random routing.
    """

    token: Array | np.ndarray
    order: Array | np.ndarray
    positions: Array | np.ndarray
    done: Array | np.ndarray
    index: Array | np.ndarray
    write_index: Any
    sample: Any


def _apply(model: MLLM, params: Params, *arguments: object, **options: object) -> Any:
    apply: Callable[..., Any] = model.apply  # linen's type describes only one method's result
    return apply({"params": params}, *arguments, **options)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("spec", "free_slots"))
def prefill_step(
    model: MLLM,
    params: Params,
    images: Array | None,
    streams: Streams,
    sample: Array,
    selection: Selection,
    *,
    spec: SelectionSpec,
    free_slots: int,
) -> Cache:
    """Prefill prompts into a new cache with ``free_slots`` free text-stream slots; see ``MLLM.prefill``."""
    _, cache, _ = _apply(
        model,
        params,
        images,
        streams,
        selection,
        spec,
        free_slots=free_slots,
        sample_id=sample,
        method="prefill",
    )
    return constrained(cache)


@functools.partial(jax.jit, static_argnums=0, static_argnames="spec", donate_argnames="cache")
def extend_step(
    model: MLLM,
    params: Params,
    images: Array | None,
    streams: Streams,
    sample: Array,
    cache: Cache,
    selection: Selection,
    region: Array,
    write_index: Array,
    *,
    spec: SelectionSpec,
) -> Cache:
    """Prefill the next tokens of every row at ``region`` and ``write_index``; see ``MLLM.extend``."""
    extended = _apply(
        model,
        params,
        images,
        streams,
        cache,
        selection,
        spec,
        region=region,
        write_index=write_index,
        sample_id=sample,
        method="extend",
    )
    return constrained(extended)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("free_slots", "regions", "slots"))
def grow_cache(config: MLLMConfig, cache: Cache, *, free_slots: int, regions: int, slots: int) -> Cache:
    """Add ``free_slots`` and ``regions`` to a cache, and widen its regions to at least ``slots`` slots."""
    if regions or slots > cache.visual_order.shape[2]:
        cache = with_regions(cache, config.gaze, config.decoder.head_dim, regions=regions, slots=slots)
    return with_free_slots(cache, config.gaze, free_slots) if free_slots else cache


UPDATED = ("text_k", "text_v", "text_order")
"""Fields of the cache that a decode step updates. The others stay out of the loop, which would copy them."""

_After = tuple[dict[str, Array], DecodeState, dict[str, Array]]
_Carry = tuple[dict[str, Array], DecodeState, dict[str, Array], Array]


@functools.partial(jax.jit, static_argnums=0, static_argnames=("spec", "returns"), donate_argnames="updated")
def decode_loop(
    model: MLLM,
    params: Params,
    fixed: Cache,
    updated: dict[str, Array],
    state: DecodeState,
    selection: Selection,
    sampling: SamplingParams,
    ends: Array,
    steps: Array,
    kind: Array,
    *,
    spec: SelectionSpec,
    returns: Returns,
) -> _After:
    """Run up to ``steps`` decode steps, fewer if every row is done.

    Args:
      model, params, state, selection, sampling, spec, returns: as in :class:`Engine`.
      fixed, updated: the cache without its fields :data:`UPDATED`, which are None, and these fields.
      ends, steps: int32 [n], ids of the end tokens; int32 scalar, at most :data:`STEPS`.
      kind: int32 [B, S], the kind of token in each text-stream slot.

    Returns:
      ``updated`` and ``state`` after the last step, and the output by step: "tokens" int32 [STEPS, B], -100
      where a row was done or no step ran, and what :meth:`Engine.decode` describes for ``returns``.
    """
    spec = dataclasses.replace(spec, return_trace=returns == "trace")

    @functools.partial(jax.jit, inline=True)  # traced once, for the shapes and for the loop
    def step(updated: dict[str, Array], state: DecodeState) -> _After:
        cache = dataclasses.replace(fixed, **updated)
        # Order -1 marks a slot as empty, so what a finished row writes is never attended to.
        order = jnp.where(state.done, EMPTY, state.order)
        logits, cache, out = _apply(
            model,
            params,
            state.token,
            state.positions,
            cache,
            DecodePosition(order=order, write_index=state.write_index, sample=state.sample),
            selection,
            spec,
            method="decode",
        )
        token = next_token(logits, sampling, state.index)
        found = {"tokens": jnp.where(state.done, IGNORE, token)}
        if returns != "tokens":
            found |= _selection_stats(cache, order, kind, out, selection)
        if returns == "trace":
            found["probability"] = jnp.exp(_log_probability(logits, token))
            found |= {name: out[name] for name in ("scores", "attention", "dense") if name in out}
        after = DecodeState(
            token=jnp.where(state.done, state.token, token),
            order=jnp.where(state.done, state.order, state.order + 1),
            positions=jnp.where(state.done, state.positions, state.positions + 1),
            done=state.done | jnp.any(token[:, None] == ends[None], axis=1),
            index=jnp.where(state.done, state.index, state.index + 1),
            write_index=state.write_index + 1,
            sample=state.sample,
        )
        return {name: getattr(cache, name) for name in UPDATED}, after, found

    shapes = jax.eval_shape(step, updated, state)[2]
    rows = {name: jnp.zeros((STEPS, *a.shape), a.dtype) for name, a in shapes.items()}
    rows["tokens"] -= 100  # IGNORE

    def more(carry: _Carry) -> Array:
        _, state, _, t = carry
        return (t < steps) & ~jnp.all(state.done)

    def body(carry: _Carry) -> _Carry:
        updated, state, rows, t = carry
        updated, state, found = step(updated, state)
        rows = {name: jax.lax.dynamic_update_index_in_dim(a, found[name], t, 0) for name, a in rows.items()}
        return updated, state, rows, t + 1

    updated, state, rows, _ = jax.lax.while_loop(more, body, (updated, state, rows, jnp.zeros((), jnp.int32)))
    cache = constrained(dataclasses.replace(fixed, **updated))
    return {name: getattr(cache, name) for name in UPDATED}, state, rows


def _log_probability(logits: Array, token: Array) -> Array:
    """float32 [B], of the tokens int32 [B] under the softmax of logits float32 [B, V]."""
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _selection_stats(
    cache: Cache, order: Array, kind: Array, out: dict[str, Array], selection: Selection
) -> dict[str, Array]:
    """The regions that the queries of one step selected, and the number of keys they attended to."""
    valid = (cache.visual_order >= 0) & (cache.visual_order <= order[:, None, None])
    seen = (cache.text_order >= 0) & (cache.text_order <= order[:, None])
    selected = None
    if "indices" in out:
        selected = mask_from_indices(out["indices"], cache.visual_order.shape[1])
        if selection.full_layers is not None:
            earlier = (cache.last >= 0) & (cache.last <= order[:, None])
            selected |= selection.full_layers[:, None, None, None] & earlier[None, :, None, :]
    counts = entries(valid, seen, kind, selected=selected)
    parts = jnp.broadcast_arrays(counts.visual, counts.newline, counts.context, counts.text)
    found = {
        "entries": jnp.stack(parts, axis=-1),
        "visual_tokens": jnp.sum(valid, axis=(1, 2), dtype=jnp.int32),
    }
    if found["entries"].ndim == 2:
        found["entries"] = found["entries"][None]  # dense attention: the same in every layer
    return found if selected is None else found | {"selected": selected}
