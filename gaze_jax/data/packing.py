"""Pack several short samples into one row."""

from collections.abc import Sequence

import numpy as np

from gaze_jax.data.padding import PADDING
from gaze_jax.data.placement import Arrays, pad_slots

MIXED = -1
"""``family`` of a row whose samples are of several families."""


def _shift(values: np.ndarray, by: int) -> np.ndarray:
    """Add ``by`` to ids; -1 is unchanged."""
    if not by:
        return values
    return np.where(values >= 0, values + by, values).astype(values.dtype)


def _check(arrays: Arrays, position: int) -> tuple[int, int]:
    """Counts of visual tokens and views of an unpadded sample; refuse anything else."""
    used = int((arrays["visual_src"] >= 0).sum())
    unpadded = (arrays["region_segment"] == 0).all() and (arrays["text_segment"] == 0).all()
    views = int(arrays["visual_view"].max(initial=-1)) + 1
    # Without pooling there is one image per view; with pooling the number of images is only in `images`.
    images = views if "pool_indices" not in arrays else len(arrays["images"])
    if not unpadded or used != arrays["visual_src"].max(initial=-1) + 1 or images != len(arrays["images"]):
        raise ValueError(
            f"Sample {position} of the pack is padded or packed already; pack what process() returns and "
            "pad the row afterwards."
        )
    return used, views


def pack(samples: Sequence[Arrays], *, image_tokens: int | None = None) -> Arrays:
    """Concatenate processed samples into one row, one segment each.

    Order and position restart in every segment; views and tower tokens are numbered across the row.

    Args:
      samples: unpadded, from ``processor.process``.
      image_tokens: tower tokens per image (``layout.tokens``); required if tokens are pooled.

    Returns:
      The same fields. ``sample_id`` is the first sample's and identifies the row; ``family`` is the common
      family or -1. A pack of one sample equals the sample.

    Raises:
      ValueError: there are no samples, one is already padded or packed, or tokens are pooled but
        ``image_tokens`` is missing.
    """
    if not samples:
        raise ValueError("Nothing to pack; give at least one sample.")
    pooled = "pool_indices" in samples[0]
    if pooled and image_tokens is None:
        raise ValueError("Samples with pooled tokens are packed by image_tokens; give layout.tokens.")
    slots = max(arrays["visual_src"].shape[1] for arrays in samples)
    names = [name for name in PADDING if name in samples[0]]
    rows, tokens, views, images = [], 0, 0, 0
    for segment, arrays in enumerate(samples):
        used, more = _check(arrays, segment)
        shifts = {
            "visual_src": tokens,
            "visual_view": views,
            "text_view": views,
            "target_view": views,
            "region_segment": segment,
            "text_segment": segment,
        }
        row = {name: arrays[name] for name in names}
        if arrays["visual_src"].shape[1] != slots:
            row = {name: pad_slots(values, name, slots) for name, values in row.items()}
        row |= {name: _shift(row[name], by) for name, by in shifts.items()}
        if pooled:
            # Unused indices stay 0; their weight is 0.
            by = np.where(row["pool_weights"] != 0, images * (image_tokens or 0), 0)
            row["pool_indices"] = (row["pool_indices"] + by).astype(np.int32)
        rows.append(row)
        tokens, views, images = tokens + used, views + more, images + len(arrays["images"])
    # Not copied if there is one sample: images are large.
    packed = rows[0] if len(rows) == 1 else {n: np.concatenate([row[n] for row in rows]) for n in names}
    families = {int(arrays["family"]) for arrays in samples}
    packed["sample_id"] = samples[0]["sample_id"]
    packed["family"] = samples[0]["family"] if len(families) == 1 else np.asarray(MIXED, np.int32)
    return packed
