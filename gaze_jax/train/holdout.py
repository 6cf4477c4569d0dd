"""Which records of a corpus are held out: evaluated during training, and never trained on."""

from collections.abc import Sequence

import numpy as np

# SplitMix64's finalizer: every bit of the index changes half of the bits of the hash.
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_FRACTION_BITS = 53


def hashed(indices: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) of int64 indices of any shape; the same on every machine, and for every seed."""
    # uint64 arithmetic of arrays wraps without a warning.
    x = indices.astype(np.uint64) * np.uint64(_GAMMA) + np.uint64(_GAMMA)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(64 - _FRACTION_BITS)).astype(np.float64) / 2.0**_FRACTION_BITS


def held_out(sizes: Sequence[int], fraction: float) -> np.ndarray:
    """Which records are held out, about ``fraction`` of them.

    A record is chosen by its index in its own source alone. So what is held out stays so, and what is
    trained on too, if records are appended to a source, or sources to a mixture.

    Args:
      sizes: records of each source.
      fraction: at least 0 and less than 1.

    Returns:
      bool [records], the sources one after the other.
    """
    parts = [hashed(np.arange(size, dtype=np.int64)) < fraction for size in sizes]
    return np.concatenate([np.zeros(0, bool), *parts])


def lowest(indices: np.ndarray, count: int) -> np.ndarray:
    """``count`` of the indices of records, or all if there are fewer: those of the lowest hash, sorted."""
    order = np.argsort(hashed(indices), kind="stable")
    return np.sort(indices[order[:count]])
