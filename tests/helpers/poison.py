"""What fresh memory holds in JAX's interpreters of Pallas kernels."""

import contextlib
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest

# Private to jax: where it has moved, the tests that need it are skipped.
utils = pytest.importorskip("jax._src.pallas.mosaic.interpret.utils")


@contextlib.contextmanager
def fresh_memory(value: float) -> Iterator[None]:
    """Fills floating-point memory with ``value`` instead of NaN, which hides a mask read past its end."""
    original = utils.get_uninitialized_value

    def get(dtype: np.dtype, kind: str) -> object:
        if jnp.issubdtype(dtype, jnp.floating):
            return np.asarray(value).astype(dtype)
        return original(dtype, kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "get_uninitialized_value", get)
        yield
