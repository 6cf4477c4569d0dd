"""One conversation token by token: read a prompt once, answer, go on with what follows.

The cache is kept, so that a later turn costs its own tokens only. For a batch of prompts that is answered
once, ``infer.generate`` runs the whole loop as one program.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gaze_jax.core.accounting import mask_from_indices
from gaze_jax.core.streams import Streams
from gaze_jax.data.pipeline import prompt_length, stack
from gaze_jax.data.processor import pad_to
from gaze_jax.errors import UserError
from gaze_jax.infer.generate import Params, next_token
from gaze_jax.models import MLLM, Cache, MLLMConfig, Step
from gaze_jax.models.cache import with_room

Array = jax.Array


@functools.partial(jax.jit, static_argnums=0, static_argnames="room")
def _prefill(
    model: MLLM, params: Params, images: Array, streams: Streams, top_k: Array | None, *, room: int
) -> Any:
    apply: Callable[..., Any] = model.apply  # linen's own type knows one method's result only
    return apply({"params": params}, images, streams, room=room, top_k=top_k, method="prefill")


@functools.partial(jax.jit, static_argnums=0, static_argnames="capacity", donate_argnames="cache")
def _step(
    model: MLLM,
    params: Params,
    token: Array,
    order: Array,
    pos: Array,
    slot: Array,
    cache: Cache,
    top_k: Array | None,
    *,
    capacity: int | None,
) -> Any:
    apply: Callable[..., Any] = model.apply
    step = Step(order=order, slot=slot, sample=jnp.zeros_like(order))
    logits, cache, out = apply(
        {"params": params}, token, pos, cache, step, top_k=top_k, capacity=capacity, method="decode"
    )
    indices = out.get("indices")
    regions = cache.visual_order.shape[1]
    return logits, cache, None if indices is None else mask_from_indices(indices, regions)


_draw = jax.jit(next_token)


@dataclasses.dataclass(frozen=True, eq=False)
class Emitted:
    """One generated token.

    Attributes:
      token: its id.
      selected: bool [L, Hs, R], the regions that the query which emitted it attended to; None under dense
        attention.
    """

    token: int
    selected: np.ndarray | None


class Session:
    """A conversation with one model; holds the cache.

    Args:
      config, params: of the model.
      arrays: of the first prompt, from ``data.processor.process``.
      room: tokens that may follow it, generated and read; :meth:`grow` makes more.
      top_k: regions per query; None is dense attention, as is anything where nothing is shown.

    Raises:
      UserError: ``top_k`` or ``room`` is out of range.
    """

    def __init__(
        self,
        config: MLLMConfig,
        params: Params,
        arrays: Mapping[str, np.ndarray],
        *,
        room: int,
        top_k: int | None,
    ) -> None:
        self.regions = len(arrays["visual_src"])
        if top_k is not None and self.regions and not 1 <= top_k <= self.regions:
            raise UserError(
                f"top_k={top_k} must be between 1 and {self.regions}, the regions of what is shown."
            )
        top_k = top_k if self.regions else None  # nothing is shown, so there is nothing to select
        if room < 1:
            raise UserError(f"room={room} must be at least 1 token.")
        self._model, self._params = MLLM(config), params
        self._budget = None if top_k is None else jnp.asarray(top_k, jnp.int32)
        self._capacity = top_k
        dense = prompt_length(len(arrays["tokens"]))
        padded = pad_to(dict(arrays), regions=self.regions, dense=dense, images=len(arrays["images"]))
        batch = {name: jnp.asarray(value) for name, value in stack([padded]).items()}
        streams = Streams.from_batch(batch)
        logits, cache, out = _prefill(self._model, params, batch["images"], streams, self._budget, room=room)
        self._logits, self._cache = logits, cache
        self._selected = out.get("selected")
        self._slot, self._end = dense, cache.dense_order.shape[1]
        self._order = 1 + max(_last(arrays, "order"), -1)
        self._pos = 1 + max(_last(arrays, "pos"), -1)

    @property
    def logits(self) -> np.ndarray:
        """float32 [V], of the token that comes next."""
        return np.asarray(self._logits[0])

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self._end - self._slot

    def grow(self, tokens: int) -> None:
        """Make room for as many tokens; a larger cache is compiled for once."""
        if tokens > self.room:
            more = prompt_length(tokens - self.room)
            self._cache = with_room(self._cache, self._model.config.gaze, more)
            self._end = self._cache.dense_order.shape[1]

    def feed(self, tokens: Sequence[int]) -> None:
        """Read tokens as if the model had said them.

        Raises:
          UserError: they do not fit the cache.
        """
        if len(tokens) > self.room:
            raise UserError(
                f"{len(tokens)} tokens follow but the cache has room for {self.room}; let it grow first."
            )
        for token in tokens:
            self._logits, self._cache, self._selected = _step(
                self._model,
                self._params,
                jnp.asarray([token], jnp.int32),
                jnp.asarray([self._order], jnp.int32),
                jnp.asarray([self._pos], jnp.int32),
                jnp.asarray(self._slot, jnp.int32),
                self._cache,
                self._budget,
                capacity=self._capacity,
            )
            self._order, self._pos, self._slot = self._order + 1, self._pos + 1, self._slot + 1

    def generate(
        self, max_tokens: int, *, end_ids: Collection[int], temperature: float = 0.0, seed: int = 0
    ) -> Iterator[Emitted]:
        """Emit tokens until one of ``end_ids``, which is emitted too, or ``max_tokens`` of them.

        What was emitted has been read when the next token is asked for, but for the last token: :meth:`feed`
        it with what follows.

        Args:
          max_tokens: at most this many; the cache must have room for all but the last.
          end_ids: tokens that end the answer.
          temperature: 0 is greedy.
          seed: of the sampling.

        Raises:
          UserError: a number is out of range, or there is no room.
        """
        check_sampling(max_tokens, temperature, seed)
        key, heat = jax.random.key(seed), jnp.asarray(temperature, jnp.float32)
        for t in range(max_tokens):
            token = int(_draw(self._logits, heat, jax.random.fold_in(key, t))[0])
            yield Emitted(token, None if self._selected is None else np.asarray(self._selected[:, 0]))
            if token in end_ids or t + 1 == max_tokens:
                return
            self.feed([token])


def check_sampling(max_tokens: int, temperature: float, seed: int) -> None:
    """Refuse numbers that no answer can be generated with.

    Raises:
      UserError: one is out of range.
    """
    if max_tokens < 1 or not temperature >= 0 or not 0 <= seed < 2**32:
        raise UserError(
            f"max_tokens={max_tokens} must be at least 1, temperature={temperature} not negative and "
            f"seed={seed} between 0 and 2**32 - 1."
        )


def _last(arrays: Mapping[str, np.ndarray], name: str) -> int:
    """The largest order or position of a prompt, of either stream."""
    values = (arrays[f"visual_{name}"], arrays[f"dense_{name}"])
    return max(int(a.max(initial=-1)) for a in values)
