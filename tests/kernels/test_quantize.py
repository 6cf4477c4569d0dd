"""int8 keys and values: the error bound, and tokens that do not touch each other."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantize import dequantize, quantize


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_error_is_at_most_half_a_step(size):
    """No element is off by more than max|x| / 254 of its own token, at any magnitude."""
    x = np.random.default_rng(0).normal(size=(3, 50, 64)).astype(np.float32) * np.float32(size)
    got = np.asarray(dequantize(*quantize(jnp.asarray(x))))
    bound = np.abs(x).max(-1, keepdims=True) / 254
    assert (np.abs(got - x) <= bound * 1.0001).all()
    assert np.abs(got - x).max() > bound.min() / 2, "it did round"


def test_a_tokens_trouble_is_its_own():
    """NaN and infinity come back as NaN, in their token only; a token of zeros stays zero."""
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    clean = np.asarray(dequantize(*quantize(jnp.asarray(x))))
    x[0, 3], x[1, 5], x[2] = np.nan, np.inf, 0.0
    got = np.asarray(dequantize(*quantize(jnp.asarray(x))))
    assert np.isnan(got[:2]).all()
    assert (got[2] == 0).all()
    np.testing.assert_array_equal(got[3], clean[3])
