"""The programs that a session runs: read a prompt, read on, decode; and the sizes that decide about them.

Sizes are buckets (:func:`bucket`): prompts of similar sizes share programs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gaze_jax.core.accounting import entries
from gaze_jax.core.streams import EMPTY, IGNORE, Streams
from gaze_jax.infer.sampling import Sampling, next_token
from gaze_jax.models import MLLM, Cache, MLLMConfig, Step
from gaze_jax.models.cache import constrained, with_regions, with_room

Array = jax.Array
Params = dict[str, object]

STEPS = 16
"""Most steps of one call of the compiled loop."""


def bucket(size: int) -> int:
    """The least of 0 to 8, 10, 12, 14, 16, 20, 24, ... that is not smaller: four sizes an octave."""
    unit = 1 << max(size - 1, 0).bit_length() >> 3
    return size if unit <= 1 else -(-size // unit) * unit


def room_for(tokens: int) -> int:
    """Dense slots to keep free for so many, few sizes of them so that few programs compile."""
    return bucket(max(tokens, 128))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Look:
    """What the rows' queries may select.

    Attributes:
      top_k: int32 or fraction [L, B, 1]; None is dense attention.
      bias: float32 [L, B, R] of :func:`gaze_jax.core.routing.steer`, or None. A session fills up what is
        given of fewer regions.
      whole: bool [L], layers that read every region, or None.
    """

    top_k: Any = None
    bias: Any = None
    whole: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turn:
    """Where every row stands.

    Attributes:
      token: int32 [B], read by the next step.
      order, pos: int32 [B], of that token.
      done: bool [B], rows that say nothing more.
      index: int32 [B], tokens that the answer has so far.
      slot: int32 scalar, the next free dense slot.
    """

    token: Any
    order: Any
    pos: Any
    done: Any
    index: Any
    slot: Any


def _apply(model: MLLM, params: Params, *arguments: Any, **options: Any) -> Any:
    apply: Callable[..., Any] = model.apply  # linen's own type knows one method's result only
    return apply({"params": params}, *arguments, **options)


@functools.partial(jax.jit, static_argnums=0, static_argnames="room")
def begin(
    model: MLLM, params: Params, images: Array | None, streams: Streams, look: Look, *, room: int
) -> Cache:
    """Read prompts into a new cache with ``room`` free dense slots; see ``MLLM.prefill``."""
    _, cache, _ = _apply(
        model,
        params,
        images,
        streams,
        room=room,
        top_k=look.top_k,
        bias=look.bias,
        collect=False,
        method="prefill",
    )
    return constrained(cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
def extend(
    model: MLLM,
    params: Params,
    images: Array | None,
    streams: Streams,
    cache: Cache,
    look: Look,
    region: Array,
    slot: Array,
) -> Cache:
    """Read what comes next in every row, at ``region`` and ``slot``; see ``MLLM.extend``."""
    extended = _apply(
        model,
        params,
        images,
        streams,
        cache,
        region=region,
        slot=slot,
        top_k=look.top_k,
        bias=look.bias,
        method="extend",
    )
    return constrained(extended)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("room", "regions", "slots"))
def grown(config: MLLMConfig, cache: Cache, *, room: int, regions: int, slots: int) -> Cache:
    """The cache with ``room`` more dense slots and as many ``regions``, each of ``slots`` or more."""
    if regions or slots > cache.visual_order.shape[2]:
        cache = with_regions(cache, config.gaze, config.decoder.head_dim, regions=regions, slots=slots)
    return with_room(cache, config.gaze, room) if room else cache


MOVING = ("dense_k", "dense_v", "dense_order")
"""What a decoding step changes of a cache. The rest stays out of the loop, which would copy it."""


@functools.partial(jax.jit, static_argnums=0, static_argnames=("capacity", "watch"), donate_argnames="moving")
def say_steps(
    model: MLLM,
    params: Params,
    still: Cache,
    moving: dict[str, Array],
    turn: Turn,
    look: Look,
    sampling: Sampling,
    ends: Array,
    steps: Array,
    kind: Array,
    *,
    capacity: int | None,
    watch: bool,
) -> tuple[dict[str, Array], Turn, dict[str, Array]]:
    """Up to ``steps`` decoding steps, fewer when every row is done.

    Args:
      still: the cache; of it everything but ``moving`` is read.
      moving: its fields :data:`MOVING`.
      The others are those of :meth:`Session.say`.

    Returns:
      ``moving`` and where the rows stand after it, and by step: "tokens" int32 [STEPS, B], -100 where a row
      was done or no step ran; with ``watch`` also what :meth:`Session.say` describes.
    """

    def step(moving: dict[str, Array], turn: Turn) -> tuple[dict[str, Array], Turn, dict[str, Array]]:
        cache = dataclasses.replace(still, **moving)
        # What a finished row writes is nobody's: order -1 is empty.
        order = jnp.where(turn.done, EMPTY, turn.order)
        logits, cache, out = _apply(
            model,
            params,
            turn.token,
            turn.pos,
            cache,
            Step(order=order, slot=turn.slot, sample=jnp.zeros_like(order)),
            top_k=look.top_k,
            capacity=capacity,
            bias=look.bias,
            whole=look.whole,
            watch=watch,
            method="decode",
        )
        token = next_token(logits, sampling, turn.index)
        found = {"tokens": jnp.where(turn.done, IGNORE, token)}
        if watch:
            found |= _watched(cache, order, kind, out)
        after = Turn(
            token=jnp.where(turn.done, turn.token, token),
            order=jnp.where(turn.done, turn.order, turn.order + 1),
            pos=jnp.where(turn.done, turn.pos, turn.pos + 1),
            done=turn.done | jnp.any(token[:, None] == ends[None], axis=1),
            index=jnp.where(turn.done, turn.index, turn.index + 1),
            slot=turn.slot + 1,
        )
        return {name: getattr(cache, name) for name in MOVING}, after, found

    shapes = jax.eval_shape(step, moving, turn)[2]
    rows = {name: jnp.zeros((STEPS, *a.shape), a.dtype) for name, a in shapes.items()}
    rows["tokens"] -= 100  # IGNORE

    def more(state: Any) -> Array:
        _, turn, _, t = state
        return (t < steps) & ~jnp.all(turn.done)

    def body(state: Any) -> Any:
        moving, turn, rows, t = state
        moving, turn, found = step(moving, turn)
        rows = {name: jax.lax.dynamic_update_index_in_dim(a, found[name], t, 0) for name, a in rows.items()}
        return moving, turn, rows, t + 1

    moving, turn, rows, _ = jax.lax.while_loop(more, body, (moving, turn, rows, jnp.zeros((), jnp.int32)))
    whole = constrained(dataclasses.replace(still, **moving))
    return {name: getattr(whole, name) for name in MOVING}, turn, rows


def _watched(cache: Cache, order: Array, kind: Array, out: dict[str, Array]) -> dict[str, Array]:
    """Of one step: where it looked and what that counts."""
    valid = (cache.visual_order >= 0) & (cache.visual_order <= order[:, None, None])
    seen = (cache.dense_order >= 0) & (cache.dense_order <= order[:, None])
    selected = out.get("selected")
    counts = entries(valid, seen, kind, selected=selected)
    parts = jnp.broadcast_arrays(counts.visual, counts.newline, counts.context, counts.text)
    found = {
        "entries": jnp.stack(parts, axis=-1),
        "visual_tokens": jnp.sum(valid, axis=(1, 2), dtype=jnp.int32),
    }
    if found["entries"].ndim == 2:
        found["entries"] = found["entries"][None]  # dense attention: every layer the same
    names = [name for name in ("selected", "scores", "attention", "dense") if name in out]
    return found | {name: out[name] for name in names}
