"""Regions: cut a token grid, move tokens to region-major order and back, summarise keys.

Axis letters as in :mod:`gaze_jax.core.streams`.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from gaze_jax.core.streams import EMPTY, NEWLINE
from gaze_jax.core.types import AnyArray, Array

DESCRIPTORS = ("mean", "minmax")
"""Ways to summarise a region; see :func:`describe`."""


def balanced_sides(length: int, target: int) -> list[int]:
    """Cut ``length`` tokens into ceil(length / target) runs whose sizes differ by at most one.

    Cutting 27 tokens into sixes would leave a run of 3, whose mean key is noisier than its neighbours' and
    so is selected too often. Balanced runs are 6, 6, 5, 5, 5.
    """
    count = -(-length // target)
    small, larger = divmod(length, count)
    return [small + 1] * larger + [small] * (count - larger)


def partition(height: int, width: int, region: tuple[int, int]) -> Int32[np.ndarray, "R P"]:
    """Assign the tokens of a ``height`` x ``width`` grid to balanced rectangular regions.

    Args:
      height, width: size of the token grid.
      region: (r_h, r_w), the target size; no side of a region is larger.

    Returns:
      int32 [R, P]: raster index (``row * width + column``) of the token in each slot, -1 in empty slots.
      Regions, and tokens inside a region, are in raster order; P is the size of the largest region.

    Raises:
      ValueError: the grid is empty, or ``region`` is not positive or larger than the grid.
    """
    r_h, r_w = region
    if height < 1 or width < 1:
        raise ValueError(f"Token grid {height}x{width} must have at least one row and one column.")
    if not (1 <= r_h <= height and 1 <= r_w <= width):
        raise ValueError(
            f"Region {r_h}x{r_w} must be at least 1x1 and fit the {height}x{width} token grid; "
            "choose a region between 1 and the grid's side."
        )
    return partition_frames(1, height, width, (1, r_h, r_w))


def partition_frames(
    frames: int, height: int, width: int, region: tuple[int, int, int], *, newlines: bool = False
) -> Int32[np.ndarray, "R P"]:
    """Assign the tokens of ``frames`` equal grids to regions, each a box of time, height and width.

    Args:
      frames, height, width: size of the block of token grids, at least 1 each.
      region: (r_t, r_h, r_w), the target size. Sides are balanced; a side longer than the block is reduced
        to the block's.
      newlines: every row ends in one more token, which belongs to the row's last region.

    Returns:
      int32 [R, P]: index ``(frame * height + row) * stride + column`` of the token in each slot, -1 in empty
      slots; ``stride`` is ``width``, or ``width + 1`` with ``newlines``. Tokens of a region are in the order
      of this index, regions in the order of their first token.
    """
    sides = [balanced_sides(length, target) for length, target in zip((frames, height, width), region)]
    if newlines:
        sides[2][-1] += 1
    block = np.arange(frames * height * sum(sides[2]), dtype=np.int32).reshape(frames, height, -1)
    cuts = [np.cumsum(side)[:-1] for side in sides]
    boxes = [
        box.ravel()
        for slab in np.split(block, cuts[0], axis=0)
        for rows in np.split(slab, cuts[1], axis=1)
        for box in np.split(rows, cuts[2], axis=2)
    ]
    slots = np.full((len(boxes), max(box.size for box in boxes)), EMPTY, np.int32)
    for r, box in enumerate(boxes):
        slots[r, : box.size] = box
    return slots


def slot_fill(slots: Int[np.ndarray, "R P"]) -> float:
    """Fraction of the [R, P] slots that hold a token; the rest is padding, stored but never attended."""
    return float((np.asarray(slots) >= 0).mean())


def to_regions(
    features: Float[Array, "B N M"], visual_src: Int[AnyArray, "B R P"]
) -> Float[Array, "B R P M"]:
    """Move tower output into region-major order.

    Args:
      features: [B, N, M] tower output, flattened over views and tokens.
      visual_src: int32 [B, R, P] index into N, -1 in empty slots.

    Returns:
      [B, R, P, M]; empty slots are 0.
    """
    batch = features.shape[0]
    if features.shape[1] == 0:  # text only: no tokens to index, every slot is empty
        return jnp.zeros((*visual_src.shape, features.shape[2]), features.dtype)
    flat = visual_src.reshape(batch, -1, 1)
    moved = jnp.take_along_axis(features, jnp.maximum(flat, 0), axis=1)
    moved = jnp.where(flat >= 0, moved, jnp.zeros((), features.dtype))
    return moved.reshape(*visual_src.shape, features.shape[-1])


def pool_to_regions(
    features: Float[Array, "B N M"],
    pool_indices: Int[AnyArray, "B R P W"],
    pool_weights: Float[AnyArray, "B R P W"],
    newline: Float[Array, " M"],
) -> Float[Array, "B R P M"]:
    """Pool tower output and move it into region-major order in one step.

    Unpadding, joining tiles and bilinear resizing all make a token a weighted sum of at most W tower tokens,
    so one gather with static shapes serves every layout of views.

    Args:
      features: [B, N, M] tower output, flattened over images and tokens.
      pool_indices: int32 [B, R, P, W] index into N; :data:`gaze_jax.core.streams.NEWLINE` as the first index
        makes the token the newline. Unused indices are 0.
      pool_weights: float32 [B, R, P, W]; 0 in empty slots and for unused indices.
      newline: [M] embedding of the newline.

    Returns:
      [B, R, P, M] in the dtype of ``features``, summed in float32; empty slots are 0.
    """
    batch, width = features.shape[0], features.shape[-1]
    out = jnp.zeros((*pool_indices.shape[:3], width), jnp.float32)
    if features.shape[1]:  # otherwise text only: no tokens to index, every slot is empty
        for w in range(pool_indices.shape[-1]):
            index = jnp.maximum(pool_indices[..., w], 0).reshape(batch, -1, 1)
            found = jnp.take_along_axis(features, index, axis=1).reshape(out.shape)
            out += pool_weights[..., w, None] * found.astype(jnp.float32)
    is_newline = pool_indices[..., :1] == NEWLINE
    return jnp.where(is_newline, newline.astype(features.dtype), out.astype(features.dtype))


def from_regions(
    values: Float[Array, "B R P M"], visual_src: Int[AnyArray, "B R P"], length: int
) -> Float[Array, "B {length} M"]:
    """The inverse of :func:`to_regions`: [B, R, P, M] back to [B, length, M]; absent tokens are 0."""
    batch, width = values.shape[0], values.shape[-1]
    # Empty slots are written one past the end, where mode="drop" discards them.
    target = jnp.where(visual_src >= 0, visual_src, length).reshape(batch, -1)
    out = jnp.zeros((batch, length, width), values.dtype)
    rows = jnp.arange(batch)[:, None]
    return out.at[rows, target].set(values.reshape(batch, -1, width), mode="drop")


def mean_keys(keys: Float[Array, "B K R P D"], valid: Bool[AnyArray, "B R P"]) -> Float[Array, "B K R D"]:
    """Describe each region by the mean of its valid keys (paper: the region descriptor).

    Args:
      keys: [B, K, R, P, D] post-RoPE keys, before any quantisation.
      valid: bool [B, R, P].

    Returns:
      [B, K, R, D] in ``keys.dtype``, accumulated in float32; 0 for a region without tokens.
    """
    mask = valid[:, None, :, :, None]
    # `where`, not a product: an invalid slot may hold NaN.
    total = jnp.sum(jnp.where(mask, keys.astype(jnp.float32), 0.0), axis=3)
    count = jnp.maximum(jnp.sum(valid, axis=-1), 1).astype(jnp.float32)
    return (total / count[:, None, :, None]).astype(keys.dtype)


def minmax_keys(keys: Float[Array, "B K R P D"], valid: Bool[AnyArray, "B R P"]) -> Float[Array, "B K R 2*D"]:
    """Describe each region by the box around its valid keys (Quest, arXiv 2406.10774).

    Args:
      keys: [B, K, R, P, D] post-RoPE keys, before any quantisation.
      valid: bool [B, R, P].

    Returns:
      [B, K, R, 2 * D] in ``keys.dtype``: the minimum of every channel, then the maximum; 0 for a region
      without tokens.
    """
    mask = valid[:, None, :, :, None]
    far = jnp.asarray(jnp.inf, keys.dtype)
    low = jnp.min(jnp.where(mask, keys, far), axis=3)
    high = jnp.max(jnp.where(mask, keys, -far), axis=3)
    some = jnp.any(valid, axis=-1)[:, None, :, None]
    return jnp.where(some, jnp.concatenate([low, high], axis=-1), jnp.zeros((), keys.dtype))


def describe(
    keys: Float[Array, "B K R P D"], valid: Bool[AnyArray, "B R P"], descriptor: str
) -> Float[Array, "B K R E"]:
    """Summarise each region: [B, K, R, E], with E from :func:`descriptor_width`.

    Args:
      keys, valid: as in :func:`mean_keys`.
      descriptor: "mean" (:func:`mean_keys`) or "minmax" (:func:`minmax_keys`).
    """
    return {"mean": mean_keys, "minmax": minmax_keys}[descriptor](keys, valid)


def descriptor_width(descriptor: str, head_dim: int) -> int:
    """E, the width of a descriptor: D, or 2 * D for "minmax"."""
    return {"mean": 1, "minmax": 2}[descriptor] * head_dim


def region_span(
    order: Int[AnyArray, "*lead R P"],
) -> tuple[Int32[Array, "*lead R"], Int32[Array, "*lead R"]]:
    """First and last ``order`` of each region's valid tokens.

    Args:
      order: int32 [..., R, P]; -1 in empty slots.

    Returns:
      Two int32 [..., R]; both -1 for a region without tokens.
    """
    valid = order >= 0
    far = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(valid, order, far), axis=-1)
    last = jnp.max(order, axis=-1)
    return jnp.where(last >= 0, first, EMPTY), last
