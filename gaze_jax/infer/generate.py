"""Greedy answers of a batch of prompts and what they looked at, in one program: what evaluation counts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gaze_jax.core.accounting import Entries, entries, mask_from_indices
from gaze_jax.core.routing import Routing
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.streams import IGNORE, Kind, Streams
from gaze_jax.models import MLLM, Cache, DecodePosition

Array = jax.Array
Params = dict[str, object]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """What a model said and where it looked.

    Attributes:
      tokens: int32 [A, B]; -100 after a row's end token.
      selected: bool [A, L, B, Hs, R], the regions that the query *emitting* each token attended to;
        None under dense attention.
      entries: what those queries attended to, float32 [A, L, B] each (mean over heads).
    """

    tokens: Array
    selected: Array | None
    entries: Entries


@dataclasses.dataclass(frozen=True)
class Generator:
    """Compiled generation for one model; a new batch shape compiles once.

    Attributes:
      model: the network.
      length: A, the most tokens to generate.
      end_id: the token that ends an answer.
      route: where region scores come from.
    """

    model: MLLM
    length: int
    end_id: int
    route: Routing = Routing()

    def __call__(
        self,
        params: Params,
        images: Array,
        streams: Streams,
        *,
        top_k: int | None,
        sample_id: Array | None = None,
    ) -> Generation:
        """Answer a batch of prompts, one per row.

        Args:
          params: of the model.
          images: float32 [B, N, image_size, image_size, 3], all that the tower reads.
          streams: prompts, one sample per row, any padding.
          top_k: regions per query, traced; None is dense attention.
          sample_id: int32 [B], matters to random routing only.
        """
        sample = jnp.zeros(streams.tokens.shape[0], jnp.int32) if sample_id is None else sample_id
        budget = None if top_k is None else jnp.asarray(top_k, jnp.int32)
        return _run(self, params, images, streams, budget, sample)


def _likeliest(logits: Array) -> Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def _run(
    generator: Generator,
    params: Params,
    images: Array,
    streams: Streams,
    top_k: Array | None,
    sample: Array,
) -> Generation:
    model, route, length = generator.model, generator.route, generator.length
    variables = {"params": params}
    apply: Callable[..., Any] = model.apply  # linen's own type knows one method's result only
    logits, cache, out = apply(
        variables,
        images,
        streams,
        Selection(top_k),
        SelectionSpec(route, return_trace=True),
        free_slots=length,
        sample_id=sample,
        method="prefill",
    )
    slots = streams.tokens.shape[1]
    last = jnp.max(jnp.where(streams.text_segment >= 0, streams.text_order, -1), axis=1)
    last_positions = jnp.max(jnp.where(streams.text_segment >= 0, streams.text_positions, -1), axis=1)
    # Whatever is decoded is text.
    kind = jnp.pad(streams.kind, ((0, 0), (0, length)), constant_values=Kind.TEXT)

    def count(cache: Cache, order: Array, selected: Array | None) -> Entries:
        valid = (cache.visual_order >= 0) & (cache.visual_order <= order[:, None, None])
        seen = (cache.text_order >= 0) & (cache.text_order <= order[:, None])
        found = entries(valid, seen, kind, selected=selected)
        layers = model.config.decoder.depth
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (layers, *a.shape[-1:])), found)

    def step(carry: tuple[Cache, Array, Array], t: Array) -> tuple[tuple[Cache, Array, Array], Generation]:
        cache, token, done = carry
        order = last + 1 + t
        logits, cache, out = apply(
            variables,
            jnp.maximum(token, 0),
            last_positions + 1 + t,
            cache,
            DecodePosition(order=order, write_index=slots + t, sample=sample),
            Selection(top_k),
            SelectionSpec(route),
            method="decode",
        )
        indices = out.get("indices")
        regions = cache.visual_order.shape[1]
        selected = None if indices is None else mask_from_indices(indices, regions)
        new = _likeliest(logits)
        done = done | (token == generator.end_id)
        new = jnp.where(done, IGNORE, new)
        return (cache, new, done), Generation(new, selected, count(cache, order, selected))

    first = _likeliest(logits)
    begun = Generation(first, out.get("selected"), count(cache, last, out.get("selected")))
    carry = (cache, first, jnp.zeros(first.shape, bool))
    _, rest = jax.lax.scan(step, carry, jnp.arange(length - 1, dtype=jnp.int32))
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), begun, rest)
