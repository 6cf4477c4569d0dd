"""The order in which the ranks of a split sequence hold its regions and text-stream slots.

On a mesh whose axis "context" splits sequences, rank r of n holds regions r, n + r, 2 n + r, ..., and the
same of the text stream. So all have as much to do, also of one image, and of what is earlier than a query.
An array holds the ranks' parts one after the other; the order of storage means nothing to a model.
"""

import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Shaped

from gaze_jax.data.padding import PADDING
from gaze_jax.data.placement import Arrays
from gaze_jax.parallel import rules

_SPLIT = {"regions": "regions", "text": "tokens"}
"""The axes of padded fields that are dealt, and their logical axes."""


def field_sharding(mesh: Mesh, name: str) -> NamedSharding:
    """The sharding of a batch's field: of its rows, and of its regions or tokens if sequences are split."""
    axis, _ = PADDING.get(name, ("", 0))
    names = ("batch", _SPLIT[axis]) if axis in _SPLIT else ("batch",)
    return NamedSharding(mesh, rules.partition_spec(names))


def dealt(
    values: Shaped[np.ndarray, "..."], axis: int, ranks: int, fill: int = 0
) -> Shaped[np.ndarray, "..."]:
    """Deal the entries of ``axis`` to the ranks in turn, after padding with ``fill`` to a multiple."""
    if ranks == 1:
        return values
    more = -values.shape[axis] % ranks
    if more:
        widths = [(0, 0)] * values.ndim
        widths[axis] = (0, more)
        values = np.pad(values, widths, constant_values=fill)
    return _transposed(values, axis, -1, ranks)


def collected(values: Shaped[np.ndarray, "..."], axis: int, ranks: int) -> Shaped[np.ndarray, "..."]:
    """Undo :func:`dealt`, except for its padding."""
    return values if ranks == 1 else _transposed(values, axis, ranks, -1)


def _transposed(values: np.ndarray, axis: int, first: int, second: int) -> np.ndarray:
    axis %= values.ndim
    lead, tail = values.shape[:axis], values.shape[axis + 1 :]
    return np.swapaxes(values.reshape(*lead, first, second, *tail), axis, axis + 1).reshape(*lead, -1, *tail)


def dealt_batch(batch: Arrays, ranks: int) -> Arrays:
    """The arrays of a batch, [B, R, ...] and [B, S, ...], dealt to the ranks; others are unchanged."""
    return {
        name: dealt(values, 1, ranks, PADDING[name][1])
        if name in PADDING and PADDING[name][0] in _SPLIT
        else values
        for name, values in batch.items()
    }
