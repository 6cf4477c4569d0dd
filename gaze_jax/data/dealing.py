"""The order in which the ranks of a split sequence hold its regions and text-stream slots.

On a mesh whose axis "context" splits sequences, rank r of n holds regions r, n + r, 2 n + r, ..., and the
same of the text stream. So all have as much to do, also of one image, and of what is earlier than a query.
An array holds the ranks' parts one after the other; the order of storage means nothing to a model.
"""

from typing import Any

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


def up(size: int, ranks: int) -> int:
    """The next multiple of ``ranks``."""
    return -(-size // ranks) * ranks


def dealt(
    values: Shaped[np.ndarray, "..."], axis: int, ranks: int, fill: int = 0, start: int = 0
) -> Shaped[np.ndarray, "..."]:
    """Deal the entries of ``axis`` to the ranks in turn, after padding with ``fill`` to a multiple.

    Args:
      values: any array.
      axis: the axis of regions or slots.
      ranks: n.
      fill: value of the padding.
      start: the number of the first entry; that of number i goes to rank i % n.
    """
    if ranks == 1:
        return values
    more = -values.shape[axis] % ranks
    if more:
        widths = [(0, 0)] * values.ndim
        widths[axis] = (0, more)
        values = np.pad(values, widths, constant_values=fill)
    parts = np.roll(_parts(values, axis, ranks), start, axis=axis)
    return parts.reshape(values.shape)


def collected(values: Shaped[np.ndarray, "..."], axis: int, ranks: int) -> Shaped[np.ndarray, "..."]:
    """Undo :func:`dealt` of entries from 0 on, except for its padding."""
    if ranks == 1:
        return values
    axis %= values.ndim
    return _parts(values, axis, values.shape[axis] // ranks).reshape(values.shape)


def joined(first: Shaped[np.ndarray, "..."], second: Shaped[np.ndarray, "..."], axis: int, ranks: int) -> Any:
    """Two dealt arrays one after the other, on each rank its parts."""
    axis %= first.ndim
    both = [np.reshape(a, (*a.shape[:axis], ranks, -1, *a.shape[axis + 1 :])) for a in (first, second)]
    return np.concatenate(both, axis=axis + 1).reshape(*first.shape[:axis], -1, *first.shape[axis + 1 :])


def _parts(values: np.ndarray, axis: int, parts: int) -> np.ndarray:
    """Every ``parts``-th entry of ``axis`` as a row of its own: [..., parts, size / parts, ...]."""
    lead, tail = values.shape[:axis], values.shape[axis + 1 :]
    return np.swapaxes(values.reshape(*lead, -1, parts, *tail), axis, axis + 1)


def dealt_batch(batch: Arrays, ranks: int, *, region: int = 0, write_index: int = 0) -> Arrays:
    """The arrays of a batch, [B, R, ...] and [B, S, ...], dealt to the ranks; others are unchanged.

    Args:
      batch: arrays by field.
      ranks: n.
      region, write_index: the numbers of the first region and of the first text-stream slot.
    """
    starts = {"regions": region, "text": write_index}

    def of(name: str, values: np.ndarray) -> np.ndarray:
        axis, fill = PADDING.get(name, ("", 0))
        return dealt(values, 1, ranks, fill, starts[axis]) if axis in starts else values

    return {name: of(name, values) for name, values in batch.items()}
