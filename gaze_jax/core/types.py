"""Array types of this package and of the models.

Shapes are part of the types, in the axis letters of :mod:`gaze_jax.core.streams`:
``Float[Array, "B T H D"]``. ``#B`` is B or 1, ``*lead`` any number of axes, ``...`` any shape, and ``""`` a
scalar. The tests check all of it at run time; elsewhere it costs nothing.
"""

from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import PyTree, Shaped

Array = jax.Array

if TYPE_CHECKING:
    # The code uses only what NumPy and JAX arrays have in common.
    AnyArray = jax.Array
else:
    AnyArray = jax.Array | np.ndarray
"""A NumPy array from the data pipeline, or the same array on a device."""

NamedArrays = dict[str, Shaped[Array, "..."]]
"""Arrays by name; docstrings give the shapes."""

ArrayTree = PyTree[Shaped[Array, "..."]]
"""A pytree whose leaves are arrays; type checkers accept anything."""
