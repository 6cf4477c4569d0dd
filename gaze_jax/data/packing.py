"""Several short samples in one row."""

from collections.abc import Sequence

import numpy as np

from gaze_jax.data.processor import PADDING, Arrays

MIXED = -1
"""``family`` of a row that packs samples of several families."""


def _shift(values: np.ndarray, by: int) -> np.ndarray:
    """Add ``by`` to ids, leaving -1 alone."""
    return np.where(values >= 0, values + by, values).astype(values.dtype)


def _check(arrays: Arrays, position: int) -> int:
    """Tower tokens of an unpadded sample; raise if it is anything else."""
    used = int((arrays["visual_src"] >= 0).sum())
    unpadded = (arrays["region_segment"] == 0).all() and (arrays["dense_segment"] == 0).all()
    units = arrays["visual_unit"].max(initial=-1) + 1
    if not unpadded or used != arrays["visual_src"].max(initial=-1) + 1 or units != len(arrays["images"]):
        raise ValueError(
            f"Sample {position} of the pack is padded or packed already; pack what process() returns and "
            "pad the row afterwards."
        )
    return used


def pack(samples: Sequence[Arrays]) -> Arrays:
    """Concatenate processed samples into one row, one segment each.

    Order and position restart in every segment; units and tower tokens are numbered through the row.

    Args:
      samples: unpadded, from ``processor.process``.

    Returns:
      The same fields. ``sample_id`` is that of the first sample and names the row; ``family`` is the
      common family or -1. A pack of one sample equals the sample.

    Raises:
      ValueError: no samples, or one that is padded or packed already.
    """
    if not samples:
        raise ValueError("Nothing to pack; give at least one sample.")
    rows, tower_tokens, units = [], 0, 0
    for segment, arrays in enumerate(samples):
        used = _check(arrays, segment)
        shifts = {
            "visual_src": tower_tokens,
            "visual_unit": units,
            "dense_unit": units,
            "target_unit": units,
            "region_segment": segment,
            "dense_segment": segment,
        }
        rows.append(
            {name: _shift(arrays[name], shifts[name]) if name in shifts else arrays[name] for name in PADDING}
        )
        tower_tokens += used
        units += len(arrays["images"])
    packed = {name: np.concatenate([row[name] for row in rows]) for name in PADDING}
    families = {int(arrays["family"]) for arrays in samples}
    packed["sample_id"] = samples[0]["sample_id"]
    packed["family"] = samples[0]["family"] if len(families) == 1 else np.asarray(MIXED, np.int32)
    return packed
