"""Sampling: greedy, by temperature, top-k and top-p."""

import dataclasses
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gaze_jax.errors import UserError

Array = jax.Array

_MOST = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How each row's tokens are drawn; rows do not affect each other.

    Attributes:
      temperature: float32 [B]; 0 is greedy.
      top_k: int32 [B]; draw from the k most likely tokens (arXiv 1805.04833). 0 means all. It is applied
        before ``top_p``.
      top_p: float32 [B]; draw from the most likely tokens whose probabilities, renormalised after ``top_k``,
        add up to this (nucleus sampling, arXiv 1904.09751). 1 means all.
      seed: uint32 [B].
    """

    temperature: Array | np.ndarray
    top_k: Array | np.ndarray
    top_p: Array | np.ndarray
    seed: Array | np.ndarray

    @classmethod
    def of(
        cls,
        temperature: Sequence[float],
        top_p: Sequence[float] | None = None,
        seed: Sequence[int] = (),
        top_k: Sequence[int | None] | None = None,
    ) -> "SamplingParams":
        """Build from one number per row; a ``top_k`` of None means 0.

        Raises:
          UserError: a number is out of range.
        """
        rows = len(temperature)
        top_p = [1.0] * rows if top_p is None else top_p
        top_k = [None] * rows if top_k is None else top_k
        seed = seed or [0] * rows
        for row in zip(temperature, top_p, seed, top_k, strict=True):
            check_sampling(*row)
        return cls(
            np.asarray(temperature, np.float32),
            # Larger than any vocabulary, so it still means all tokens.
            np.asarray([min(k or 0, _MOST) for k in top_k], np.int32),
            np.asarray(top_p, np.float32),
            np.asarray(seed, np.uint32),
        )


def check_sampling(temperature: float, top_p: float, seed: int, sample_top_k: int | None = None) -> None:
    """Check the numbers of one row.

    Raises:
      UserError: a number is out of range.
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


def likeliest(logits: Array, top_k: Array | np.ndarray, top_p: Array | np.ndarray) -> Array:
    """Mask logits with -inf, first by ``top_k``, then by ``top_p`` of the remaining probability.

    The most likely token always stays. Tokens tied with the last one that stays also stay, as in vLLM and
    transformers, so more than ``top_k`` tokens may stay.

    Args:
      logits: float32 [B, V].
      top_k: int32 [B]; 0 means all tokens.
      top_p: float32 [B].

    Returns:
      float32 [B, V].
    """
    tokens = logits.shape[-1]
    ranked = jnp.sort(logits, axis=-1, descending=True)
    count = jnp.where(top_k > 0, jnp.minimum(top_k, tokens), tokens)[:, None]
    least = jnp.take_along_axis(ranked, count - 1, axis=-1)
    ranked = jnp.where(ranked >= least, ranked, -jnp.inf)
    chances = jax.nn.softmax(ranked, axis=-1)
    # A token stays if the more likely tokens do not add up to top_p.
    before = jnp.cumsum(chances, axis=-1) - chances
    # Rounded sums may reach 1 too early, but top_p = 1 must keep all tokens.
    inside = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    kept = jnp.sum(inside, axis=-1, keepdims=True, dtype=jnp.int32)
    cut = jnp.maximum(least, jnp.take_along_axis(ranked, jnp.maximum(kept - 1, 0), axis=-1))
    return jnp.where(logits >= cut, logits, -jnp.inf)


def next_token(logits: Array, sampling: SamplingParams, index: Array | np.ndarray) -> Array:
    """Draw a token for each row.

    Args:
      logits: float32 [B, V].
      sampling: how the rows' tokens are drawn.
      index: int32 [B], index of the token in its answer.

    Returns:
      int32 [B].
    """
    # Devices flush smaller numbers to 0.
    hot = sampling.temperature >= jnp.finfo(jnp.float32).tiny

    def draw() -> Array:
        # Subtract the maximum first: then a temperature near 0 makes the other tokens -inf, and none NaN.
        differences = logits - jnp.max(logits, axis=-1, keepdims=True)
        scaled = differences / jnp.where(hot, sampling.temperature, 1.0)[:, None]
        # Sorting the vocabulary is slow, so do it only if a row limits its tokens.
        limited = (sampling.top_p < 1) | ((sampling.top_k > 0) & (sampling.top_k < logits.shape[-1]))
        scaled = jax.lax.cond(
            jnp.any(hot & limited),
            lambda: likeliest(scaled, sampling.top_k, sampling.top_p),
            lambda: scaled,
        )

        def one(logits: Array, seed: Array | np.ndarray, index: Array | np.ndarray) -> Array:
            return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), index), logits)

        drawn = jax.vmap(one)(scaled, sampling.seed, index)
        return jnp.where(hot, drawn, best).astype(jnp.int32)

    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.lax.cond(jnp.any(hot), draw, lambda: best)
