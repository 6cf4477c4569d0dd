"""Regions: cutting a token grid, moving tokens to region-major order and back, summarising keys.

Axis letters as in :mod:`gaze_jax.core.streams`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gaze_jax.core.streams import EMPTY

Array = jax.Array

DESCRIPTORS = ("mean", "minmax")
"""What a region is summarised by; see :func:`describe`."""


def balanced_sides(length: int, target: int) -> list[int]:
    """Cut ``length`` tokens into ceil(length / target) runs whose sizes differ by at most one.

    A fixed-size cut of 27 tokens by 6 would leave a sliver of 3, whose mean key is noisier than its
    neighbours' and so wins too often; 6, 6, 5, 5, 5 has no sliver.
    """
    count = -(-length // target)
    small, larger = divmod(length, count)
    return [small + 1] * larger + [small] * (count - larger)


def partition(height: int, width: int, region: tuple[int, int]) -> np.ndarray:
    """Assign the tokens of a ``height`` x ``width`` grid to balanced rectangular regions.

    Args:
      height, width: size of the token grid.
      region: (r_h, r_w), the target size; no side of a region is larger.

    Returns:
      int32 [R, P]: raster index (``row * width + column``) of the token in each slot, in raster order
      inside a region; regions in raster order; P is the largest region's size; -1 in empty slots.

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
    rows = balanced_sides(height, r_h)
    cols = balanced_sides(width, r_w)
    raster = np.arange(height * width, dtype=np.int32).reshape(height, width)
    slots = np.full((len(rows) * len(cols), max(rows) * max(cols)), EMPTY, np.int32)
    row_blocks = np.split(raster, np.cumsum(rows)[:-1], axis=0)
    blocks = (block for rows_of in row_blocks for block in np.split(rows_of, np.cumsum(cols)[:-1], axis=1))
    for r, block in enumerate(blocks):
        slots[r, : block.size] = block.ravel()
    return slots


def slot_fill(slots: np.ndarray) -> float:
    """Share of the [R, P] slots that hold a token; the rest is padding that is stored and skipped."""
    return float((np.asarray(slots) >= 0).mean())


def to_regions(features: Array, visual_src: Array) -> Array:
    """Move tower output into region-major order.

    Args:
      features: [B, N, M] tower output, flattened over units and tokens.
      visual_src: int32 [B, R, P] index into N, -1 in empty slots.

    Returns:
      [B, R, P, M]; empty slots are 0.
    """
    batch = features.shape[0]
    if features.shape[1] == 0:  # text only: there is nothing to index, and every slot is empty
        return jnp.zeros((*visual_src.shape, features.shape[2]), features.dtype)
    flat = visual_src.reshape(batch, -1, 1)
    moved = jnp.take_along_axis(features, jnp.maximum(flat, 0), axis=1)
    moved = jnp.where(flat >= 0, moved, jnp.zeros((), features.dtype))
    return moved.reshape(*visual_src.shape, features.shape[-1])


def from_regions(values: Array, visual_src: Array, length: int) -> Array:
    """The inverse of :func:`to_regions`: [B, R, P, M] back to [B, length, M]; absent tokens are 0."""
    batch, width = values.shape[0], values.shape[-1]
    # Empty slots are sent one past the end, where mode="drop" discards them.
    target = jnp.where(visual_src >= 0, visual_src, length).reshape(batch, -1)
    out = jnp.zeros((batch, length, width), values.dtype)
    rows = jnp.arange(batch)[:, None]
    return out.at[rows, target].set(values.reshape(batch, -1, width), mode="drop")


def mean_keys(keys: Array, valid: Array) -> Array:
    """Describe each region by the mean of its valid keys (paper: the region descriptor).

    Args:
      keys: [B, K, R, P, D] post-RoPE keys, before any quantisation.
      valid: bool [B, R, P].

    Returns:
      [B, K, R, D] in ``keys.dtype``, accumulated in float32; 0 for a region without tokens.
    """
    mask = valid[:, None, :, :, None]
    # `where` and not a product: an invalid slot may hold NaN.
    total = jnp.sum(jnp.where(mask, keys.astype(jnp.float32), 0.0), axis=3)
    count = jnp.maximum(jnp.sum(valid, axis=-1), 1).astype(jnp.float32)
    return (total / count[:, None, :, None]).astype(keys.dtype)


def minmax_keys(keys: Array, valid: Array) -> Array:
    """Describe each region by the box around its valid keys (Quest, arXiv 2406.10774).

    Args:
      keys: [B, K, R, P, D] post-RoPE keys, before any quantisation.
      valid: bool [B, R, P].

    Returns:
      [B, K, R, 2 * D] in ``keys.dtype``, the smallest value of every channel and then the largest; 0 for
      a region without tokens.
    """
    mask = valid[:, None, :, :, None]
    far = jnp.asarray(jnp.inf, keys.dtype)
    low = jnp.min(jnp.where(mask, keys, far), axis=3)
    high = jnp.max(jnp.where(mask, keys, -far), axis=3)
    some = jnp.any(valid, axis=-1)[:, None, :, None]
    return jnp.where(some, jnp.concatenate([low, high], axis=-1), jnp.zeros((), keys.dtype))


def describe(keys: Array, valid: Array, descriptor: str) -> Array:
    """Summarise each region: [B, K, R, E], the width E from :func:`descriptor_width`.

    Args:
      keys, valid: as in :func:`mean_keys`.
      descriptor: "mean" (:func:`mean_keys`) or "minmax" (:func:`minmax_keys`).
    """
    return {"mean": mean_keys, "minmax": minmax_keys}[descriptor](keys, valid)


def descriptor_width(descriptor: str, head_dim: int) -> int:
    """E, the channels of one descriptor: D, or 2 * D for "minmax"."""
    return {"mean": 1, "minmax": 2}[descriptor] * head_dim


def region_span(order: Array) -> tuple[Array, Array]:
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
