"""Pad the arrays of the processor to fixed sizes."""

import numpy as np

from gaze_jax.core.streams import EMPTY, IGNORE, Kind
from gaze_jax.data.placement import Arrays, pad_slots

# Field -> (the axis that a bucket fixes, the padding value).
PADDING: dict[str, tuple[str, int]] = {
    "visual_src": ("regions", EMPTY),
    "visual_order": ("regions", EMPTY),
    "visual_positions": ("regions", 0),
    "visual_view": ("regions", EMPTY),
    "pool_indices": ("regions", 0),
    "pool_weights": ("regions", 0),
    "region_segment": ("regions", EMPTY),
    "tokens": ("text", 0),
    "kind": ("text", int(Kind.PAD)),
    "text_order": ("text", EMPTY),
    "text_positions": ("text", 0),
    "text_segment": ("text", EMPTY),
    "text_view": ("text", EMPTY),
    "targets": ("text", IGNORE),
    "target_box": ("text", -1),
    "target_view": ("text", EMPTY),
    "images": ("images", 0),
}
ANSWER_PADDING = {"answer": IGNORE, "answer_box": -1, "answer_view": EMPTY}


def _pad(values: np.ndarray, size: int, fill: int, name: str, hint: str) -> np.ndarray:
    """Pad axis 0 of ``values`` to ``size``; the array itself if it has that size."""
    if len(values) > size:
        raise ValueError(f"{name} needs {len(values)} but {hint}={size}; raise {hint} to fit.")
    if len(values) == size:  # images are large
        return values
    out = np.full((size, *values.shape[1:]), fill, values.dtype)
    out[: len(values)] = values
    return out


def pad_to(arrays: Arrays, *, regions: int, text: int, images: int, slots: int | None = None) -> Arrays:
    """Pad the arrays of one row to a bucket, so that rows stack and nothing recompiles.

    Args:
      arrays: from :func:`process`, :func:`prompt` or ``packing.pack``; other fields are unchanged.
      regions, text, images: sizes of the R and S axes and number of images that the tower reads.
      slots: size of the P axis; None keeps it.

    Raises:
      ValueError: an array does not fit. Nothing is ever truncated.
    """
    sizes = {"regions": regions, "text": text, "images": images}
    out = dict(arrays)
    for name, (axis, fill) in PADDING.items():
        if name not in arrays:  # pool indices and weights, absent without pooling
            continue
        label = f"Field {name} of sample {int(arrays['sample_id'])}"
        values = arrays[name] if slots is None else pad_slots(arrays[name], name, slots)
        out[name] = _pad(values, sizes[axis], fill, label, axis)
    return out


def pad_answers(arrays: Arrays, *, length: int) -> Arrays:
    """Pad the answer fields of :func:`prompt` to ``length``: -100 for tokens, -1 for boxes and views.

    Raises:
      ValueError: the answer is longer than ``length``.
    """
    out = dict(arrays)
    for name, fill in ANSWER_PADDING.items():
        label = f"Field {name} of sample {int(arrays['sample_id'])}"
        out[name] = _pad(arrays[name], length, fill, label, "length")
    return out
