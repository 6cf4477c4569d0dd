"""Which token comes next: greedy, at a temperature, out of the likeliest ones."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gaze_jax.errors import UserError

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How each row's tokens are drawn; a row depends on nothing but its own numbers.

    Attributes:
      temperature: float32 [B], 0 is greedy.
      top_p: float32 [B], of the probability: the likeliest tokens that reach it together are drawn from
        (nucleus sampling, arXiv 1904.09751). 1 leaves all.
      seed: uint32 [B].
    """

    temperature: Any
    top_p: Any
    seed: Any

    @classmethod
    def of(
        cls, temperature: Sequence[float], top_p: Sequence[float] | None = None, seed: Sequence[int] = ()
    ) -> "SamplingParams":
        """Of numbers for each row.

        Raises:
          UserError: one is out of range.
        """
        rows = len(temperature)
        top_p = [1.0] * rows if top_p is None else top_p
        seed = seed or [0] * rows
        for row in zip(temperature, top_p, seed, strict=True):
            check_sampling(*row)
        return cls(
            np.asarray(temperature, np.float32), np.asarray(top_p, np.float32), np.asarray(seed, np.uint32)
        )


def check_sampling(temperature: float, top_p: float, seed: int) -> None:
    """Refuse numbers that no token can be drawn with.

    Raises:
      UserError: one is out of range.
    """
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature={temperature} must be a finite number, 0 or more.")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} must be above 0 and at most 1.")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} must be between 0 and 2**32 - 1.")


def nucleus(logits: Array, top_p: Array) -> Array:
    """Logits with -inf for what is not among the likeliest tokens that reach ``top_p`` together.

    The likeliest token always stays, and of equal ones all that the cut falls on.

    Args:
      logits: float32 [B, V].
      top_p: float32 [B].
    """
    ranked = jnp.sort(logits, axis=-1, descending=True)
    chances = jax.nn.softmax(ranked, axis=-1)
    # A token stays if what is likelier than it does not reach top_p.
    before = jnp.cumsum(chances, axis=-1) - chances
    # Rounded sums may reach 1 too early; all of the probability is all tokens.
    inside = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    kept = jnp.sum(inside, axis=-1, keepdims=True, dtype=jnp.int32)
    cut = jnp.take_along_axis(ranked, jnp.maximum(kept - 1, 0), axis=-1)
    return jnp.where(logits >= cut, logits, -jnp.inf)


def next_token(logits: Array, sampling: SamplingParams, index: Array) -> Array:
    """Draw a token for each row.

    Args:
      logits: float32 [B, V].
      sampling: of the rows.
      index: int32 [B], number of the token in its answer.

    Returns:
      int32 [B].
    """
    # Smaller numbers are 0 to a device.
    hot = sampling.temperature >= jnp.finfo(jnp.float32).tiny

    def draw() -> Array:
        # Of differences, the likeliest being 0: a temperature near 0 makes the others -inf, and nothing NaN.
        differences = logits - jnp.max(logits, axis=-1, keepdims=True)
        scaled = differences / jnp.where(hot, sampling.temperature, 1.0)[:, None]
        # Sorting a vocabulary is worth avoiding where nobody asked for it.
        some = jnp.any(sampling.top_p < 1)
        scaled = jax.lax.cond(some, lambda: nucleus(scaled, sampling.top_p), lambda: scaled)

        def one(logits: Array, seed: Array, index: Array) -> Array:
            return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), index), logits)

        drawn = jax.vmap(one)(scaled, sampling.seed, index)
        return jnp.where(hot, drawn, best).astype(jnp.int32)

    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.lax.cond(jnp.any(hot), draw, lambda: best)
