"""Layouts of every style of views, real and tiny, and what the tests of views share."""

import math
from typing import Any

import numpy as np
import pytest

from gaze_jax.core.layout import ViewConfig, VisualLayout
from gaze_jax.data import views as data_views
from gaze_jax.data.pixels import normalise
from gaze_jax.data.views import MediaViews, View, ViewStyle
from gaze_jax.families import MODELS, get_family
from gaze_jax.families.cambrian_s import cambrian_canvases

LLAVA_ONEVISION = MODELS["llava-onevision-qwen2-7b"].views
CAMBRIAN_S = MODELS["cambrian-s-7b"].views


def style_of(at: VisualLayout) -> ViewStyle:
    return get_family(at.views.style).views


def image_views(at: VisualLayout, image: np.ndarray, *, alone: bool) -> MediaViews:
    return data_views.image_views(style_of(at), at, image, alone=alone)


def video_views(at: VisualLayout, frames) -> MediaViews:
    return data_views.video_views(style_of(at), at, frames)


def image_shapes(at: VisualLayout, height: int, width: int, *, alone: bool):
    return data_views.image_shapes(style_of(at), at, height, width, alone=alone)


def frame_shape(at: VisualLayout, height: int, width: int):
    return data_views.frame_shape(style_of(at), at, height, width)


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


def cambrian_grid(tokens: Any, side: int, tiles: tuple[int, int], size: tuple[int, int], newline: Any) -> Any:
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
    torch = pytest.importorskip("torch")
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


# (height, width) of images that fill a whole number of rows or columns, less 1e-14 in floats: transformers
# rounds, Cambrian-S cuts the fraction off. The first belong to 27 tokens a side, then 24, 8, and tiny grids.
NEARLY_WHOLE = [(423, 188), (188, 423), (1323, 196), (196, 1323), (98, 1323), (820, 1107)]
NEARLY_WHOLE += [(110, 176), (984, 205), (693, 1848), (147, 392), (392, 147), (343, 392)]
NEARLY_WHOLE += [(22, 55), (55, 22), (39, 117), (117, 39), (98, 147), (147, 98), (49, 98)]


def count(shapes: list[tuple[int, int, bool]], end_newline: bool) -> int:
    return sum(h * (w + newlines) for h, w, newlines in shapes) + end_newline


def sizes(number: int, smallest: int, largest: int) -> list[tuple[int, int]]:
    """(height, width), every order of magnitude alike."""
    low, high = math.log(smallest), math.log(largest + 1)
    drawn = np.exp(np.random.default_rng(number).uniform(low, high, (number, 2))).astype(int)
    return [(int(height), int(width)) for height, width in drawn]


def features(tiles: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(tiles).normal(size=(tiles, tokens, 3)).astype(np.float32)


NEWLINE = np.array([7.0, -5.0, 3.0], np.float32)


def weigh(view: View, tokens: np.ndarray) -> np.ndarray:
    """A view's tokens, float32 [h, w, M], from those of the tower."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    assert view.pool_indices.dtype == np.int32 and view.pool_weights.dtype == np.float32
    assert view.pool_indices.shape == view.pool_weights.shape == (*view.pool_indices.shape[:2], 4)
    assert view.pool_indices.min() >= 0 and view.pool_indices.max() < len(flat)
    assert not view.pool_indices[view.pool_weights == 0].any() and view.pool_weights.min() >= 0
    np.testing.assert_allclose(view.pool_weights.sum(-1), 1, atol=3e-7)
    return (flat[view.pool_indices] * view.pool_weights[..., None]).sum(2)


def sequence(views: MediaViews, tokens: np.ndarray) -> np.ndarray:
    """Everything that the decoder would see, float32 [n, M]; ``tokens`` are of the views' images in order."""
    out, start = [], 0
    for view in views.views:
        grid = weigh(view, tokens[start : start + len(view.images)])
        start += len(view.images)
        if view.newlines:
            grid = np.concatenate([grid, np.broadcast_to(NEWLINE, (len(grid), 1, len(NEWLINE)))], axis=1)
        out.append(grid.reshape(-1, grid.shape[-1]))
    assert start == len(tokens)
    return np.concatenate([*out, NEWLINE[None]] if views.end_newline else out)


def shapes_of(views: MediaViews) -> tuple[list[tuple[int, int, bool]], bool]:
    return [(*view.pool_indices.shape[:2], view.newlines) for view in views.views], views.end_newline
