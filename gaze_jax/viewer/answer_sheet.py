"""The contact sheet of a model's answer: selections over regions, drawn over the image they were cut from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from gaze_jax.core.layout import VisualLayout
from gaze_jax.viewer.contact_sheet import contact_sheet


def over_grid(per_region: np.ndarray, layout: VisualLayout) -> np.ndarray:
    """Values of the regions of one image spread over its tokens: [..., R] to [..., h, w]."""
    table = layout.table
    valid = table >= 0
    regions = np.broadcast_to(np.arange(layout.regions)[:, None], table.shape)
    region_of = np.empty(layout.tokens, np.int64)
    region_of[table[valid]] = regions[valid]
    return per_region[..., region_of].reshape(*per_region.shape[:-1], layout.grid, layout.grid)


def answer_sheet(
    image: np.ndarray, pieces: Sequence[str], selected: np.ndarray, layout: VisualLayout, **options: Any
) -> Image.Image:
    """Draw where each token of an answer looked in one layer.

    Args:
      image: uint8 [height, width, 3] that the model saw, or the larger one it was made from.
      pieces: T generated tokens as text.
      selected: bool [T, Hs, R] of one layer; the veil over a region grows with the heads that left it out.
      layout: of the image.
      **options: of :func:`gaze_jax.viewer.contact_sheet.contact_sheet`, "title" at least.

    Returns:
      An RGB picture.
    """
    share = selected.astype(np.float32).mean(axis=1)
    return contact_sheet(image, pieces, over_grid(share, layout), **options)
