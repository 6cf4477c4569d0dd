"""The interpreted kernels once more, with fresh memory full of 1.0: NaN hides a mask read past its end."""

import jax
import pytest

from tests.helpers.poison import fresh_memory
from tests.kernels import decode_values, prefill_values, test_decode, test_decode_gpu, test_prefill

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True, scope="module")
def _ones():
    """Also compiles anew: a program holds the value that it was traced with."""
    programs = (decode_values._program, prefill_values._program)
    for program in programs:
        program.cache_clear()
    jax.clear_caches()
    with fresh_memory(1.0):
        yield
    for program in programs:
        program.cache_clear()
    jax.clear_caches()


class TestDecodeOnTpu(test_decode.TestTpu):
    """The TPU kernel of gaze_decode."""


class TestPrefillOnTpu(test_prefill.TestTpu):
    """The TPU kernels of gaze_prefill, forward and backward."""


no_races = test_decode_gpu.no_races


class TestDecodeOnGpu(test_decode_gpu.TestCopiesAndIndicesInterpreted):
    """The GPU kernel of gaze_decode."""
