"""Caches that grow: what the layouts of several implementations have in common."""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def fill(array: Array, sizes: dict[int, int]) -> Array:
    """Zeros at the end of the axes in ``sizes``, up to their new size; the array itself if none is needed."""
    widths = [(0, 0)] * array.ndim
    for axis, size in sizes.items():
        widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths) if any(after for _, after in widths) else array


def write(packed: Any, piece: Any, start: Array, axis: int) -> Any:
    """Write every array of ``piece`` into its counterpart of ``packed`` at ``start`` of ``axis``.

    Nothing else of ``packed`` is read or written, so that it happens in place where the caller donated it.
    """
    # Not one tree.map of both: a layout may keep R in its structure.
    pairs = zip(jax.tree.leaves(packed), jax.tree.leaves(piece), strict=True)
    written = [jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis) for whole, part in pairs]
    return jax.tree.unflatten(jax.tree.structure(packed), written)
