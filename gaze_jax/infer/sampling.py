"""Which token comes next: greedy, at a temperature, out of the likeliest ones."""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gaze_jax.errors import UserError

Array = jax.Array

_MOST = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How each row's tokens are drawn; a row depends on nothing but its own numbers.

    Attributes:
      temperature: float32 [B], 0 is greedy.
      top_k: int32 [B]: the so many likeliest tokens are drawn from (arXiv 1805.04833). 0 leaves all. It goes
        before ``top_p``, which is then of the probability that they share.
      top_p: float32 [B], of the probability: the likeliest tokens that reach it together are drawn from
        (nucleus sampling, arXiv 1904.09751). 1 leaves all.
      seed: uint32 [B].
    """

    temperature: Any
    top_k: Any
    top_p: Any
    seed: Any

    @classmethod
    def of(
        cls,
        temperature: Sequence[float],
        top_p: Sequence[float] | None = None,
        seed: Sequence[int] = (),
        top_k: Sequence[int | None] | None = None,
    ) -> "SamplingParams":
        """Of numbers for each row; a ``top_k`` of None is 0.

        Raises:
          UserError: one is out of range.
        """
        rows = len(temperature)
        top_p = [1.0] * rows if top_p is None else top_p
        top_k = [None] * rows if top_k is None else top_k
        seed = seed or [0] * rows
        for row in zip(temperature, top_p, seed, top_k, strict=True):
            check_sampling(*row)
        return cls(
            np.asarray(temperature, np.float32),
            # More than any vocabulary has is all of it.
            np.asarray([min(k or 0, _MOST) for k in top_k], np.int32),
            np.asarray(top_p, np.float32),
            np.asarray(seed, np.uint32),
        )


def check_sampling(temperature: float, top_p: float, seed: int, sample_top_k: int | None = None) -> None:
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
    try:
        count = 0 if sample_top_k is None else operator.index(sample_top_k)
    except TypeError as error:
        raise UserError(f"sample_top_k={sample_top_k!r} must be a whole number of tokens.") from error
    if count < 0:
        raise UserError(f"sample_top_k={sample_top_k} must be at least 1; 0 draws from all tokens.")


def likeliest(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Logits with -inf for what is not drawn from: first by ``top_k``, then by ``top_p`` of what is left.

    The likeliest token always stays, and of equal ones all that a cut falls on, as in vLLM and transformers:
    with ties, more than ``top_k`` tokens may stay.

    Args:
      logits: float32 [B, V].
      top_k: int32 [B], 0 for all tokens.
      top_p: float32 [B].
    """
    tokens = logits.shape[-1]
    ranked = jnp.sort(logits, axis=-1, descending=True)
    count = jnp.where(top_k > 0, jnp.minimum(top_k, tokens), tokens)[:, None]
    least = jnp.take_along_axis(ranked, count - 1, axis=-1)
    ranked = jnp.where(ranked >= least, ranked, -jnp.inf)
    chances = jax.nn.softmax(ranked, axis=-1)
    # A token stays if what is likelier than it does not reach top_p.
    before = jnp.cumsum(chances, axis=-1) - chances
    # Rounded sums may reach 1 too early; all of the probability is all tokens.
    inside = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    kept = jnp.sum(inside, axis=-1, keepdims=True, dtype=jnp.int32)
    cut = jnp.maximum(least, jnp.take_along_axis(ranked, jnp.maximum(kept - 1, 0), axis=-1))
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
        limited = (sampling.top_p < 1) | ((sampling.top_k > 0) & (sampling.top_k < logits.shape[-1]))
        scaled = jax.lax.cond(
            jnp.any(hot & limited),
            lambda: likeliest(scaled, sampling.top_k, sampling.top_p),
            lambda: scaled,
        )

        def one(logits: Array, seed: Array, index: Array) -> Array:
            return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), index), logits)

        drawn = jax.vmap(one)(scaled, sampling.seed, index)
        return jnp.where(hot, drawn, best).astype(jnp.int32)

    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.lax.cond(jnp.any(hot), draw, lambda: best)
