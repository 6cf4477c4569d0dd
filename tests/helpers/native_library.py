"""The C++ library of ``native``, where tests need it."""

import pytest

from pallas_kernels.gaze_decode.native import library


def needed() -> None:
    """Skip where the library is not built; tests/skips.txt does not list it, so `.ci/run` fails there."""
    if (reason := library.missing()) is not None:
        pytest.skip(reason)
