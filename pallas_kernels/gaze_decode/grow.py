"""Growing caches: helpers shared by the layouts of several implementations."""

from typing import TypeVar

import jax
import jax.numpy as jnp

Array = jax.Array
_Tree = TypeVar("_Tree")


def fill(array: Array, sizes: dict[int, int]) -> Array:
    """Pad the axes in ``sizes`` with zeros at the end, up to their new sizes; no copy if none grows."""
    widths = [(0, 0)] * array.ndim
    for axis, size in sizes.items():
        widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths) if any(after for _, after in widths) else array


def write(packed: _Tree, piece: _Tree, start: Array, axis: int) -> _Tree:
    """Write every array of ``piece`` into its counterpart of ``packed`` at ``start`` of ``axis``.

    Nothing else of ``packed`` is read or written, so this happens in place if the caller donated it.
    """
    # Not one tree.map over both: a layout may keep R in its tree structure, so the two may differ.
    pairs = zip(jax.tree.leaves(packed), jax.tree.leaves(piece), strict=True)
    written = [jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis) for whole, part in pairs]
    return jax.tree.unflatten(jax.tree.structure(packed), written)
