"""Place views in the sequence: the order of each visual token, and its region.

A view of h rows and w columns takes h * w positions of the sequence in raster order, or h * (w + 1) if a
newline follows each row. Regions are cut from a view's grid; a video's regions from slabs of frames.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gaze_jax.core.layout import VisualLayout
from gaze_jax.core.regions import partition_frames
from gaze_jax.core.streams import EMPTY, NEWLINE, POOL_FIELDS
from gaze_jax.data.sample import Corners
from gaze_jax.data.views import View

Arrays = dict[str, np.ndarray]

_POOL_WIDTH = 4


@dataclasses.dataclass(frozen=True, eq=False)
class PlacedView:
    """A view of a sample and its regions, for drawing.

    Attributes:
      view: its number in the sample.
      video: True for a video frame, False for an image.
      index: index of the image or video in the sample.
      frame: index of the frame in the video; 0 for an image.
      corners: rectangle that its grid covers, in pixels of the image or frame.
      regions: int32 [h, w], the region of each token.
    """

    view: int
    video: bool
    index: int
    frame: int
    corners: Corners
    regions: np.ndarray


@dataclasses.dataclass(frozen=True)
class Cursor:
    """Where the next view goes: counts of what precedes it."""

    order: int = 0
    view: int = 0
    token: int = 0
    image: int = 0
    region: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """Views of one image or video in the sequence.

    Attributes:
      fields: visual fields [R, P]; pool indices and weights [R, P, 4].
      newlines: int32 [F, n], order of the text-stream newlines inside each view; n may be 0.
      ends: int32 [F], order of the token after each view, its first context token if C > 0.
      grids: int32 [F, h, w], the region of each token.
      next: where the next view goes.
    """

    fields: Arrays
    newlines: np.ndarray
    ends: np.ndarray
    grids: np.ndarray
    next: Cursor


def place_views(
    layout: VisualLayout, views: Sequence[View], region: tuple[int, int, int], at: Cursor
) -> Placement:
    """Place consecutive views of one grid size, each followed by its context tokens.

    Args:
      layout: the model's layout.
      views: at least one; several are the frames of a video.
      region: (r_t, r_h, r_w) target size.
      at: where the first view goes.
    """
    count, (height, width) = len(views), views[0].pool_indices.shape[:2]
    routed = views[0].newlines and layout.newlines == "region"
    pitch = width + views[0].newlines
    stride = width + routed
    starts = at.order + np.arange(count) * (height * pitch + layout.context_tokens)
    rows = starts[:, None] + np.arange(height) * pitch
    order = rows[:, :, None] + np.arange(stride)
    view = np.broadcast_to(at.view + np.arange(count)[:, None, None], order.shape)
    pool_indices, pool_weights = _pool_indices(views, layout.grid**2, at.image, routed)

    table = partition_frames(count, height, width, region, newlines=routed)
    valid = table >= 0

    def spread(values: np.ndarray, empty: int) -> np.ndarray:
        """Move values per token [F, h, stride, ...] to slots [R, P, ...]."""
        flat = values.reshape(order.size, *values.shape[3:])
        found = flat[np.maximum(table, 0)]
        found[~valid] = empty
        return found

    fields = {
        "visual_src": spread(at.token + np.arange(order.size).reshape(order.shape), EMPTY).astype(np.int32),
        "visual_order": spread(order, EMPTY).astype(np.int32),
        "visual_positions": spread(order, 0).astype(np.int32),
        "visual_view": spread(view, EMPTY).astype(np.int32),
        "region_segment": np.zeros(len(table), np.int32),
        "pool_indices": spread(pool_indices, 0),
        "pool_weights": spread(pool_weights, 0),
    }
    region_of = np.empty(order.size, np.int32)
    region_of[table[valid]] = np.broadcast_to(np.arange(len(table))[:, None], table.shape)[valid]
    newlines = rows + width if views[0].newlines and not routed else np.zeros((count, 0))
    ends = starts + height * pitch
    return Placement(
        fields,
        newlines.astype(np.int32),
        ends.astype(np.int32),
        at.region + region_of.reshape(order.shape)[:, :, :width],
        Cursor(
            order=int(ends[-1]) + layout.context_tokens,
            view=at.view + count,
            token=at.token + order.size,
            image=at.image + sum(len(view.images) for view in views),
            region=at.region + len(table),
        ),
    )


def _pool_indices(
    views: Sequence[View], tokens: int, image: int, routed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Pool indices int32 and weights float32 [F, h, stride, 4]; the tower makes ``tokens`` per image."""
    firsts = image + np.cumsum([0, *(len(view.images) for view in views)])
    pool_weights = np.stack([view.pool_weights for view in views])
    pool_indices = np.stack([view.pool_indices + first * tokens for view, first in zip(views, firsts)])
    pool_indices = np.where(pool_weights != 0, pool_indices, 0).astype(np.int32)
    if routed:
        pool_indices = np.pad(pool_indices, ((0, 0), (0, 0), (0, 1), (0, 0)))
        pool_weights = np.pad(pool_weights, ((0, 0), (0, 0), (0, 1), (0, 0)))
        pool_indices[:, :, -1, 0] = NEWLINE
    return pool_indices, pool_weights


def join(layout: VisualLayout, placed: Sequence[Placement], *, pooled: bool) -> Arrays:
    """The visual fields of a sample, [R, P]; P is the size of the largest region of all its views.

    With ``pooled``, pool indices and weights are included; views without pooling do not need them.
    """
    slots = max((p.fields["visual_src"].shape[1] for p in placed), default=layout.slots)
    out = {}
    for name in (*FILL, "region_segment"):
        if not pooled and name in POOL_FIELDS:
            continue
        slotted = (slots,) if name in FILL else ()
        tail = (*slotted, _POOL_WIDTH) if name in POOL_FIELDS else slotted
        empty = np.zeros((0, *tail), np.float32 if name == "pool_weights" else np.int32)
        out[name] = np.concatenate([empty, *(pad_slots(p.fields[name], name, slots) for p in placed)])
    return out


FILL = {
    "visual_src": EMPTY,
    "visual_order": EMPTY,
    "visual_positions": 0,
    "visual_view": EMPTY,
    "pool_indices": 0,
    "pool_weights": 0,
}
"""Field with a slot axis -> its value in empty slots."""


def pad_slots(values: np.ndarray, name: str, slots: int) -> np.ndarray:
    """Pad axis 1 of a field of :data:`FILL`; other fields have no slots and are unchanged.

    Raises:
      ValueError: the field has more than ``slots`` slots.
    """
    if name not in FILL:
        return values
    more = slots - values.shape[1]
    if not more:
        return values
    if more < 0:
        raise ValueError(f"{name} has regions of {values.shape[1]} slots but slots={slots}; raise it to fit.")
    widths = [(0, 0), (0, more), *[(0, 0)] * (values.ndim - 2)]
    return np.pad(values, widths, constant_values=FILL[name])
