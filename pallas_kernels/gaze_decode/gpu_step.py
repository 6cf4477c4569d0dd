"""What a decoding step knows before its layers: which keys count, in the form that the GPU kernels read.

None of it depends on the layer. XLA does not move it out of a loop over layers by itself.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gaze_decode import gpu_scores, grow

_WORD = 32
_BEHIND = 8  # words behind the text stream that the mask of its last chunk may name


class StepMasks(NamedTuple):
    """The masks of a step.

    Attributes:
      words: int32 [B, R * pieces, 2], a bit per slot of each piece of a region.
      text_words: int32 [B, ...], a bit per text-stream key.
      text_length: int32 [B], the last text-stream key that counts, plus one.
      ranks: int32 [B, places], see :mod:`pallas_kernels.gaze_decode.gpu_select`; None without routing.
    """

    words: jax.Array
    text_words: jax.Array
    text_length: jax.Array
    ranks: jax.Array | None


def _packed(bits: jax.Array) -> jax.Array:
    """bool [..., 32 n] to int32 [..., n]."""
    grouped = bits.reshape(*bits.shape[:-1], bits.shape[-1] // _WORD, _WORD)
    weights = jnp.uint32(1) << jnp.arange(_WORD, dtype=jnp.uint32)
    words = jnp.sum(jnp.where(grouped, weights, jnp.uint32(0)), axis=-1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def masks(
    visual_seen: jax.Array,
    text_seen: jax.Array,
    visible: jax.Array | None,
    order: jax.Array | None,
    pieces: tuple[int, int],
) -> StepMasks:
    """The masks of a step, from those of :func:`pallas_kernels.gaze_decode.api.route_and_decode`.

    ``pieces``: pieces per region and the slots of each.
    """
    batch, regions, _ = visual_seen.shape
    count, each = pieces
    slots = grow.fill(visual_seen, {2: count * each}).reshape(batch, regions * count, each)
    text = text_seen.shape[1]
    words = -(-text // _WORD) + _BEHIND
    places = jnp.arange(1, text + 1, dtype=jnp.int32)
    ranks = None
    if visible is not None and order is not None:
        ranks = _ranks(visible, order)
    return StepMasks(
        words=_packed(grow.fill(slots, {2: 2 * _WORD})),
        text_words=_packed(grow.fill(text_seen, {1: words * _WORD})),
        text_length=jnp.max(jnp.where(text_seen, places, 0), axis=-1, initial=0),
        ranks=ranks,
    )


def _ranks(visible: jax.Array, order: jax.Array) -> jax.Array:
    batch, regions = visible.shape
    rows = jnp.arange(batch)[:, None]
    rank = jnp.zeros((batch, regions), jnp.int32).at[rows, order].set(jnp.arange(regions, dtype=jnp.int32))
    rank = jnp.where(visible, rank, -1)
    # The last tile of scores is moved back: what it repeats does not count there.
    shift = gpu_scores.moved(regions)
    own = regions + shift - gpu_scores.TILE if shift else regions
    again = jnp.full((batch, shift), -1, jnp.int32)
    rank = jnp.concatenate([rank[:, :own], again, rank[:, own:]], axis=1)
    return jnp.pad(rank, ((0, 0), (0, gpu_scores.places(regions) - rank.shape[1])), constant_values=-1)
