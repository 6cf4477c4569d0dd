"""Layouts of every style of views, real and tiny, and what the tests of views share."""

import math

import numpy as np
import torch

from gaze_jax.core.layout import ViewConfig, VisualLayout
from gaze_jax.data.pixels import normalise
from gaze_jax.data.views import MediaViews
from gaze_jax.models.published import VIEWS, cambrian_canvases

LLAVA_ONEVISION, CAMBRIAN_S = VIEWS["llava-onevision"], VIEWS["cambrian-s"]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 10_007 + width).integers(0, 256, (height, width, 3), np.uint8)


def layout(views: ViewConfig, size: int = 384, patch: int = 14) -> VisualLayout:
    return VisualLayout(size, patch, region=(3, 3), context_tokens=0, views=views)


def tiny_onevision(max_tiles: int, side: int = 24, patch: int = 4) -> VisualLayout:
    """The 2 x 2 canvases of tests/helpers, and strips of six tiles."""
    canvases = [(y * side, x * side) for y in (1, 2) for x in (1, 2)] + [(side, 6 * side), (6 * side, side)]
    pooled = math.ceil(side // patch / 2)
    views = ViewConfig("llava_onevision", tuple(canvases), max_tiles=max_tiles, frame_side=pooled)
    return layout(views, side, patch)


def tiny_cambrian(image_side: int | None, frame_side: int | None, side: int = 24) -> VisualLayout:
    views = ViewConfig("cambrian_s", cambrian_canvases(side, 5), image_side=image_side, frame_side=frame_side)
    return layout(views, side, 4)


def pinpoints(at: VisualLayout) -> list[list[int]]:
    return [list(canvas) for canvas in at.views.canvases]


def pixels(views: MediaViews) -> np.ndarray:
    """All pixels of some views as the tower takes them, channels first."""
    stacked = np.concatenate([view.images for view in views.views])
    assert stacked.dtype == np.uint8
    return np.ascontiguousarray(normalise(stacked).transpose(0, 3, 1, 2))


def cambrian_canvas(size: tuple[int, int], tile: int, limit: int) -> tuple[int, int]:
    """(width, height) in pixels of what Cambrian-S cuts into tiles, for an image of (height, width)."""
    best, most = (0, 0), (-1, 0)
    for columns in range(1, limit + 1):
        for rows in range(1, limit // columns + 1):
            wide, tall = columns * tile, rows * tile
            scale = min(wide / size[1], tall / size[0])
            shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
            if (shown, shown - wide * tall) > most:
                best, most = (wide, tall), (shown, shown - wide * tall)
    return best


def cambrian_grid(
    tokens: torch.Tensor, side: int, tiles: tuple[int, int], size: tuple[int, int], newline: torch.Tensor
) -> torch.Tensor:
    """Cambrian-S in torch: pool each tile, join, cut the padding's rows or columns off, newline per row.

    Args:
      tokens: [n, grid * grid, M] of ``tiles`` = (rows, columns), by row.
      side: tokens per side of a tile after pooling.
      tiles: how they lie.
      size: (height, width) of the image.
      newline: [M].

    Returns:
      [N, M], the sequence of the view.
    """
    grid, width_of = math.isqrt(tokens.shape[1]), tokens.shape[2]
    stack = tokens.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    if side != grid:
        stack = torch.nn.functional.interpolate(stack, size=(side, side), mode="bilinear")
    rows = stack.unflatten(0, tiles).permute(2, 0, 3, 1, 4)
    joined = rows.reshape(width_of, tiles[0] * side, tiles[1] * side)
    height, width = size
    _, h, w = joined.shape
    if width / height > w / h:
        cut = (h - int(height * (w / width))) // 2
        joined = joined[:, cut : h - cut]
    else:
        cut = (w - int(width * (h / height))) // 2
        joined = joined[:, :, cut : w - cut]
    ends = newline[:, None, None].expand(width_of, joined.shape[1], 1)
    return torch.cat([joined, ends], dim=2).flatten(1).T
