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
    # Whatever is done with such an array here, NumPy's and JAX's do alike.
    AnyArray = jax.Array
else:
    AnyArray = jax.Array | np.ndarray
"""An array from the data pipeline, which is NumPy's, or the same one on a device."""

NamedArrays = dict[str, Shaped[Array, "..."]]
"""Several arrays by name, of which a docstring tells the shapes."""

ArrayTree = PyTree[Shaped[Array, "..."]]
"""A pytree whose leaves are arrays; a type checker lets anything pass."""
