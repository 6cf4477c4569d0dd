"""Steering: restrict or bias the selection to boxes in images and frames."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from gaze_jax.data.placement import PlacedView
from gaze_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LookAt:
    """Steer the selection to a box.

    Attributes:
      box: (x0, y0, x1, y1) in pixels of the original image or frame.
      frame: a frame of a video, from 0; None means every frame and every image.
      layers: the steered layers; None means all.
      bias: added to the scores of regions in the box, in logits; None means that no other region may be
        selected.

    Raises:
      UserError: the box has no area, or a number is out of range.
    """

    box: tuple[float, float, float, float]
    frame: int | None = None
    layers: tuple[int, ...] | None = None
    bias: float | None = None

    def __post_init__(self) -> None:
        if len(self.box) != 4:
            raise UserError(f"look_at={self.box} must be four numbers: x0,y0,x1,y1.")
        x0, y0, x1, y1 = self.box
        if not all(map(math.isfinite, self.box)) or not (x0 < x1 and y0 < y1):
            raise UserError(f"look_at={self.box} must be x0,y0,x1,y1 with x0 < x1 and y0 < y1, in pixels.")
        if self.frame is not None and self.frame < 0:
            raise UserError(f"look_at frame {self.frame} must be 0 or more.")
        if self.bias is not None and not math.isfinite(self.bias):
            raise UserError(
                f"look_at bias {self.bias} must be a finite number of logits; leave it out to restrict."
            )

    @classmethod
    def parse(
        cls, text: str, *, layers: tuple[int, ...] | None = None, bias: float | None = None
    ) -> "LookAt":
        """Parse "x0,y0,x1,y1" or "x0,y0,x1,y1,frame".

        Raises:
          UserError: the text has neither form.
        """
        try:
            numbers = [float(word) for word in text.split(",")]
            frame = int(text.split(",")[4]) if len(numbers) == 5 else None
        except ValueError:
            numbers, frame = [], None
        if len(numbers) not in (4, 5):
            raise UserError(
                f"look_at={text!r} must be x0,y0,x1,y1 in pixels, optionally with a frame's number."
            )
        return cls((numbers[0], numbers[1], numbers[2], numbers[3]), frame, layers, bias)


def _inside(target: LookAt, view: PlacedView) -> np.ndarray:
    """int32 [n], regions of a view that have a token whose pixels overlap the box."""
    rows, columns = view.regions.shape
    left, top, right, bottom = view.corners
    xs, ys = np.linspace(left, right, columns + 1), np.linspace(top, bottom, rows + 1)
    x0, y0, x1, y1 = target.box
    across = (xs[:-1] < x1) & (xs[1:] > x0)
    down = (ys[:-1] < y1) & (ys[1:] > y0)
    return np.unique(view.regions[down][:, across])


def bias_of(targets: Sequence[LookAt], views: Sequence[PlacedView], layers: int, regions: int) -> np.ndarray:
    """What steering adds to the scores: float32 [L, R] in logits, -inf for regions that are excluded.

    With several restricting boxes, a region in any of them may be selected. Biases add up.

    Args:
      targets: the boxes.
      views: the regions of each view and frame.
      layers: L, the model's number of layers.
      regions: R, the sequence's number of regions.

    Raises:
      UserError: a layer does not exist, a frame is not shown, or a box overlaps no view.
    """
    if targets and not views:
        raise UserError("Nothing is shown, so there is nowhere to look; drop look_at.")
    bias = np.zeros((layers, regions), np.float32)
    restricted = np.zeros(layers, bool)
    allowed = np.zeros((layers, regions), bool)
    for target in targets:
        chosen = np.arange(layers) if target.layers is None else np.asarray(target.layers, int)
        if len(chosen) == 0 or np.min(chosen) < 0 or np.max(chosen) >= layers:
            raise UserError(
                f"look_at layers {target.layers} must be between 0 and {layers - 1}, the model's last."
            )
        meant = [
            view for view in views if target.frame is None or (view.video and view.frame == target.frame)
        ]
        if not meant:
            shown = sum(view.video for view in views)
            raise UserError(f"look_at frame {target.frame} is not shown; there are {shown} frames of video.")
        found = np.concatenate([_inside(target, view) for view in meant])
        if not found.size:
            raise UserError(f"look_at={target.box} lies outside of everything that is shown.")
        if target.bias is None:
            restricted[chosen] = True
            allowed[np.ix_(chosen, found)] = True
        else:
            bias[np.ix_(chosen, np.unique(found))] += target.bias
    bias[restricted[:, None] & ~allowed] = -np.inf
    return bias
