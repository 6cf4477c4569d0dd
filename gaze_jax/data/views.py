"""Images and video frames to views: the pixels that the tower reads, and the token grids of its output.

A view is one token grid: a whole image, the joined tiles of an image, or a video frame. Pooling, unpadding
and shrinking a grid are linear and local, so every token of a view is a weighted sum of at most four tower
tokens (after the projector, where the published models pool). ``pool_indices`` and ``pool_weights`` describe
the sum, so models need no family's conventions. For tower tokens ``x`` [n * grid * grid, M]::

    tokens = (x[view.pool_indices] * view.pool_weights[..., None]).sum(axis=2)  # [h, w, M]

Families differ only in their :class:`ViewStyle`, which says what grids an image and a frame become. A family
makes its grids with :func:`whole_grid` and :func:`unpadded_grid`; the code after that is shared. The styles
are in ``gaze_jax.families``.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from gaze_jax.core.layout import ViewConfig, VisualLayout
from gaze_jax.data.pixels import (
    GREY,
    Picture,
    Size,
    best_canvas,
    check_image,
    cut_tiles,
    resize,
    resize_on_square,
)
from gaze_jax.errors import UserError

GridShape = tuple[int, int, bool]
"""(h, w, newlines): tokens per column and row, and whether a newline follows every row."""


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """One token grid and the pixels it is made from.

    Attributes:
      images: uint8 [n, size, size, 3], the tower's input: one image, or the tiles of one, row by row.
      pool_indices: int32 [h, w, 4], read-only: the tower tokens that make up each token, as indices into the
        n * grid * grid tokens of ``images``; 0 where the weight is 0.
      pool_weights: float32 [h, w, 4], read-only: their weights, which sum to 1.
      newlines: a newline embedding follows every row of the grid.
      corners: (x0, y0, x1, y1), the rectangle that the grid shows, in pixels of the original. Padding that
        was kept lies outside the original; if it was cut off, the grid shows the original up to rounding.
    """

    images: np.ndarray
    pool_indices: np.ndarray
    pool_weights: np.ndarray
    newlines: bool
    corners: tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class MediaViews:
    """The views of one image or video.

    Attributes:
      views: the views in the order of the sequence; a video has one per frame.
      end_newline: a newline that belongs to no view follows the last view.
    """

    views: tuple[View, ...]
    end_newline: bool


@dataclasses.dataclass(frozen=True)
class Grid:
    """A view without its pixels.

    Attributes:
      fit: how the image is put on the canvas. "squash": resized to it; "pad": padded to a square, then
        resized to it; "inside": resized with its aspect ratio, then padded.
      canvas: (height, width) in pixels, read by the tower in tiles of its size.
      colour: grey level of the padding.
      side: tokens per side of a tile, after pooling.
      margin: (rows, columns) of the joined grid that are cut off at each end.
      shape: (h, w) of the resulting grid. If it is smaller than what the margin leaves, the grid is shrunk;
        a pooled grid cannot be.
      newlines, corners: as in :class:`View`.
    """

    fit: Literal["squash", "pad", "inside"]
    canvas: Size
    colour: int
    side: int
    margin: tuple[int, int]
    shape: tuple[int, int]
    newlines: bool
    corners: tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class ViewStyle:
    """How a model family makes views. Its functions must be module-level, so that workers can pickle it.

    Attributes:
      name: its value of ``ViewConfig.style``.
      image_grids: (layout, (height, width), alone) -> the grids of an image in the order of the sequence,
        and whether one newline follows them. ``alone``: no other image is in the prompt.
      frame_grid: (layout, (height, width)) -> the grid of a video frame.
      video_end_newline: one newline follows the last frame of a video.
      tower_tokens: each view is the tower's output for an image of the tower's size, without pooling. Then
        arrays have no pool indices, boxes are in pixels of the tower's input, and an image of another size
        is refused unless ``Processor.resize`` is set.
      unused: field of ``ViewConfig`` that the style does not use -> the reason, as the predicate of a
        sentence.
    """

    name: str
    image_grids: Callable[[VisualLayout, Size, bool], tuple[list[Grid], bool]]
    frame_grid: Callable[[VisualLayout, Size], Grid]
    video_end_newline: bool = False
    tower_tokens: bool = False
    unused: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)


def check_style(style: ViewStyle, views: ViewConfig) -> None:
    """Check that ``views`` is of this style and sets no field that the style would ignore.

    Raises:
      UserError: a field that the style does not use is set.
      ValueError: ``views`` is of another style.
    """
    if views.style != style.name:
        raise ValueError(f"views.style={views.style!r} was given the views of style {style.name!r}.")
    for field, reason in style.unused.items():
        if getattr(views, field) not in (None, ()):
            raise UserError(f"views.style={style.name!r} {reason}; leave views.{field} empty.")


def _margin(grid: tuple[int, int], size: Size, digits: int | None) -> tuple[int, int]:
    """(rows, columns) at each end of ``grid`` that show only padding around a centred (height, width) image.

    Floating-point operations are in the order of the original code; another order may cut off one more row.
    ``digits`` is as in :func:`unpadded_grid`.
    """

    def filled(extent: int, scale: float) -> int:
        return int(extent * scale if digits is None else round(extent * scale, digits))

    rows, columns = grid
    height, width = size
    if width / height > columns / rows:
        return (rows - filled(height, columns / width)) // 2, 0
    return 0, (columns - filled(width, rows / height)) // 2


def tile_canvas(layout: VisualLayout, size: Size, alone: bool) -> Size | None:
    """(height, width) in pixels of the tile canvas for an image of ``size``; None: it is not cut."""
    return best_canvas(size, layout.views.canvases) if alone and layout.views.canvases else None


def unpadded_grid(
    layout: VisualLayout,
    size: Size,
    side: int,
    *,
    canvas: Size,
    colour: int,
    fit: Literal["pad", "inside"] = "inside",
    digits: int | None = None,
) -> Grid:
    """The tokens of a canvas without its rows or columns of padding, with a newline after each row.

    Args:
      layout: the model's layout.
      size: (height, width) of the image in pixels.
      side: tokens per side of a tile.
      canvas, colour, fit: as in :class:`Grid`.
      digits: decimal digits to which the number of filled rows is rounded before it is truncated; None: no
        rounding.
    """
    joined = canvas[0] // layout.image_size * side, canvas[1] // layout.image_size * side
    margin = _margin(joined, size, digits)
    shape = joined[0] - 2 * margin[0], joined[1] - 2 * margin[1]
    return Grid(fit, canvas, colour, side, margin, shape, True, (0, 0, size[1], size[0]))


def whole_grid(layout: VisualLayout, size: Size, side: int, fit: Literal["squash", "pad"]) -> Grid:
    """All ``side`` x ``side`` tokens of one tile, padding included, without newlines.

    Args:
      layout: the model's layout.
      size: (height, width) of the image in pixels.
      side: tokens per side.
      fit: "squash", or "pad" with grey.
    """
    canvas = layout.image_size, layout.image_size
    shown = size if fit == "squash" else (max(size), max(size))
    y, x = (shown[0] - size[0]) // 2, (shown[1] - size[1]) // 2
    corners = (-x, -y, shown[1] - x, shown[0] - y)
    return Grid(fit, canvas, GREY, side, (0, 0), (side, side), False, corners)


def shown_grids(grids: Sequence[Grid], size: Size, name: str) -> list[Grid]:
    """The grids that have tokens; ``name`` is the subject of the error message.

    Raises:
      UserError: no grid of the image of ``size`` has a token.
    """
    shown = [grid for grid in grids if 0 not in grid.shape]
    if not shown:
        side = grids[0].side
        raise UserError(
            f"{name} of {size[0]}x{size[1]} pixels is so narrow that without its padding none of the "
            f"{side}x{side} tokens are left; crop it."
        )
    return shown


def _bilinear(source: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Resize ``source`` tokens to ``size``: neighbours int32 [size, 2] and their float32 weights [size, 2].

    Half-pixel centres, no smoothing: exactly the weights of torch's interpolate without align_corners, whose
    float32 centres are one fused multiply-add. More exact weights would differ by 1e-5 across a tile grid.
    """
    scale = np.float64(np.float32(source) / np.float32(size))
    centre = (scale * (np.arange(size) + 0.5) - 0.5).astype(np.float32)  # rounded once
    centre = np.maximum(centre, np.float32(0))
    low = centre.astype(np.int32)
    high = np.minimum(low + 1, source - 1)
    upper = centre - low.astype(np.float32)
    return np.stack([low, high], axis=-1), np.stack([np.float32(1) - upper, upper], axis=-1)


def _axis(grid: int, tiles: int, side: int, margin: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """For each row of a view: two rows of the joined tower tokens, int32 [size, 2], and their weights."""
    index, weight = _bilinear(grid, side)
    index = (np.arange(tiles, dtype=np.int32)[:, None, None] * grid + index).reshape(-1, 2)
    kept = slice(margin, tiles * side - margin)
    index, weight = index[kept], np.tile(weight, (tiles, 1))[kept]
    if size != len(index):
        if side != grid:
            raise ValueError("A pooled grid cannot be shrunk: its rows are not rows of the tower's output.")
        again, weight = _bilinear(len(index), size)
        index = index[:, 0][again]
    return index, weight


@functools.lru_cache(maxsize=16)
def _pool_indices(
    grid: int, tiles: tuple[int, int], side: int, margin: tuple[int, int], shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """``pool_indices`` and ``pool_weights`` of a view; the frames of a video share one pair."""
    rows, row_weights = _axis(grid, tiles[0], side, margin[0], shape[0])
    columns, column_weights = _axis(grid, tiles[1], side, margin[1], shape[1])
    y, x = rows[:, None, :, None], columns[None, :, None, :]
    pool_weights = row_weights[:, None, :, None] * column_weights[None, :, None, :]
    pool_indices = ((y // grid * tiles[1] + x // grid) * grid + y % grid) * grid + x % grid
    pool_indices = np.where(pool_weights > 0, pool_indices, 0).astype(np.int32).reshape(*shape, 4)
    pool_weights = pool_weights.reshape(*shape, 4)
    for array in (pool_indices, pool_weights):
        array.setflags(write=False)  # shared by every caller
    return pool_indices, pool_weights


def _view(layout: VisualLayout, image: Picture, grid: Grid) -> View:
    side = layout.image_size
    if grid.fit == "inside":
        images = cut_tiles(image, grid.canvas, side, grid.colour)
    elif grid.fit == "pad":
        images = resize_on_square(image, side, grid.colour)[None]
    else:
        resized = resize(image, (side, side))
        images = (resized.copy() if resized is image else resized)[None]  # a decoder may reuse its buffer
    tiles = grid.canvas[0] // side, grid.canvas[1] // side
    pool_indices, pool_weights = _pool_indices(layout.grid, tiles, grid.side, grid.margin, grid.shape)
    return View(images, pool_indices, pool_weights, grid.newlines, grid.corners)


def image_views(style: ViewStyle, layout: VisualLayout, image: Picture, *, alone: bool) -> MediaViews:
    """The views of one image.

    If the image is a strip narrower than a token, unpadding may leave a view without tokens. Such a view is
    omitted with its newlines; the published models keep the newlines of an upright strip.

    Args:
      style: the family's style.
      layout: the model's layout; ``layout.views`` has the settings of the style.
      image: uint8 [height, width, 3], or a PIL image of mode RGB.
      alone: it is the only image of its prompt; only then is it cut into tiles.

    Raises:
      ValueError: ``image`` has the wrong shape or dtype, or ``layout`` is of another style.
      UserError: the image is so narrow that no token shows it.
    """
    check_style(style, layout.views)
    grids, end_newline = style.image_grids(layout, check_image(image, "An image"), alone)
    return MediaViews(tuple(_view(layout, image, grid) for grid in grids), end_newline)


def video_views(style: ViewStyle, layout: VisualLayout, frames: Iterable[np.ndarray]) -> MediaViews:
    """The views of a video: one per frame.

    Args:
      style: the family's style.
      layout: the model's layout; ``layout.views`` has the settings of the style.
      frames: uint8 [height, width, 3] each; each is reduced to the tower's size before the next is read.

    Raises:
      ValueError: there are no frames, one has the wrong shape or dtype, or ``layout`` is of another style.
      UserError: a frame is so narrow that no token shows it.
    """
    check_style(style, layout.views)
    views = []
    for number, frame in enumerate(frames):
        grid = style.frame_grid(layout, check_image(frame, f"Frame {number} of a video"))
        views.append(_view(layout, frame, grid))
    if not views:
        raise ValueError("A video has no frames; sample at least one.")
    return MediaViews(tuple(views), style.video_end_newline)


def image_shapes(
    style: ViewStyle, layout: VisualLayout, height: int, width: int, *, alone: bool
) -> tuple[list[GridShape], bool]:
    """The grids that :func:`image_views` makes for an image of this size, and its ``end_newline``.

    Raises:
      ValueError: a side is less than 1, or ``layout`` is of another style.
      UserError: as :func:`image_views`.
    """
    _check_size(height, width)
    check_style(style, layout.views)
    grids, end_newline = style.image_grids(layout, (height, width), alone)
    return [(*grid.shape, grid.newlines) for grid in grids], end_newline


def frame_shape(style: ViewStyle, layout: VisualLayout, height: int, width: int) -> GridShape:
    """The grid that :func:`video_views` makes for a frame of this size.

    Raises:
      ValueError: a side is less than 1, or ``layout`` is of another style.
      UserError: as :func:`video_views`.
    """
    _check_size(height, width)
    check_style(style, layout.views)
    grid = style.frame_grid(layout, (height, width))
    return (*grid.shape, grid.newlines)


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"An image of {height}x{width} pixels is empty; both sides must be at least 1.")
