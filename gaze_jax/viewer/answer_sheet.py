"""Contact sheets of a model's answer: selected regions, drawn over the images they were cut from."""

import dataclasses
from collections.abc import Sequence
from typing import Unpack

import numpy as np
from PIL import Image

from gaze_jax.core.layout import VisualLayout
from gaze_jax.data.placement import PlacedView
from gaze_jax.errors import UserError
from gaze_jax.infer.trace import Trace, budget_text, check_layer
from gaze_jax.viewer.contact_sheet import SheetOptions, contact_sheet


def over_grid(per_region: np.ndarray, layout: VisualLayout) -> np.ndarray:
    """Spread values per region of one image over its token grid: [..., R] to [..., h, w]."""
    table = layout.table
    valid = table >= 0
    regions = np.broadcast_to(np.arange(layout.regions)[:, None], table.shape)
    region_of = np.empty(layout.tokens, np.int64)
    region_of[table[valid]] = regions[valid]
    return per_region[..., region_of].reshape(*per_region.shape[:-1], layout.grid, layout.grid)


def answer_sheet(
    image: np.ndarray,
    pieces: Sequence[str],
    selected: np.ndarray,
    layout: VisualLayout,
    *,
    title: str,
    **options: Unpack[SheetOptions],
) -> Image.Image:
    """Draw the regions that each token of an answer selected in one layer.

    Args:
      image: uint8 [height, width, 3], the image that the model saw, or the larger original.
      pieces: T generated tokens as text.
      selected: bool [T, Hs, R] of one layer; the fewer heads selected a region, the stronger its veil.
      layout: the image's layout.
      title: above the sheet.
      **options: see :func:`gaze_jax.viewer.contact_sheet.contact_sheet`.

    Returns:
      An RGB picture.
    """
    fraction = selected.astype(np.float32).mean(axis=1)
    return contact_sheet(image, pieces, over_grid(fraction, layout), title=title, **options)


def most_looked_at(views: Sequence[PlacedView], selected: np.ndarray, count: int) -> list[PlacedView]:
    """The ``count`` views whose tokens were selected most often over an answer, in their own order.

    Args:
      views: the views of the prompt.
      selected: bool [T, heads, R], of one layer or of several side by side.
      count: at least 1.
    """
    often = selected.astype(np.float32).mean(axis=(0, 1))
    ranked = sorted(views, key=lambda view: -float(often[view.regions].mean()))  # stable: ties keep order
    kept = {view.view for view in ranked[:count]}
    return [view for view in views if view.view in kept]


def titles_of(trace: Trace) -> list[str]:
    """A title for each view of a trace, such as "Image 1, view 2 of 3"."""
    frames: dict[int, int] = {}
    of_image: dict[int, list[int]] = {}
    for view in trace.views:
        if view.video:
            frames[view.index] = max(frames.get(view.index, 0), view.frame + 1)
        else:
            of_image.setdefault(view.index, []).append(view.view)

    def title(view: PlacedView) -> str:
        if view.video:
            seconds = trace.picture_of(view).seconds
            return f"Video {view.index + 1}, frame {view.frame + 1} of {frames[view.index]}, {seconds:.1f} s"
        of = of_image[view.index]
        part = f", view {of.index(view.view) + 1} of {len(of)}" if len(of) > 1 else ""
        return f"Image {view.index + 1}{part}"

    return [title(view) for view in trace.views]


def covered(picture: np.ndarray, view: PlacedView) -> np.ndarray:
    """The part of a picture, uint8 [height, width, 3], that a view's grid covers; padding is black."""
    left, top, right, bottom = (round(edge) for edge in view.corners)
    box = (left, top, max(right, left + 1), max(bottom, top + 1))
    return np.asarray(Image.fromarray(picture).crop(box))


def view_sheets(
    pictures: Sequence[np.ndarray],
    views: Sequence[PlacedView],
    pieces: Sequence[str],
    selected: np.ndarray,
    *,
    titles: Sequence[str],
    **options: Unpack[SheetOptions],
) -> Image.Image:
    """Contact sheets below each other, one for each view of an image or frame of a video.

    Args:
      pictures: F images or frames that the views were made from, uint8 [height, width, 3] each.
      views: F placed views.
      pieces: T generated tokens as text.
      selected: bool [T, heads, R], of one layer or of several side by side.
      titles: F headings.
      **options: of :func:`gaze_jax.viewer.contact_sheet.contact_sheet`.

    Returns:
      An RGB picture.
    """
    fraction = selected.astype(np.float32).mean(axis=1)
    grids = [fraction[:, view.regions] for view in views]
    options = {"clearest": float(max(grid.max() for grid in grids)), **options}
    sheets = []
    for picture, view, grid, title in zip(pictures, views, grids, titles, strict=True):
        sheets.append(contact_sheet(covered(picture, view), pieces, grid, title=title, **options))
    width, height = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
    whole = Image.new("RGB", (width, height), sheets[0].getpixel((0, 0)))
    at = 0
    for sheet in sheets:
        whole.paste(sheet, (0, at))
        at += sheet.height
    return whole


def sheet(trace: Trace, *, layer: int | None, views: int, **options: Unpack[SheetOptions]) -> Image.Image:
    """The contact sheets of a trace: its answer over the views and frames with the most selected regions.

    Args:
      trace: the trace of a run with selection.
      layer: show the heads of this layer; None shows those of all layers.
      views: maximum number of views and frames, at least 1.
      **options: of :func:`gaze_jax.viewer.contact_sheet.contact_sheet`.

    Returns:
      An RGB picture.

    Raises:
      UserError: there is no such layer, or nothing was selected because the run was dense.
    """
    selected = selection(trace, layer)
    shown = most_looked_at(trace.views, selected, views)
    titles = [title for view, title in zip(trace.views, titles_of(trace)) if view in shown]
    where = "all layers" if layer is None else f"layer {layer}"
    budget = budget_text(trace, layer)
    titles[0] = f"{trace.question}\n{budget} of {trace.regions} regions, {where}. {titles[0]}"
    pictures = [trace.picture_of(view).pixels() for view in shown]
    copies = [on_copy(trace, view) for view in shown]
    return view_sheets(pictures, copies, trace.tokens, selected, titles=titles, **options)


def selection(trace: Trace, layer: int | None) -> np.ndarray:
    """bool [T, heads, R]: the selections of one layer, or (None) of all layers side by side.

    Raises:
      UserError: there is no such layer, or the run was dense.
    """
    check_layer(trace, layer)
    if trace.top_k is None:
        raise UserError("The trace is of a dense run, which selects nothing; view its HTML page instead.")
    mask = trace.mask()
    return mask.reshape(len(mask), -1, trace.regions) if layer is None else mask[:, layer]


def on_copy(trace: Trace, view: PlacedView) -> PlacedView:
    """The view with its corners in pixels of the picture stored in the trace."""
    picture = trace.picture_of(view)
    (height, width), (rows, columns) = picture.size, picture.pixels().shape[:2]
    x, y = columns / width, rows / height
    x0, y0, x1, y1 = view.corners
    return dataclasses.replace(view, corners=(x0 * x, y0 * y, x1 * x, y1 * y))
